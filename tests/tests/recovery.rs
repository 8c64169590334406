//! Each row of the design's table of failures, on one standing cluster of real processes, a real etcd and the real model:
//! two prefill and two decode nodes, of each one in a network namespace of its own, eight concurrent streams, a fault at a
//! random moment. Every token that any client got is the fault-free run's; where a healthy pair is left, no request fails.
//!
//! 2 repetitions a row, 20 with `BATON_TEST_LONG=1`; `BATON_SEED=n` makes the moments the same again; `BATON_ROWS=a,b` takes
//! some rows only. Prints how long streams paused.

use anyhow::{Context, Result, bail, ensure};
use baton_tests::netns::{self, HERE, Place, Wire};
use baton_tests::{
    Ask, Cluster, ClusterOptions, Etcd, Store, ask, follow, long_campaign, model_path, prompts, retryable,
};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::task::JoinSet;
use tonic::Code;

const STREAMS: usize = 8;
const TOKENS: u32 = 32;
/// Taken by turns, and more than the caches hold, so that they do not spare every hand-over.
const SETS: usize = 6;
const KV_BYTES: &str = "32MiB";
/// How often a fault that met no running stream is made again.
const STRIKES_MAX: usize = 6;
/// An end that no repetition may pass: whatever is still running then hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// Streams of a dead coordinator, and requests past their deadline, end within this.
const SOON: Duration = Duration::from_secs(5);
const RETURN: Duration = Duration::from_secs(20);
/// Each node has its key in etcd again, so that a newcomer finds them all.
const RETURN_OF_KEYS: Duration = Duration::from_secs(10);

/// What must become of the streams.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// All are answered.
    Answered,
    /// All that were not yet answered end with a retryable error, soon.
    Unavailable,
    /// Those whose clients stay are answered.
    Left,
    /// All end soon after their deadline, answered or with `DEADLINE_EXCEEDED`.
    Deadline,
}

const ROWS: [(&str, Outcome); 15] = [
    ("prefill-killed", Outcome::Answered),
    ("prefill-stopped", Outcome::Answered),
    ("prefill-cut", Outcome::Answered),
    ("handover-cut", Outcome::Answered),
    ("handover-slow", Outcome::Answered),
    ("decode-killed", Outcome::Answered),
    ("decode-stopped", Outcome::Answered),
    ("decode-cut", Outcome::Answered),
    ("client-gone", Outcome::Left),
    ("deadline", Outcome::Deadline),
    ("etcd-killed", Outcome::Answered),
    ("etcd-stopped", Outcome::Answered),
    ("etcd-wiped", Outcome::Answered),
    ("node-drained", Outcome::Answered),
    ("coordinator-killed", Outcome::Unavailable),
];

/// A small generator of numbers for moments: nothing depends on its quality.
struct Moments {
    state: u64,
    window_ms: u64,
}

impl Moments {
    /// The next one, milliseconds.
    fn next(&mut self) -> u64 {
        let state = self.state.wrapping_mul(6_364_136_223_846_793_005);
        self.state = state.wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) % self.window_ms
    }

    fn earlier(&mut self) {
        self.window_ms = (self.window_ms / 2).max(1);
    }
}

struct Bench {
    etcd: Etcd,
    cluster: Cluster,
    /// Of prefill-1 and decode-1.
    places: [Place; 2],
    sets: Vec<Vec<(Ask, Vec<u32>)>>,
    /// The moment of a fault is drawn from so many milliseconds after the streams began: what they take without one.
    window_ms: u64,
}

impl Bench {
    async fn start() -> Result<Self> {
        netns::prepare_here()?;
        let places = [Place::new(1)?, Place::new(2)?];
        let etcd = Etcd::start_on(&HERE.address(Wire::Control)).await?;
        let [prefill, decode] = places;
        let nodes = [
            ("prefill-0", HERE),
            ("prefill-1", prefill),
            ("decode-0", HERE),
            ("decode-1", decode),
        ];
        let options = ClusterOptions {
            prefill: 2,
            decode: 2,
            store: Store::Etcd(etcd.store()),
            kv_bytes: KV_BYTES.into(),
            places: nodes.map(|(name, place)| (name.to_owned(), place)).to_vec(),
            ..ClusterOptions::pair(model_path().display().to_string())
        };
        // Where two are on one machine they would use its memory, and no wire.
        let options = options.node_flags(&["--threads", "1", "--transports", "tcp"]);
        let mut bench = Self {
            etcd,
            cluster: Cluster::start(options).await?,
            places,
            sets: Vec::new(),
            window_ms: 0,
        };
        let client = bench.cluster.client().await?;
        for set in 0..SETS {
            let mut asks = Vec::new();
            for index in 0..STREAMS {
                let request = request(set, index);
                let answer = ask(&client, &request).await??;
                asks.push((request, answer.tokens));
            }
            bench.sets.push(asks);
        }
        let begun = Instant::now();
        let mut together = JoinSet::new();
        for (request, _) in &bench.sets[0] {
            let (client, request) = (client.clone(), request.clone());
            together.spawn(async move { ask(&client, &request).await });
        }
        while let Some(answer) = together.join_next().await {
            answer???;
        }
        bench.window_ms = begun.elapsed().as_millis() as u64;
        println!("without a fault the streams take {} ms", bench.window_ms);
        Ok(bench)
    }

