//! kill -9 of each kind of process under load, one at a time, with a spare node: no hang; requests complete on the spare
//! or fail with a clear retryable error within 5 s; a restarted node rejoins by itself and serves.

use anyhow::{Result, ensure};
use baton_tests::{Answer, Ask, Cluster, ClusterOptions, Etcd, Store, ask, long_campaign, retryable, until};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

const STREAMS: usize = 8;
const TOKENS: u32 = 60;
const MODEL: &str = "stub:prefill_us=500,decode_us=10000";

fn request(index: usize) -> Ask {
    request_of(0, index)
}

/// One that no cache knows from another set.
fn request_of(set: usize, index: usize) -> Ask {
    let ids = (0..100 + 40 * index)
        .map(|i| ((i * 7 + index * 13 + set * 101) % 200) as u32)
        .collect();
    Ask::greedy_ids(ids, TOKENS)
}

struct Outcome {
    completed: usize,
    failed: usize,
}

/// As [`under_load_of`], with the first set of requests.
async fn under_load(
    cluster: &mut Cluster,
    reference: &[Answer],
    delay: Duration,
    strike: impl AsyncFnOnce(&mut Cluster) -> Result<()>,
) -> Result<Outcome> {
    under_load_of(0, cluster, reference, delay, strike).await
}

/// Runs eight streams, calls `strike` after `delay`, and judges every end: an answer equals the fault-free one, an error is
/// retryable and came within 5 s of the strike.
async fn under_load_of(
    set: usize,
    cluster: &mut Cluster,
    reference: &[Answer],
    delay: Duration,
    strike: impl AsyncFnOnce(&mut Cluster) -> Result<()>,
) -> Result<Outcome> {
    let client = cluster.client().await?;
    let mut running = JoinSet::new();
    for index in 0..STREAMS {
        let client = client.clone();
        running.spawn(async move { (index, ask(&client, &request_of(set, index)).await, Instant::now()) });
    }
    tokio::time::sleep(delay).await; // the moment of the fault, not a wait for something
    strike(cluster).await?;
    let struck = Instant::now();
    let mut outcome = Outcome {
        completed: 0,
        failed: 0,
    };
    while let Some(done) = tokio::time::timeout(Duration::from_secs(30), running.join_next()).await? {
        let (index, answer, at) = done?;
        match answer? {
            Ok(answer) => {
                ensure!(
                    answer.tokens == reference[index].tokens,
                    "stream {index} differs from the fault-free run"
                );
                outcome.completed += 1;
            }
            Err(status) => {
                let took = at.saturating_duration_since(struck);
                ensure!(
                    retryable(&status),
                    "stream {index} failed with {status:?}, which is not retryable"
                );
                ensure!(took < Duration::from_secs(5), "stream {index} took {took:?} to fail");
                ensure!(!status.message().is_empty(), "stream {index} failed without a message");
                outcome.failed += 1;
            }
        }
    }
    Ok(outcome)
}

async fn fault_free(cluster: &Cluster) -> Result<Vec<Answer>> {
    fault_free_of(0, cluster).await
}

