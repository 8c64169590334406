//! Two hundred requests at once, a fifth of them cancelled at random: all others are answered, and nothing stays behind.

use anyhow::{Result, ensure};
use baton_proto::v1;
use baton_proto::v1::inference_client::InferenceClient;
use baton_tests::{Answer, Ask, Cluster, ClusterOptions, ask, stream_ask};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tonic::transport::Channel;

const REQUESTS: u64 = 200;
/// The first request of the burst after which everything is counted: others than those before it, which caches hold.
const MEASURED: u64 = 1_000;

/// splitmix64: which requests are cancelled, and when, is the same in every run.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn request(index: u64) -> Ask {
    let length = 1 + mix(index) % 600;
    let ids = (0..length).map(|i| (mix(index * 1000 + i) % 250) as u32).collect();
    Ask::greedy_ids(ids, 1 + (mix(index + 7) % 48) as u32)
}

fn process_figures(status: &v1::ClusterStatusResponse) -> Vec<(String, u32, u32)> {
    let figures = |name: &str, process: Option<v1::ProcessStatus>| {
        let process = process.unwrap_or_default();
        (name.to_owned(), process.tasks, process.open_files)
    };
    let nodes = status.nodes.iter();
    let mut all: Vec<_> = nodes
        .map(|node| figures(&node.node_id, node.load.as_ref().and_then(|load| load.process)))
        .collect();
    all.push(figures("coordinator", status.process));
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_at_once_with_a_fifth_cancelled_leave_nothing_behind() -> Result<()> {
    let options = ClusterOptions::pair("stub:prefill_us=20,decode_us=2000").node_flags(&["--queue", "256"]);
    let cluster = Cluster::start(options).await?;
    let client = cluster.client().await?;

    // One burst first: connections and pools that stay open are counted before the load, not as a leak after it.
    burst(&client, 0, &[]).await?;
    let alone: Vec<_> = answers_alone(&client, MEASURED, 4).await?;
    let before = process_figures(&cluster.wait_idle(Duration::from_secs(10)).await?);
    let answered = burst(&client, MEASURED, &alone).await?;
    let after = process_figures(&cluster.wait_idle(Duration::from_secs(20)).await?);
    for (before, after) in before.iter().zip(&after) {
        ensure!(
            after.1 <= before.1 + 2,
            "tasks leaked on {}: {} before, {} after",
            after.0,
            before.1,
            after.1
        );
        ensure!(
            after.2 <= before.2 + 4,
            "files leaked on {}: {} before, {} after",
            after.0,
            before.2,
            after.2
        );
    }
    println!(
        "{answered} answered, {} cancelled; (process, tasks, files) {before:?} then {after:?}",
        REQUESTS - answered
    );
    Ok(())
}

/// All at once, every fifth one cancelled; how many were answered, each of them whole.
async fn burst(client: &InferenceClient<Channel>, from: u64, alone: &[Answer]) -> Result<u64> {
    let mut running = JoinSet::new();
    for index in from..from + REQUESTS {
        let client = client.clone();
        running.spawn(async move {
            let ask_for = request(index);
            if !mix(index + 99).is_multiple_of(5) {
                return Ok((index, Some(ask(&client, &ask_for).await??)));
            }
            let mut stream = stream_ask(&client, &ask_for).await?;
            for _ in 0..mix(index + 5) % 6 {
                if stream.next().await.is_none() {
                    break;
                }
            }
            drop(stream);
            anyhow::Ok((index, None))
        });
    }
    let mut answered = 0;
    while let Some(done) = running.join_next().await {
        let (index, answer) = done??;
        let Some(answer) = answer else { continue };
        answered += 1;
        let wanted = request(index)
            .request
            .sampling
            .and_then(|sampling| sampling.max_tokens)
            .unwrap_or(0);
        ensure!(
            answer.tokens.len() == wanted as usize,
            "request {index}: {} of {wanted} tokens",
            answer.tokens.len()
        );
        if let Some(same) = alone.get((index - from) as usize) {
            ensure!(
                same.tokens == answer.tokens,
                "request {index} gave other tokens under load"
            );
        }
    }
    ensure!(answered > 140, "only {answered} requests were to be answered");
    Ok(answered)
}

async fn answers_alone(client: &InferenceClient<Channel>, from: u64, count: u64) -> Result<Vec<Answer>> {
    let mut answers = Vec::new();
    for index in from..from + count {
        answers.push(ask(client, &request(index)).await??);
    }
    Ok(answers)
}
