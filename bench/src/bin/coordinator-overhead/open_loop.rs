//! Requests that come at a fixed rate, whatever became of those before, through the coordinator and straight to the node by
//! turns: what the coordinator adds to a request's first token and to its last.

use crate::arguments::Arguments;
use crate::echo_node::EchoNode;
use crate::measure::{Coordinator, Received, connect, median, percentile, straight, through};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::fmt;
use std::future::Future;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// What a node sends together at most.
pub const FRAME_TOKENS: u32 = 8;

/// Medians over the rounds, milliseconds.
#[derive(Serialize)]
pub struct Figures {
    rate: f64,
    requests: usize,
    tokens: u32,
    first_token: Side,
    last_token: Side,
    coordinator_cpu_share: f64,
}

#[derive(Serialize)]
struct Side {
    through_ms_p50: f64,
    through_ms_p99: f64,
    straight_ms_p50: f64,
    straight_ms_p99: f64,
    added_ms_p50: f64,
    added_ms_p99: f64,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rate, requests, tokens) = (self.rate, self.requests, self.tokens);
        writeln!(f, "{requests} requests of {tokens} tokens each way, {rate:.0} a second")?;
        writeln!(f, "client to client, ms        through       straight          added")?;
        writeln!(f, "                          p50    p99     p50    p99     p50    p99")?;
        for (name, side) in [("first token", &self.first_token), ("last token", &self.last_token)] {
            let (t50, t99) = (side.through_ms_p50, side.through_ms_p99);
            let (s50, s99) = (side.straight_ms_p50, side.straight_ms_p99);
            let (a50, a99) = (side.added_ms_p50, side.added_ms_p99);
            writeln!(
                f,
                "{name:<22} {t50:>6.2} {t99:>6.2}  {s50:>6.2} {s99:>6.2}  {a50:>6.2} {a99:>6.2}"
            )?;
        }
        write!(f, "coordinator CPU: {:.2} cores", self.coordinator_cpu_share)
    }
}

/// First and last token of each request since it was sent, sorted, milliseconds.
type Half = [Vec<f64>; 2];

async fn half<R>(rate: f64, seconds: u64, send: impl Fn(u32) -> R) -> Result<Half>
where
    R: Future<Output = Result<Received>> + Send + 'static,
{
    let mut running = JoinSet::new();
    let begun = tokio::time::Instant::now();
    let count = (rate * seconds as f64) as u32;
    for name in 0..count {
        // Due by the clock, so that a delay here does not thin the load out.
        tokio::time::sleep_until(begun + Duration::from_secs_f64(f64::from(name) / rate)).await;
        let (sent, request) = (Instant::now(), send(2 + name));
        running.spawn(async move { request.await.map(|received| (sent, received)) });
    }
    let mut half = Half::default();
    while let Some(done) = running.join_next().await {
        let (sent, received) = done??;
        let first = received.first().context("no token")?.2;
        let last = received.last().context("no token")?.2;
        for (times, at) in half.iter_mut().zip([first, last]) {
            times.push((at - sent).as_secs_f64() * 1e3);
        }
    }
    half.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
    Ok(half)
}

/// Runs the rounds.
pub async fn run(coordinator: &mut Coordinator, node: &EchoNode, arguments: &Arguments, rate: f64) -> Result<Figures> {
    ensure!(
        (1.0..=10_000.0).contains(&rate),
        "--rate is {rate}: it must be between 1 and 10,000 requests a second"
    );
    ensure!(arguments.seconds > 0, "--seconds is 0");
    let (front, direct) = connect(coordinator, node).await?;
    let identity = (node.instance.to_string(), node.fingerprint.to_string());
    let (tokens, seconds) = (arguments.tokens, arguments.seconds);
    let (mut through_halves, mut straight_halves, mut cpu, mut took) = (Vec::new(), Vec::new(), 0.0, 0.0);
    for _ in 0..arguments.rounds {
        let (before, begun) = (coordinator.cpu()?, Instant::now());
        through_halves.push(half(rate, seconds, |name| through(front.clone(), name, tokens)).await?);
        cpu += (coordinator.cpu()? - before).as_secs_f64();
        took += begun.elapsed().as_secs_f64();
        let send = |name| straight(direct.clone(), identity.clone(), name, tokens);
        straight_halves.push(half(rate, seconds, send).await?);
        node.stamps
            .lock()
            .map_err(|_| anyhow::anyhow!("a stamping task panicked"))?
            .clear();
    }
    let pick = |halves: &[Half], which: usize, share: f64| {
        median(halves.iter().map(|half| percentile(&half[which], share)).collect())
    };
    let side = |which: usize| {
        let [t50, t99] = [0.5, 0.99].map(|share| pick(&through_halves, which, share));
        let [s50, s99] = [0.5, 0.99].map(|share| pick(&straight_halves, which, share));
        Side {
            through_ms_p50: t50,
            through_ms_p99: t99,
            straight_ms_p50: s50,
            straight_ms_p99: s99,
            added_ms_p50: t50 - s50,
            added_ms_p99: t99 - s99,
        }
    };
    Ok(Figures {
        rate,
        requests: through_halves.iter().map(|half| half[0].len()).sum(),
        tokens,
        first_token: side(0),
        last_token: side(1),
        coordinator_cpu_share: cpu / took,
    })
}
