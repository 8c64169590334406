//! How much of a hand-over compute does not hide: prefill and decode nodes as processes of their own (in one process for the
//! memory transport), the real model, one request at a time, by transport and length of the prompt.
//!
//! Exposed is the time from the end of the step that drew the first token to the moment when the prefill node knew that
//! the decode node had committed: the decode node can compute the second token a little before that.

use anyhow::{Context, Result, ensure};
use baton_decode_node::DecodeRole;
use baton_node_host::{BringUpError, NodeOptions, Role, run_beside_others};
use baton_node_runtime::{Metrics, Supervisor};
use baton_prefill_node::PrefillRole;
use baton_tests::{Answer, Ask, Cluster, ClusterOptions, ask, model_path};
use baton_types::NodeRole;
use clap::Parser;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// Tokens of prompts come from here: past the special ones, within every real model's vocabulary.
const TOKENS: std::ops::Range<u64> = 1_000..30_000;

/// Measures the exposed part of hand-overs.
#[derive(Debug, Parser)]
struct Options {
    /// The model; without it the small one that the tests use
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Transports, each on a cluster of its own; memory puts both roles into one process
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', default_values_t = ["tcp".to_owned(), "shm".to_owned(), "memory".to_owned()])]
    transports: Vec<String>,
    /// Lengths of prompts
    #[arg(long, value_name = "TOKENS,...", value_delimiter = ',', default_values_t = [16, 64, 256, 1000, 4000])]
    prompts: Vec<usize>,
    /// Requests of each length, after one that does not count
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    repeat: usize,
    /// Compute threads of each node
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    threads: usize,
    /// Prompt tokens computed in one step
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    chunk_tokens: usize,
    /// Prints one line of JSON per transport and length
    #[arg(long)]
    json: bool,
}

/// One length on one transport.
#[derive(Debug, Serialize)]
struct Row {
    transport: String,
    prompt_tokens: usize,
    runs: usize,
    /// Median of the time to the first token at the client's door, milliseconds.
    ttft_ms: f64,
    /// Median, milliseconds.
    exposed_ms: f64,
    exposed_ms_min: f64,
    exposed_ms_max: f64,
    /// Median of each request's share.
    exposed_of_ttft: f64,
    bytes: u64,
    /// As the whole hand-over would need if it took the exposed time alone: above what the wire can do, it was hidden.
    exposed_gb_per_s: f64,
}

/// Where a transport is measured.
enum Place {
    Processes(Cluster),
    OneProcess {
        cluster: Cluster,
        supervisor: Supervisor,
        roles: JoinSet<Result<(), BringUpError>>,
    },
}

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    node: NodeOptions,
}

impl Place {
    async fn start(options: &Options, transport: &str) -> Result<Self> {
        let model = options.model.clone().unwrap_or_else(model_path).display().to_string();
        let (threads, chunk) = (options.threads.to_string(), options.chunk_tokens.to_string());
        let flags = [
            "--threads",
            &threads,
            "--chunk-tokens",
            &chunk,
            "--transports",
            transport,
        ];
        if transport != "memory" {
            let cluster = Cluster::start(ClusterOptions::pair(&model).node_flags(&flags)).await?;
            return Ok(Self::Processes(cluster));
        }
        let mut cluster = Cluster::coordinator_alone(ClusterOptions::pair(&model)).await?;
        let (supervisor, mut roles) = (Supervisor::new(), JoinSet::new());
        let store = cluster.store()?;
        for role in [NodeRole::Prefill, NodeRole::Decode] {
            let name = role.to_string();
            let words = [
                "node",
                "--model",
                &model,
                "--node-id",
                &name,
                "--store",
                &store,
                "--kv-bytes",
                "256MiB",
            ];
            let node = Flags::try_parse_from(words.iter().chain(&flags))?.node;
            let make = move |host| -> Arc<dyn Role> {
                match role {
                    NodeRole::Prefill => Arc::new(PrefillRole::new(host)),
                    NodeRole::Decode => Arc::new(DecodeRole::new(host)),
                }
            };
            roles.spawn(run_beside_others(
                node,
                role,
                make,
                Metrics::detached(),
                supervisor.clone(),
            ));
        }
        cluster.foreign = 2;
        cluster.wait_listed().await?;
        Ok(Self::OneProcess {
            cluster,
            supervisor,
            roles,
        })
    }

