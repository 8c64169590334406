//! A trace of conversations, scaled down for a small cluster: each of its blocks of 512 tokens becomes one of 16, so that
//! lengths are 1/32 and the structure of shared prefixes is what it was. Arrivals that the trace puts on one moment of its
//! 3 s clock are spread evenly over these 3 s. Answers have the trace's length / 32, whatever their tokens.

use crate::client::{Done, at, ms, send};
use anyhow::{Context, Result, ensure};
use baton_load::mix;
use baton_tests::{Ask, Cluster, ClusterOptions};
use serde::Deserialize;
use std::collections::{HashMap, HashSet};
use std::io::BufRead;
use std::path::PathBuf;
use std::time::Duration;
use tokio::task::JoinSet;

/// The trace's tokens for one of ours.
const SCALE: usize = 32;
const BLOCK_TOKENS: usize = 16;
/// The trace's clock, milliseconds.
const CLOCK_MS: u64 = 3000;

/// What to replay.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A trace of Mooncake's form: JSON lines with timestamp, input_length, output_length, hash_ids
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Requests, from the trace's beginning
    #[arg(long, value_name = "COUNT", default_value_t = 300)]
    requests: usize,
    /// Policies to compare, in turns
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', default_values_t = ["round-robin".to_owned(), "predicted".to_owned()])]
    policies: Vec<String>,
    /// Runs of each
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    repeat: usize,
    /// Model of every node; the default stands for 800 prompt tokens per second and 10 ms per token
    #[arg(long, value_name = "MODEL", default_value = "stub:prefill_us=1250,decode_us=10000")]
    model: String,
    /// KV memory of every node
    #[arg(long, value_name = "BYTES", default_value = "256MiB")]
    kv_bytes: String,
    /// Prefill nodes, and as many decode nodes
    #[arg(long, value_name = "COUNT", default_value_t = 2)]
    pairs: usize,
    /// Of conversations with at least so many requests, all of them, in the order of the trace; 1 takes the trace as it is
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    turns_min: usize,
    /// Requests per second, evenly; without it they come when the trace says
    #[arg(long, value_name = "RATE")]
    rate: Option<f64>,
    /// Token ids are below it
    #[arg(long, value_name = "COUNT", default_value_t = 250)]
    vocab: u64,
}

#[derive(Deserialize)]
struct Row {
    timestamp: u64,
    input_length: usize,
    output_length: u32,
    hash_ids: Vec<u64>,
}

/// A request, and when it comes.
struct Arrival {
    after: Duration,
    prompt: Vec<u32>,
    tokens: u32,
}

fn prompt(row: &Row, vocab: u64) -> Vec<u32> {
    let token = |at: usize| {
        let block = row.hash_ids.get(at / BLOCK_TOKENS).copied().unwrap_or(u64::MAX);
        (mix(block << 8 | (at % BLOCK_TOKENS) as u64) % vocab) as u32
    };
    (0..(row.input_length / SCALE).max(1)).map(token).collect()
}

/// The first requests of whole conversations that have enough of them. A conversation is what has its second block in common:
/// the first is the same in the whole trace.
fn conversations(mut rows: Vec<Row>, turns_min: usize, requests: usize) -> Vec<Row> {
    if turns_min > 1 {
        let mut turns: HashMap<u64, usize> = HashMap::new();
        let (mut order, name) = (Vec::new(), |row: &Row| row.hash_ids.get(1).copied());
        for conversation in rows.iter().filter_map(name) {
            let turns = turns.entry(conversation).or_default();
            if *turns == 0 {
                order.push(conversation);
            }
            *turns += 1;
        }
        let mut left = requests;
        let mut fits = |conversation: &u64| {
            let turns = turns.get(conversation).copied().unwrap_or(0);
            let fits = turns >= turns_min && turns <= left;
            left -= if fits { turns } else { 0 };
            fits
        };
        let chosen: HashSet<u64> = order.into_iter().filter(|conversation| fits(conversation)).collect();
        rows.retain(|row| name(row).is_some_and(|conversation| chosen.contains(&conversation)));
    }
    rows.truncate(requests);
    rows
}