    async fn strike(&mut self, row: &str) -> Result<()> {
        let [prefill, decode] = self.places;
        match row {
            "prefill-killed" => self.cluster.prefill[0].kill().await,
            "prefill-stopped" => self.cluster.prefill[0].signal("STOP").await,
            "prefill-cut" => Wire::ALL.iter().try_for_each(|wire| prefill.cut(*wire, true)),
            "handover-cut" => decode.cut(Wire::Handover, true),
            "handover-slow" => decode.slow(Wire::Handover, Some("20mbit")),
            "decode-killed" => self.cluster.decode[0].kill().await,
            "decode-stopped" => self.cluster.decode[0].signal("STOP").await,
            "decode-cut" => Wire::ALL.iter().try_for_each(|wire| decode.cut(*wire, true)),
            "client-gone" | "deadline" => Ok(()),
            "etcd-killed" => self.etcd.kill().await,
            "etcd-stopped" => signal(self.etcd.pid(), "STOP").await,
            "etcd-wiped" => self.etcd.restart(true).await,
            "node-drained" => self.cluster.decode[0].signal("TERM").await,
            "coordinator-killed" => self.cluster.coordinator.kill().await,
            _ => bail!("no row {row}"),
        }
    }

    async fn heal(&mut self, row: &str) -> Result<()> {
        let [prefill, decode] = self.places;
        match row {
            "prefill-killed" => self.cluster.restart("prefill", 0).await,
            "prefill-stopped" => self.cluster.prefill[0].signal("CONT").await,
            "prefill-cut" => Wire::ALL.iter().try_for_each(|wire| prefill.cut(*wire, false)),
            "handover-cut" => decode.cut(Wire::Handover, false),
            "handover-slow" => decode.slow(Wire::Handover, None),
            "decode-killed" | "node-drained" => self.cluster.restart("decode", 0).await,
            "decode-stopped" => self.cluster.decode[0].signal("CONT").await,
            "decode-cut" => Wire::ALL.iter().try_for_each(|wire| decode.cut(*wire, false)),
            "etcd-killed" => self.etcd.restart(false).await,
            "etcd-stopped" => signal(self.etcd.pid(), "CONT").await,
            "coordinator-killed" => self.cluster.restart_coordinator().await,
            _ => Ok(()),
        }
    }

    /// One repetition of a row; how long each stream that went on paused at most after the fault.
    async fn repetition(
        &mut self,
        row: &str,
        outcome: Outcome,
        set: usize,
        moments: &mut Moments,
    ) -> Result<Vec<Duration>> {
        let client = self.cluster.client().await?;
        let mut running = JoinSet::new();
        let deadline = 300 + moments.next();
        let begun = Instant::now();
        for (index, (request, _)) in self.sets[set].iter().enumerate() {
            let (client, mut request) = (client.clone(), request.clone());
            if outcome == Outcome::Deadline {
                request.request.timeout_ms = Some(deadline);
            }
            let leaves = (outcome == Outcome::Left && index % 2 == 1).then(|| Duration::from_millis(moments.next()));
            running.spawn(async move {
                match leaves {
                    None => follow(&client, &request).await.map(|followed| (index, Some(followed))),
                    Some(after) => match tokio::time::timeout(after, follow(&client, &request)).await {
                        Ok(followed) => followed.map(|followed| (index, Some(followed))),
                        Err(_) => Ok((index, None)),
                    },
                }
            });
        }
        // The moment of the fault, not a wait for something.
        tokio::time::sleep(Duration::from_millis(moments.next())).await;
        let struck = Instant::now();
        self.strike(row).await.with_context(|| format!("strike {row}"))?;
        let mut pauses = Vec::new();
        let all = async {
            while let Some(ended) = running.join_next().await {
                let (index, followed) = ended??;
                let Some(followed) = followed else { continue };
                let reference = &self.sets[set][index].1;
                let same = match &followed.end {
                    Ok(()) => followed.answer.tokens == *reference,
                    Err(_) => reference.starts_with(&followed.answer.tokens),
                };
                ensure!(same, "stream {index} differs from the fault-free run");
                match (&followed.end, outcome) {
                    (Ok(()), _) => {}
                    (Err(status), Outcome::Unavailable) => {
                        ensure!(
                            retryable(status),
                            "stream {index} ended with {status:?}, which is not retryable"
                        );
                        let took = followed.ended.saturating_duration_since(struck);
                        ensure!(took < SOON, "stream {index} took {took:?} to end");
                    }
                    (Err(status), Outcome::Deadline) => {
                        ensure!(
                            status.code() == Code::DeadlineExceeded,
                            "stream {index} ended with {status:?}"
                        );
                        let took = followed.ended.saturating_duration_since(begun);
                        ensure!(
                            took < Duration::from_millis(deadline) + SOON,
                            "stream {index} took {took:?} to end"
                        );
                    }
                    (Err(status), _) => bail!("stream {index} failed: {status:?}"),
                }
                let times = followed
                    .answer
                    .arrivals
                    .iter()
                    .map(|(time, _)| *time)
                    .chain([followed.ended]);
                let later: Vec<Instant> = times.filter(|time| *time >= struck).collect();
                let gaps = std::iter::once(struck).chain(later.iter().copied()).zip(&later);
                pauses.extend(gaps.map(|(from, to)| to.saturating_duration_since(from)).max());
            }
            Ok(())
        };
        tokio::time::timeout(LIMIT, all).await.context("a stream hangs")??;
        self.heal(row).await.with_context(|| format!("heal {row}"))?;
        self.cluster.wait_listed().await?;
        self.cluster.wait_idle(RETURN).await?;
        if row.starts_with("etcd") {
            self.etcd.wait_registered(4, RETURN_OF_KEYS).await?;
        }
        Ok(pauses)
    }
}

