//! Which transport a hand-over takes in a whole cluster: the fastest that both nodes have, or the required one, or none. The
//! real model, real processes; what happens when a path breaks is tested in `kv-transfer` and in the guest, where a link can
//! be cut.

use anyhow::{Context, Result, ensure};
use baton_proto::v1;
use baton_tests::{Ask, Cluster, ClusterOptions, ask, baton_binary, model_path, until};
use std::time::Duration;
use tokio::process::Command;

const PROMPTS: [&str; 3] = [
    "Why is the sky blue?",
    "List the planets of the solar system, the largest first, with one sentence about each of them.",
    "Name a colour.",
];

/// Greedy answers, and the path that each hand-over took.
async fn answers(cluster: &Cluster) -> Result<Vec<(Vec<u32>, String)>> {
    let client = cluster.client().await?;
    let mut answers = Vec::new();
    for prompt in PROMPTS {
        let answer = ask(&client, &Ask::greedy(prompt, 16)).await??;
        let timeline = answer.timeline;
        ensure!(timeline.handover_bytes > 0, "nothing was handed over: {timeline:?}");
        ensure!(timeline.handover_bytes_per_second > 0, "no speed: {timeline:?}");
        ensure!(timeline.path_fallbacks.is_empty(), "{timeline:?}");
        answers.push((answer.tokens, timeline.handover_path));
    }
    Ok(answers)
}

/// Waits until the prefill node's heartbeat shows the path with so many hand-overs sent.
async fn path_load(cluster: &Cluster, path: &str, sent: u64) -> Result<v1::PathLoad> {
    let load = until("the path in the status", Duration::from_secs(20), || async {
        let status = cluster.status().await.ok()?;
        let node = status.nodes.into_iter().find(|node| node.node_id == "prefill-0")?;
        let load = node.load?.paths.into_iter().find(|load| load.path == path)?;
        (load.sent == sent).then_some(load)
    });
    load.await.with_context(|| cluster.logs())
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_one_host_take_shared_memory_and_answer_as_over_tcp() -> Result<()> {
    let model = model_path().display().to_string();
    let shm = Cluster::start(ClusterOptions::pair(&model).always_handed_over()).await?;
    let over_shm = answers(&shm).await?;
    ensure!(
        over_shm.iter().all(|(_, path)| path == "shm"),
        "{over_shm:?}\n{}",
        shm.logs()
    );
    let load = path_load(&shm, "shm", PROMPTS.len() as u64).await?;
    ensure!(
        (load.open, load.down, load.failed, load.fallbacks) == (1, 0, 0, 0),
        "{load:?}"
    );
    shm.wait_idle(Duration::from_secs(20)).await?;
    drop(shm);
    let options = ClusterOptions::pair(&model).node_flags(&["--require-path", "tcp"]);
    let tcp = Cluster::start(options.always_handed_over()).await?;
    let over_tcp = answers(&tcp).await?;
    ensure!(over_tcp.iter().all(|(_, path)| path == "tcp"), "{over_tcp:?}");
    path_load(&tcp, "tcp", PROMPTS.len() as u64).await?;
    let tokens = |answers: &[(Vec<u32>, String)]| answers.iter().map(|(tokens, _)| tokens.clone()).collect::<Vec<_>>();
    ensure!(tokens(&over_shm) == tokens(&over_tcp), "{over_shm:?}\n{over_tcp:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_required_path_that_the_peer_lacks_fails_the_request_by_name() -> Result<()> {
    let mut cluster = Cluster::coordinator_alone(ClusterOptions::pair("stub")).await?;
    cluster.set_node_flags(&["--require-path", "shm"]);
    cluster.add("prefill").await?;
    cluster.set_node_flags(&["--transports", "tcp"]);
    cluster.add("decode").await?;
    cluster.wait_listed().await?;
    let status = ask(&cluster.client().await?, &Ask::greedy("hello", 4)).await?;
    let status = status
        .err()
        .context("it was answered over a path that is not allowed")?;
    ensure!(
        status.message().contains("no shm path") && status.message().contains("tcp://"),
        "{status:?}\n{}",
        cluster.logs()
    );
    cluster.wait_idle(Duration::from_secs(20)).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_the_required_transport_does_not_start() -> Result<()> {
    let cluster = Cluster::coordinator_alone(ClusterOptions::pair("stub")).await?;
    let store = cluster.store()?;
    let flags = [
        "node",
        "--role",
        "prefill",
        "--model",
        "stub",
        "--store",
        &store,
        "--require-path",
        "rdma",
    ];
    let run = Command::new(baton_binary()).args(flags).kill_on_drop(true).output();
    let output = match tokio::time::timeout(Duration::from_secs(15), run).await {
        Ok(output) => output?,
        Err(_) if std::path::Path::new("/sys/class/infiniband").exists() => {
            println!("SKIPPED: this host has an rdma device, and the node started");
            return Ok(());
        }
        Err(_) => anyhow::bail!("the node runs without the transport that it requires"),
    };
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && !said.contains("panicked"), "{said}");
    ensure!(said.contains("rdma"), "{said}");
    Ok(())
}