fn arrivals(options: &Options) -> Result<Vec<Arrival>> {
    let file = std::io::BufReader::new(std::fs::File::open(&options.trace).context("the trace")?);
    let rows: Vec<Row> = file
        .lines()
        .map(|line| Ok(serde_json::from_str(&line?)?))
        .collect::<Result<_>>()?;
    let rows = conversations(rows, options.turns_min, options.requests);
    let spread = |index: usize, row: &Row| {
        let same = |other: &&Row| other.timestamp / CLOCK_MS == row.timestamp / CLOCK_MS;
        let (before, all) = (
            rows[..index].iter().filter(same).count(),
            rows.iter().filter(same).count(),
        );
        let ms = (row.timestamp / CLOCK_MS * CLOCK_MS) as f64 + CLOCK_MS as f64 * before as f64 / all as f64;
        let seconds = options.rate.map_or(ms / 1e3, |rate| index as f64 / rate);
        Duration::from_secs_f64(seconds)
    };
    let arrival = |(index, row): (usize, &Row)| Arrival {
        after: spread(index, row),
        prompt: prompt(row, options.vocab),
        tokens: (row.output_length / SCALE as u32).max(1),
    };
    Ok(rows.iter().enumerate().map(arrival).collect())
}

async fn replay(options: &Options, policy: &str, arrivals: &[Arrival]) -> Result<Vec<Done>> {
    let cluster = ClusterOptions {
        prefill: options.pairs,
        decode: options.pairs,
        kv_bytes: options.kv_bytes.clone(),
        coordinator_flags: vec!["--routing-policy".into(), policy.to_owned()],
        ..ClusterOptions::pair(options.model.clone())
    };
    let cluster = Cluster::start(cluster.node_flags(&["--queue", "256", "--threads", "1"])).await?;
    let client = cluster.client().await?;
    let (begun, mut running) = (tokio::time::Instant::now(), JoinSet::new());
    for arrival in arrivals {
        tokio::time::sleep_until(begun + arrival.after).await;
        let ask = Ask::greedy_ids(arrival.prompt.clone(), arrival.tokens);
        running.spawn(send(client.clone(), ask));
    }
    let done = running.join_all().await;
    let failed = done.iter().find(|done| done.error.is_some());
    ensure!(failed.is_none(), "{failed:?}");
    Ok(done)
}

/// Runs it.
pub async fn run(options: Options) -> Result<()> {
    let arrivals = arrivals(&options)?;
    let prompt_tokens: usize = arrivals.iter().map(|arrival| arrival.prompt.len()).sum();
    let last = arrivals.last().map(|arrival| arrival.after).unwrap_or_default();
    println!(
        "{} requests over {:.0} s, {prompt_tokens} prompt tokens, {} tokens of answers, {}P+{}D of {}",
        arrivals.len(),
        last.as_secs_f64(),
        arrivals.iter().map(|arrival| arrival.tokens).sum::<u32>(),
        options.pairs,
        options.pairs,
        options.model
    );
    for _ in 0..options.repeat {
        for policy in &options.policies {
            let done = replay(&options, policy, &arrivals).await?;
            let computed: u64 = done.iter().map(|done| u64::from(done.timeline.prefill_tokens)).sum();
            let local = done
                .iter()
                .filter(|done| done.timeline.prefill_node == done.timeline.decode_node)
                .count();
            let first = |share| ms(at(done.iter().filter_map(|done| done.first), share));
            let end = |share| ms(at(done.iter().map(|done| done.end), share));
            println!(
                "{policy:12} prefill tokens {computed} ({:.1}% of all prompts'), on D alone {local} requests, TTFT ms p50 {:.0} p90 {:.0} p99 {:.0}, end ms p50 {:.0} p90 {:.0}",
                100.0 * computed as f64 / prompt_tokens as f64,
                first(0.5),
                first(0.9),
                first(0.99),
                end(0.5),
                end(0.9)
            );
        }
    }
    Ok(())
}
