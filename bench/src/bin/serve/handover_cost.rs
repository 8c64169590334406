//! What the hand-over costs a request: the same prompt on a prefill and a decode node, and on one node that does both,
//! each phase with the same cores, by turns.

use crate::client::{Done, at, ms, send};
use anyhow::{Context, Result, ensure};
use baton_load::mix;
use baton_proto::v1::inference_client::InferenceClient;
use baton_tests::{Ask, Cluster, ClusterOptions, model_path};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;
use tonic::transport::Channel;

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The model; without it the small one that the tests use
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Tokens of each prompt; no two prompts begin alike
    #[arg(long, value_name = "TOKENS", default_value_t = 342)]
    prompt: u64,
    /// Tokens of each answer
    #[arg(long, value_name = "TOKENS", default_value_t = 24)]
    tokens: u32,
    /// Pairs: each starts both clusters anew and takes the median of three requests on each, after one that does not count
    #[arg(long, value_name = "COUNT", default_value_t = 20)]
    pairs: usize,
    /// Compute threads of each node
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    threads: usize,
    /// Prints one line of JSON instead of text
    #[arg(long)]
    json: bool,
}

/// Requests on each cluster of a pair that count.
const REQUESTS: u64 = 3;
/// Tokens of prompts come from here: past the special ones, within every real model's vocabulary.
const TOKENS: std::ops::Range<u64> = 1_000..30_000;

#[derive(Serialize)]
struct Report {
    prompt_tokens: u64,
    tokens: u32,
    pairs: usize,
    path: String,
    disaggregated_ms: f64,
    colocated_ms: f64,
    ttft_disaggregated_ms: f64,
    ttft_colocated_ms: f64,
    /// Median of the pairs' ratios of the whole time, and how far half of them lie from it.
    ratio: f64,
    ratio_quartiles: [f64; 2],
    exposed_ms: f64,
}

/// One cluster's turn.
struct Turn {
    whole: Duration,
    first: Duration,
    exposed: Duration,
    path: String,
}

fn request(seed: u64, options: &Options) -> Ask {
    let token = |i| u32::try_from(TOKENS.start + mix(seed << 20 | i) % (TOKENS.end - TOKENS.start));
    let ids = (0..options.prompt).map(|i| token(i).expect("a small range"));
    Ask::greedy_ids(ids.collect(), options.tokens)
}

async fn answered(client: &InferenceClient<Channel>, seed: u64, options: &Options) -> Result<Done> {
    let done = send(client.clone(), request(seed, options)).await;
    ensure!(done.tokens == options.tokens, "not answered: {:?}", done.error);
    Ok(done)
}

async fn turn(cluster: ClusterOptions, seed: u64, options: &Options) -> Result<Turn> {
    let cluster = Cluster::start(cluster).await?;
    let client = cluster.client().await?;
    let mut done = Vec::new();
    for number in 0..=REQUESTS {
        let one = answered(&client, seed * 16 + number, options).await;
        done.push(one.with_context(|| cluster.logs())?);
        cluster.wait_idle(Duration::from_secs(30)).await?;
    }
    done.remove(0);
    let path = done[0].timeline.handover_path.clone();
    ensure!(
        done.iter().all(|one| one.timeline.handover_path == path),
        "the requests took different ways"
    );
    let exposed = done.iter().map(|d| Duration::from_micros(d.timeline.exposed_us));
    Ok(Turn {
        whole: at(done.iter().map(|d| d.end), 0.5),
        first: at(done.iter().filter_map(|d| d.first), 0.5),
        exposed: at(exposed, 0.5),
        path,
    })
}

fn quantile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

/// Runs it.
pub async fn run(options: Options) -> Result<()> {
    ensure!(options.pairs > 0, "--pairs must be at least 1");
    let model = options.model.clone().unwrap_or_else(model_path).display().to_string();
    let threads = options.threads.to_string();
    let flags = ["--threads", &threads];
    let (mut apart, mut together) = (Vec::new(), Vec::new());
    for pair in 0..options.pairs {
        let seed = pair as u64;
        // Who begins changes from pair to pair, so that a machine that gets slower favours neither.
        let colocated = ClusterOptions::colocated(&model).node_flags(&flags);
        let disaggregated = ClusterOptions::pair(&model).node_flags(&flags);
        if pair % 2 == 0 {
            apart.push(turn(disaggregated, seed, &options).await?);
            together.push(turn(colocated, seed, &options).await?);
        } else {
            together.push(turn(colocated, seed, &options).await?);
            apart.push(turn(disaggregated, seed, &options).await?);
        }
        let (a, t) = (&apart[pair], &together[pair]);
        ensure!(
            !a.path.is_empty(),
            "the decode node prefilled by itself: nothing was handed over"
        );
        eprintln!(
            "pair {}: {:.1} ms by {}, colocated {:.1} ms",
            pair + 1,
            ms(a.whole),
            a.path,
            ms(t.whole)
        );
    }
    let pairs = apart.iter().zip(&together);
    let mut ratios: Vec<f64> = pairs
        .map(|(a, t)| a.whole.as_secs_f64() / t.whole.as_secs_f64())
        .collect();
    ratios.sort_by(f64::total_cmp);
    let middle = |turns: &[Turn], of: fn(&Turn) -> Duration| ms(at(turns.iter().map(of), 0.5));
    show(
        &Report {
            prompt_tokens: options.prompt,
            tokens: options.tokens,
            pairs: options.pairs,
            path: apart[0].path.clone(),
            disaggregated_ms: middle(&apart, |t| t.whole),
            colocated_ms: middle(&together, |t| t.whole),
            ttft_disaggregated_ms: middle(&apart, |t| t.first),
            ttft_colocated_ms: middle(&together, |t| t.first),
            ratio: quantile(&ratios, 0.5),
            ratio_quartiles: [quantile(&ratios, 0.25), quantile(&ratios, 0.75)],
            exposed_ms: middle(&apart, |t| t.exposed),
        },
        options.json,
    )
}

fn show(report: &Report, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(report)?);
        return Ok(());
    }
    let r = report;
    println!(
        "prompts of {} tokens, answers of {}, {} pairs",
        r.prompt_tokens, r.tokens, r.pairs
    );
    println!("| ms, median | handed over ({}) | colocated |", r.path);
    println!("|---|---|---|");
    println!(
        "| first token | {:.1} | {:.1} |",
        r.ttft_disaggregated_ms, r.ttft_colocated_ms
    );
    println!("| end | {:.1} | {:.1} |", r.disaggregated_ms, r.colocated_ms);
    let [low, high] = r.ratio_quartiles;
    println!(
        "ratio of the whole time {:.3} (half of the pairs within {low:.3} to {high:.3}), exposed {:.2} ms",
        r.ratio, r.exposed_ms
    );
    Ok(())
}