async fn signal(pid: Option<u32>, name: &str) -> Result<()> {
    let pid = pid.context("it has ended")?.to_string();
    let status = tokio::process::Command::new("kill")
        .args(["-s", name, &pid])
        .status()
        .await?;
    ensure!(status.success(), "kill -s {name} {pid} failed");
    Ok(())
}

/// Texts of different lengths, each with a beginning of its own.
fn request(set: usize, index: usize) -> Ask {
    let texts = prompts();
    let text = &texts[(set * STREAMS + index) % texts.len()].text;
    let body: String = text.chars().take(200 + 60 * index).collect();
    Ask::greedy(&format!("Note {set}.{index}. {body}"), TOKENS)
}

fn percentile(sorted: &[Duration], share: f64) -> Duration {
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((last as f64 * share).round() as usize)
        .copied()
        .unwrap_or_default()
}

#[test]
fn each_failure_ends_as_the_design_says() -> Result<()> {
    if let Err(error) = netns::enter("each_failure_ends_as_the_design_says") {
        // Aloud: the machine cannot do it, which is no proof that the code can.
        eprintln!("SKIPPED, failures are not tested on this machine: {error:#}");
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(all_rows())
}

async fn all_rows() -> Result<()> {
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |since| since.as_millis() as u64)
    };
    let seed = std::env::var("BATON_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(now);
    let only = std::env::var("BATON_ROWS").ok();
    let repetitions = if long_campaign() { 20 } else { 2 };
    println!("seed {seed}, {repetitions} repetitions a row");
    let mut bench = Bench::start().await?;
    let mut set = 0;
    for (row, outcome) in ROWS {
        if only
            .as_ref()
            .is_some_and(|only| !only.split(',').any(|name| name == row))
        {
            continue;
        }
        let mut pauses = Vec::new();
        let begun = Instant::now();
        for repetition in 0..repetitions {
            // Each repetition by itself can be made again.
            let mut moments = Moments {
                state: seed ^ (set as u64) << 32,
                window_ms: bench.window_ms,
            };
            let mut hit = Vec::new();
            // A fault after the last token shows nothing: again, earlier.
            for _ in 0..STRIKES_MAX {
                let done = bench.repetition(row, outcome, set % SETS, &mut moments).await;
                if let Err(error) = &done {
                    println!("{}", bench.cluster.logs());
                    bail!("{row}, repetition {repetition} of seed {seed}: {error:#}");
                }
                hit = done?;
                set += 1;
                if !hit.is_empty() {
                    break;
                }
                moments.earlier();
            }
            ensure!(
                !hit.is_empty(),
                "{row}: no stream ran at the moment of the fault, {STRIKES_MAX} times"
            );
            pauses.extend(hit);
        }
        pauses.sort();
        let (half, most) = (percentile(&pauses, 0.5), percentile(&pauses, 0.99));
        println!(
            "{row:20} {repetitions} times, {:5.1} s; longest pause of a stream after it: p50 {:5.0} ms, p99 {:5.0} ms",
            begun.elapsed().as_secs_f64(),
            half.as_secs_f64() * 1e3,
            most.as_secs_f64() * 1e3
        );
    }
    Ok(())
}
