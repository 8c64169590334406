//! What a cluster does when three times as much comes as it can serve: the capacity is measured first, then goodput (requests
//! that were answered within the bounds, per second) at one and at three times that rate.

use crate::client::{Done, at, ms, send};
use anyhow::Result;
use baton_load::mix;
use baton_proto::v1::inference_client::InferenceClient;
use baton_tests::{Ask, Cluster, ClusterOptions};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tonic::transport::Channel;

/// A refusal later than this is a slow one.
const REFUSAL_MAX: Duration = Duration::from_millis(50);

/// What to overload.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Model of every node
    #[arg(long, value_name = "MODEL", default_value = "stub:prefill_us=250,decode_us=10000")]
    model: String,
    /// Prefill nodes
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    prefill: usize,
    /// Decode nodes
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    decode: usize,
    /// Tokens of each prompt
    #[arg(long, value_name = "COUNT", default_value_t = 200)]
    prompt: u64,
    /// Tokens of each answer
    #[arg(long, value_name = "COUNT", default_value_t = 32)]
    tokens: u32,
    /// Bound on the time to the first token, which the coordinator is told
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    slo_ttft_ms: u64,
    /// Bound on the mean time between tokens, which the coordinator is told
    #[arg(long, value_name = "MS", default_value_t = 50)]
    slo_itl_ms: u64,
    /// Bound on the coordinator's queue
    #[arg(long, value_name = "COUNT", default_value_t = 64)]
    queue: u32,
    /// Streams at a time while the capacity is measured
    #[arg(long, value_name = "COUNT", default_value_t = 16)]
    streams: u64,
    /// How long the overload lasts; the other phases take a third of it
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    seconds: u64,
    /// How many times the capacity
    #[arg(long, value_name = "FACTOR", default_value_t = 3.0)]
    factor: f64,
}

impl Options {
    fn request(&self, number: u64) -> Ask {
        let ids = (0..self.prompt).map(|i| (mix(number << 20 | i) % 250) as u32).collect();
        Ask::greedy_ids(ids, self.tokens)
    }

    fn within_bounds(&self, done: &Done) -> bool {
        let ttft = done
            .first
            .is_some_and(|first| first <= Duration::from_millis(self.slo_ttft_ms));
        done.error.is_none() && ttft && done.between_tokens() <= Duration::from_millis(self.slo_itl_ms)
    }
}

/// Requests at this rate for so long, their numbers from `from` on.
async fn offer(
    client: &InferenceClient<Channel>,
    options: &Options,
    rate: f64,
    length: Duration,
    from: u64,
) -> Vec<Done> {
    let (begun, mut running) = (tokio::time::Instant::now(), JoinSet::new());
    for number in 0..(rate * length.as_secs_f64()) as u64 {
        tokio::time::sleep_until(begun + Duration::from_secs_f64(number as f64 / rate)).await;
        running.spawn(send(client.clone(), options.request(from + number)));
    }
    running.join_all().await
}

/// What is answered per second with so many streams at a time.
async fn capacity(client: &InferenceClient<Channel>, options: &Options, length: Duration) -> f64 {
    let (begun, mut streams) = (Instant::now(), JoinSet::new());
    for stream in 0..options.streams {
        let (client, asks) = (client.clone(), move |number| stream << 32 | 1 << 31 | number);
        let first: Vec<Ask> = (0..10_000).map(|number| options.request(asks(number))).collect();
        streams.spawn(async move {
            let mut answered = 0;
            for ask in first {
                if begun.elapsed() > length {
                    break;
                }
                answered += u32::from(send(client.clone(), ask).await.error.is_none());
            }
            answered
        });
    }
    let answered: u32 = streams.join_all().await.into_iter().sum();
    f64::from(answered) / begun.elapsed().as_secs_f64()
}

