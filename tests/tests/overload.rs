//! More requests at once than a cluster has places for: who is refused is told when to come back, the line never gets longer
//! than it may, and who was let in is answered. How fast, and how much of the peak remains, is measured by
//! `serve overload` in bench/.

use anyhow::{Result, ensure};
use baton_tests::{Ask, Cluster, ClusterOptions, ask};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;
use tonic::Code;

const REQUESTS: u32 = 120;
const QUEUE: u32 = 8;
const TOKENS: u32 = 8;

#[tokio::test(flavor = "multi_thread")]
async fn refusals_carry_a_hint_and_the_queue_keeps_to_its_bound() -> Result<()> {
    let options = ClusterOptions {
        coordinator_flags: ["--queue", "8", "--slo-ttft", "1s"].map(String::from).to_vec(),
        ..ClusterOptions::pair("stub:prefill_us=500,decode_us=5000")
    };
    let cluster = Cluster::start(options.node_flags(&["--queue", "2"])).await?;
    let client = cluster.client().await?;
    // What a node takes is learned first: a guess refuses nobody.
    ask(&client, &Ask::greedy_ids(vec![1; 100], TOKENS)).await??;

    let mut running = JoinSet::new();
    for number in 0..REQUESTS {
        let client = client.clone();
        let ids = (0..100).map(|i| (number * 7 + i) % 250).collect();
        running.spawn(async move { ask(&client, &Ask::greedy_ids(ids, TOKENS)).await });
    }
    let over = Arc::new(AtomicBool::new(false));
    let watched = async {
        let mut longest = 0;
        while !over.load(Ordering::Relaxed) {
            longest = longest.max(cluster.status().await?.queued_requests);
            tokio::task::yield_now().await;
        }
        anyhow::Ok(longest)
    };
    let answered = async {
        let done = running.join_all().await;
        over.store(true, Ordering::Relaxed);
        done
    };
    let (longest, done) = tokio::join!(watched, answered);
    let longest = longest?;
    ensure!(longest <= QUEUE, "{longest} requests waited, {QUEUE} may");
    let (mut served, mut refused) = (0, 0);
    for done in done {
        match done? {
            Ok(answer) => {
                served += 1;
                ensure!(answer.tokens.len() == TOKENS as usize, "{answer:?}");
            }
            Err(status) => {
                refused += 1;
                let hint = status.metadata().get("retry-after-ms");
                ensure!(status.code() == Code::ResourceExhausted && hint.is_some(), "{status:?}");
            }
        }
    }
    ensure!(served > 0 && refused > 0, "{served} served, {refused} refused");
    cluster.wait_idle(Duration::from_secs(10)).await?;
    Ok(())
}