async fn fault_free_of(set: usize, cluster: &Cluster) -> Result<Vec<Answer>> {
    let client = cluster.client().await?;
    let mut answers = Vec::new();
    for index in 0..STREAMS {
        answers.push(ask(&client, &request_of(set, index)).await??);
    }
    Ok(answers)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_node_costs_no_answer_and_rejoins() -> Result<()> {
    let options = ClusterOptions {
        prefill: 2,
        decode: 2,
        ..ClusterOptions::pair(MODEL)
    };
    let mut cluster = Cluster::start(options).await?;
    let reference = fault_free(&cluster).await?;
    for (role, delay_ms) in [("prefill", 30), ("prefill", 120), ("decode", 60), ("decode", 400)] {
        let strike = async |cluster: &mut Cluster| match role {
            "prefill" => cluster.prefill[0].kill().await,
            _ => cluster.decode[0].kill().await,
        };
        let outcome = under_load(&mut cluster, &reference, Duration::from_millis(delay_ms), strike).await?;
        println!(
            "{role} killed after {delay_ms} ms: {} completed, {} failed",
            outcome.completed, outcome.failed
        );
        ensure!(
            outcome.failed == 0,
            "a spare {role} node was there, yet {} failed",
            outcome.failed
        );
        cluster.restart(role, 0).await?;
        cluster.wait_listed().await?;
        let client = cluster.client().await?;
        ensure!(ask(&client, &request(0)).await??.tokens == reference[0].tokens);
        cluster.wait_idle(Duration::from_secs(20)).await?;
    }
    Ok(())
}

/// Nothing can keep a stopped process from writing later through the memory that it shares: what it was promised stays away
/// from everybody until it runs on, and that is never much.
#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_node_that_stands_still_over_shm_costs_no_answer_and_few_blocks() -> Result<()> {
    let repetitions = if long_campaign() { 20 } else { 2 };
    let mut references = Vec::new();
    {
        let undisturbed = Cluster::start(ClusterOptions::colocated(MODEL)).await?;
        for set in 1..=repetitions {
            references.push((set, fault_free_of(set, &undisturbed).await?));
        }
    }
    let options = ClusterOptions {
        prefill: 2,
        decode: 2,
        ..ClusterOptions::pair(MODEL)
    };
    let mut cluster = Cluster::start(options.node_flags(&["--transports", "shm"])).await?;
    for (set, reference) in references {
        let delay = Duration::from_millis((40 + set as u64 * 67) % 500);
        let strike = async |cluster: &mut Cluster| cluster.prefill[0].signal("STOP").await;
        let outcome = under_load_of(set, &mut cluster, &reference, delay, strike).await?;
        ensure!(
            outcome.failed == 0,
            "a spare prefill node was there, yet {} failed after {delay:?}",
            outcome.failed
        );
        let mut away = 0;
        for node in cluster.status().await?.nodes {
            let blocks = node.load.and_then(|load| load.blocks).unwrap_or_default();
            ensure!(
                blocks.quarantined <= blocks.total / 4,
                "{}: {blocks:?} while one writer stands still",
                node.node_id
            );
            away += blocks.quarantined;
        }
        cluster.prefill[0].signal("CONT").await?;
        cluster.wait_listed().await?;
        cluster.wait_idle(Duration::from_secs(20)).await?;
        println!("stopped after {delay:?}: {away} blocks in quarantine, all back");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_coordinator_frees_its_nodes_and_another_takes_over() -> Result<()> {
    let etcd = Etcd::start().await?;
    let options = ClusterOptions {
        store: Store::Etcd(etcd.store()),
        ..ClusterOptions::pair(MODEL)
    };
    let mut cluster = Cluster::start(options).await?;
    let reference = fault_free(&cluster).await?;
    let strike = async |cluster: &mut Cluster| cluster.coordinator.kill().await;
    let outcome = under_load(&mut cluster, &reference, Duration::from_millis(200), strike).await?;
    ensure!(
        outcome.failed == STREAMS,
        "streams of a dead coordinator cannot complete"
    );
    cluster.restart_coordinator().await?;
    cluster.wait_listed().await?;
    cluster.wait_idle(Duration::from_secs(10)).await?;
    ensure!(
        fault_free(&cluster)
            .await?
            .iter()
            .zip(&reference)
            .all(|(a, b)| a.tokens == b.tokens)
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_coordinator_with_its_own_store_leaves_nodes_that_wait_for_it() -> Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::pair(MODEL)).await?;
    let store = cluster.coordinator.announcement.store.clone().unwrap_or_default();
    let reference = fault_free(&cluster).await?;
    cluster.coordinator.kill().await?;
    cluster.set_coordinator_flags(&["--store-listen", &store]);
    cluster.restart_coordinator().await?;
    cluster.wait_listed().await?;
    ensure!(
        fault_free(&cluster)
            .await?
            .iter()
            .zip(&reference)
            .all(|(a, b)| a.tokens == b.tokens)
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_each_process_cleanly() -> Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::pair(MODEL)).await?;
    fault_free(&cluster).await?;
    let limit = Duration::from_secs(10);
    ensure!(cluster.decode[0].terminate(limit).await? == 0);
    let gone = until("the decode node is gone from the status", limit, || async {
        let status = cluster.status().await.ok()?;
        status
            .nodes
            .iter()
            .all(|node| node.state != "ready" || node.node_id != "decode-0")
            .then_some(())
    });
    gone.await?;
    ensure!(cluster.prefill[0].terminate(limit).await? == 0);
    ensure!(cluster.coordinator.terminate(limit).await? == 0);
    Ok(())
}