fn show(options: &Options, name: &str, rate: f64, length: Duration, done: &[Done]) -> f64 {
    let good = done.iter().filter(|done| options.within_bounds(done)).count() as f64 / length.as_secs_f64();
    let admitted: Vec<&Done> = done.iter().filter(|done| done.error.is_none()).collect();
    let refused: Vec<&Done> = done.iter().filter(|done| done.error.is_some()).collect();
    let (hints, late) = (
        refused.iter().filter(|done| done.retry_after().is_some()).count(),
        refused.iter().filter(|done| done.end > REFUSAL_MAX).count(),
    );
    let first = |share| ms(at(admitted.iter().filter_map(|done| done.first), share));
    let between = |share| ms(at(admitted.iter().map(|done| done.between_tokens()), share));
    let answer = |share| ms(at(refused.iter().map(|done| done.end), share));
    println!(
        "{name}: {rate:.1}/s offered, {} sent, goodput {good:.1}/s, {} admitted, of which {} beyond a bound",
        done.len(),
        admitted.len(),
        admitted.iter().filter(|done| !options.within_bounds(done)).count()
    );
    println!(
        "  admitted, ms: first token p50 {:.0} p90 {:.0} p99 {:.0}; between tokens p50 {:.1} p99 {:.1}",
        first(0.5),
        first(0.9),
        first(0.99),
        between(0.5),
        between(0.99)
    );
    println!(
        "  refused {}: {hints} with a hint, answered within ms p50 {:.1} p99 {:.1} max {:.1}, {late} later than {REFUSAL_MAX:?}",
        refused.len(),
        answer(0.5),
        answer(0.99),
        answer(1.0)
    );
    let mut reasons: Vec<&str> = refused
        .iter()
        .filter_map(|done| Some(done.error.as_ref()?.message()))
        .collect();
    reasons.sort_unstable();
    reasons.dedup_by_key(|reason| {
        reason
            .chars()
            .filter(|c| !c.is_ascii_digit())
            .take(20)
            .collect::<String>()
    });
    reasons.iter().take(4).for_each(|reason| println!("    {reason}"));
    good
}

/// Runs it.
pub async fn run(options: Options) -> Result<()> {
    let bound = |flag: &str, ms: u64| [flag.to_owned(), format!("{ms}ms")];
    let flags = [
        bound("--slo-ttft", options.slo_ttft_ms),
        bound("--slo-itl", options.slo_itl_ms),
        ["--queue".to_owned(), options.queue.to_string()],
    ];
    let cluster = ClusterOptions {
        prefill: options.prefill,
        decode: options.decode,
        coordinator_flags: flags.concat(),
        ..ClusterOptions::pair(options.model.clone())
    };
    let cluster = Cluster::start(cluster).await?;
    let client = cluster.client().await?;
    let third = Duration::from_secs(options.seconds / 3);
    // The step times are learned first.
    capacity(&client, &options, third / 4).await;
    let most = capacity(&client, &options, third).await;
    println!("capacity: {most:.1}/s with {} streams", options.streams);
    let done = offer(&client, &options, most, third, 0).await;
    let peak = show(&options, "at capacity", most, third, &done);

    let (stop, longest) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let (length, rate) = (Duration::from_secs(options.seconds), most * options.factor);
    let watched = async {
        while !stop.load(Ordering::Relaxed) {
            let queued = cluster.status().await?.queued_requests;
            longest.fetch_max(queued, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        anyhow::Ok(())
    };
    let offered = async {
        let done = offer(&client, &options, rate, length, 1 << 24).await;
        stop.store(true, Ordering::Relaxed);
        done
    };
    let (watched, done) = tokio::join!(watched, offered);
    watched?;
    let good = show(&options, "overload", rate, length, &done);
    println!(
        "goodput under overload is {:.1}% of its peak of {:.1}/s; the coordinator's queue held {} at most, {} allowed",
        100.0 * good / peak.max(most),
        peak.max(most),
        longest.load(Ordering::Relaxed),
        options.queue
    );
    Ok(())
}
