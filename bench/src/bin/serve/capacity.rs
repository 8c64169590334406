//! How many streams a second a coordinator carries, and what it adds at half of that. The nodes' engine costs nothing, so
//! that all of the time is the coordinator's, the nodes' doors' and this program's, on the same cores.

use crate::client::{Done, at, cpu, ms, resident, send};
use anyhow::{Result, ensure};
use baton_load::mix;
use baton_proto::v1::inference_client::InferenceClient;
use baton_tests::{Ask, Cluster, ClusterOptions};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tonic::transport::Channel;

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Decode nodes; there are no prefill nodes
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    nodes: usize,
    /// Streams at a time while the capacity is measured
    #[arg(long, value_name = "COUNT", default_value_t = 64)]
    streams: usize,
    /// Tokens of each answer
    #[arg(long, value_name = "COUNT", default_value_t = 64)]
    tokens: u32,
    /// Length of each round
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    seconds: u64,
    /// Rounds of (capacity, latency)
    #[arg(long, value_name = "COUNT", default_value_t = 3)]
    rounds: usize,
    /// Requests per second while the latency is measured
    #[arg(long, value_name = "RATE", default_value_t = 500.0)]
    rate: f64,
    /// Instead: so many requests, and the coordinator's resident memory after every tenth of them
    #[arg(long, value_name = "COUNT")]
    memory: Option<u64>,
}

fn request(number: u64, tokens: u32) -> Ask {
    let ids = (0..32).map(|i| (mix(number * 32 + i) % 250) as u32).collect();
    Ask::greedy_ids(ids, tokens)
}

/// So many streams at a time until `stop` says so; gives how many were answered.
async fn closed_loop(
    client: &InferenceClient<Channel>,
    options: &Options,
    stop: impl Fn(u64) -> bool + Clone + Send + 'static,
) -> Result<u64> {
    let number = Arc::new(AtomicU64::new(0));
    let mut streams = JoinSet::new();
    for _ in 0..options.streams {
        let (client, number, tokens, stop) = (client.clone(), Arc::clone(&number), options.tokens, stop.clone());
        streams.spawn(async move {
            let mut answered = 0;
            loop {
                let next = number.fetch_add(1, Ordering::Relaxed);
                if stop(next) {
                    return anyhow::Ok(answered);
                }
                let done = send(client.clone(), request(next, tokens)).await;
                ensure!(done.tokens == tokens, "{done:?}");
                answered += 1;
            }
        });
    }
    let mut answered = 0;
    while let Some(stream) = streams.join_next().await {
        answered += stream??;
    }
    Ok(answered)
}

/// Requests at a fixed rate, whatever becomes of those before.
async fn open_loop(client: &InferenceClient<Channel>, options: &Options) -> Result<Vec<Done>> {
    let mut running = JoinSet::new();
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / options.rate));
    let count = (options.rate * options.seconds as f64) as u64;
    for number in 0..count {
        ticks.tick().await;
        running.spawn(send(client.clone(), request(number, options.tokens)));
    }
    let done = running.join_all().await;
    let failed = done.iter().find(|done| done.tokens != options.tokens);
    ensure!(failed.is_none(), "{failed:?}");
    Ok(done)
}

/// Runs it.
pub async fn run(options: Options) -> Result<()> {
    let cluster = ClusterOptions {
        decode: options.nodes,
        kv_bytes: "64MiB".into(),
        ..ClusterOptions::colocated("stub")
    };
    let cluster = Cluster::start(cluster.node_flags(&["--queue", "256"])).await?;
    let client = cluster.client().await?;
    if let Some(requests) = options.memory {
        return memory(&cluster, &client, &options, requests).await;
    }
    let warm = Instant::now() + Duration::from_secs(2);
    closed_loop(&client, &options, move |_| Instant::now() > warm).await?;
    let pids = |cluster: &Cluster| -> Vec<u32> {
        let nodes = cluster.decode.iter().map(|node| node.pid());
        [cluster.coordinator.pid(), std::process::id()]
            .into_iter()
            .chain(nodes)
            .collect()
    };
    for round in 0..options.rounds {
        let before: Vec<Duration> = pids(&cluster).into_iter().map(cpu).collect::<Result<_>>()?;
        let (begun, length) = (Instant::now(), Duration::from_secs(options.seconds));
        let answered = closed_loop(&client, &options, move |_| begun.elapsed() > length).await?;
        let rate = answered as f64 / begun.elapsed().as_secs_f64();
        let after: Vec<Duration> = pids(&cluster).into_iter().map(cpu).collect::<Result<_>>()?;
        let spent = |at: usize| (after[at] - before[at]).as_secs_f64() * 1e6 / answered as f64;
        let nodes: f64 = (2..after.len()).map(spent).sum();
        println!(
            "round {round}: {rate:.0} requests/s of {} tokens with {} streams; CPU us per request: coordinator {:.0}, nodes {nodes:.0}, this program {:.0}",
            options.tokens,
            options.streams,
            spent(0),
            spent(1)
        );
        let done = open_loop(&client, &options).await?;
        let first = |share| ms(at(done.iter().filter_map(|done| done.first), share));
        let end = |share| ms(at(done.iter().map(|done| done.end), share));
        println!(
            "round {round}: at {:.0} requests/s, ms: first token p50 {:.2} p99 {:.2}, end of stream p50 {:.2} p99 {:.2}",
            options.rate,
            first(0.5),
            first(0.99),
            end(0.5),
            end(0.99)
        );
    }
    Ok(())
}

async fn memory(cluster: &Cluster, client: &InferenceClient<Channel>, options: &Options, requests: u64) -> Result<()> {
    let begun = Instant::now();
    for tenth in 1..=10 {
        let part = requests / 10;
        closed_loop(client, options, move |next| next >= part).await?;
        let resident = resident(cluster.coordinator.pid())? as f64 / f64::from(1 << 20);
        println!(
            "{} requests after {:.0} s: coordinator {resident:.1} MiB",
            part * tenth,
            begun.elapsed().as_secs_f64()
        );
    }
    Ok(())
}