    fn cluster(&self) -> &Cluster {
        match self {
            Self::Processes(cluster) | Self::OneProcess { cluster, .. } => cluster,
        }
    }

    async fn end(self) -> Result<()> {
        self.cluster().wait_idle(Duration::from_secs(30)).await?;
        if let Self::OneProcess {
            supervisor, mut roles, ..
        } = self
        {
            supervisor.begin_shutdown();
            while let Some(ended) = roles.join_next().await {
                ended??;
            }
        }
        Ok(())
    }
}

/// A prompt that no other one of this run begins like, so that nothing of it is in a cache.
fn prompt(seed: u64, tokens: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let token = TOKENS.start + (state >> 33) % (TOKENS.end - TOKENS.start);
        u32::try_from(token).expect("within a small range")
    };
    (0..tokens).map(|_| next()).collect()
}

/// The one in the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

async fn one(cluster: &Cluster, transport: &str, seed: u64, tokens: usize) -> Result<Answer> {
    let client = cluster.client().await?;
    let answer = ask(&client, &Ask::greedy_ids(prompt(seed, tokens), 2)).await??;
    let path = &answer.timeline.handover_path;
    ensure!(path == transport, "handed over by `{path}` instead of {transport}");
    Ok(answer)
}

async fn measure(options: &Options, place: &Place, transport: &str, tokens: usize, seed: &mut u64) -> Result<Row> {
    let mut answers = Vec::new();
    for run in 0..=options.repeat {
        *seed += 1;
        let answer = one(place.cluster(), transport, *seed, tokens).await;
        let answer = answer.with_context(|| format!("{transport}, {tokens} tokens\n{}", place.cluster().logs()))?;
        if run > 0 {
            answers.push(answer.timeline);
        }
    }
    let ms = |us: u64| us as f64 / 1e3;
    let exposed: Vec<f64> = answers.iter().map(|timeline| ms(timeline.exposed_us)).collect();
    let shares = answers.iter().map(|t| t.exposed_us as f64 / t.ttft_us.max(1) as f64);
    let bytes = answers.first().map_or(0, |timeline| timeline.handover_bytes);
    let exposed_ms = median(exposed.clone());
    Ok(Row {
        transport: transport.to_owned(),
        prompt_tokens: tokens,
        runs: answers.len(),
        ttft_ms: median(answers.iter().map(|timeline| ms(timeline.ttft_us)).collect()),
        exposed_ms,
        exposed_ms_min: exposed.iter().copied().fold(f64::INFINITY, f64::min),
        exposed_ms_max: exposed.iter().copied().fold(0.0, f64::max),
        exposed_of_ttft: median(shares.collect()),
        bytes,
        exposed_gb_per_s: bytes as f64 / exposed_ms.max(1e-3) / 1e6,
    })
}

fn show(row: &Row, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(row)?);
        return Ok(());
    }
    println!(
        "| {} | {} | {:.1} | {:.2} ({:.2} to {:.2}) | {:.2}% | {:.1} | {:.1} |",
        row.transport,
        row.prompt_tokens,
        row.ttft_ms,
        row.exposed_ms,
        row.exposed_ms_min,
        row.exposed_ms_max,
        100.0 * row.exposed_of_ttft,
        row.bytes as f64 / f64::from(1 << 20),
        row.exposed_gb_per_s,
    );
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    if !options.json {
        println!(
            "| transport | prompt tokens | TTFT, ms | exposed, ms (range) | of TTFT | MiB | GB/s if only exposed |"
        );
        println!("|---|---|---|---|---|---|---|");
    }
    let mut seed = 0;
    for transport in &options.transports {
        let place = Place::start(&options, transport).await?;
        for tokens in &options.prompts {
            show(
                &measure(&options, &place, transport, *tokens, &mut seed).await?,
                options.json,
            )?;
        }
        place.end().await?;
    }
    Ok(())
}
