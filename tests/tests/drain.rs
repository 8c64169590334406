//! Nodes that leave, and nodes that change their role, under load: every answer is the undisturbed one, token for token, and
//! a node that was told to leave ends with exit code 0.

use anyhow::{Context, Result, ensure};
use baton_proto::v1;
use baton_tests::{Answer, Ask, Cluster, ClusterOptions, ask, until};
use std::time::Duration;
use tokio::task::JoinSet;

const STREAMS: usize = 8;
const TOKENS: u32 = 100;
/// A token takes 10 ms: a stream lasts a second.
const MODEL: &str = "stub:prefill_us=500,decode_us=10000";
const LIMIT: Duration = Duration::from_secs(30);

fn request(index: usize) -> Ask {
    let ids = (0..100 + 40 * index)
        .map(|i| ((i * 7 + index * 13) % 200) as u32)
        .collect();
    Ask::greedy_ids(ids, TOKENS)
}

type Running = JoinSet<(usize, Result<Result<Answer, tonic::Status>>)>;

/// Eight streams on their way.
async fn start(cluster: &Cluster) -> Result<Running> {
    let client = cluster.client().await?;
    let mut running = JoinSet::new();
    for index in 0..STREAMS {
        let client = client.clone();
        running.spawn(async move { (index, ask(&client, &request(index)).await) });
    }
    Ok(running)
}

/// Each answer, in order of the requests.
async fn finish(mut running: Running) -> Result<Vec<Answer>> {
    let mut answers = vec![Answer::default(); running.len()];
    while let Some(done) = tokio::time::timeout(LIMIT, running.join_next()).await? {
        let (index, answer) = done?;
        answers[index] = answer?.with_context(|| format!("stream {index}"))?;
    }
    Ok(answers)
}

fn same(answers: &[Answer], reference: &[Answer]) -> Result<()> {
    for (index, (answer, reference)) in answers.iter().zip(reference).enumerate() {
        ensure!(
            answer.tokens == reference.tokens,
            "stream {index} differs from the undisturbed run"
        );
    }
    Ok(())
}

/// Waits until the node decodes for so many requests.
async fn busy(cluster: &Cluster, node: &str, requests: u32) -> Result<()> {
    until(&format!("{requests} requests run on {node}"), LIMIT, || async {
        let status = cluster.status().await.ok()?;
        let load = status.nodes.into_iter().find(|n| n.node_id == node)?.load?;
        (load.running_requests >= requests).then_some(())
    })
    .await
}

/// Waits until the node is ready in this role; gives what the status says of it.
async fn ready_as(cluster: &Cluster, node: &str, role: v1::NodeRole) -> Result<v1::NodeStatus> {
    until(&format!("{node} is a {role:?} node"), LIMIT, || async {
        let status = cluster.status().await.ok()?;
        let node = status.nodes.into_iter().find(|n| n.node_id == node)?;
        (node.role == role as i32 && node.state == "ready").then_some(node)
    })
    .await
}

fn drain(node: &str, deadline: Duration) -> v1::DrainRequest {
    v1::DrainRequest {
        node_id: node.into(),
        deadline_ms: u64::try_from(deadline.as_millis()).ok(),
    }
}

fn set_role(node: &str, role: v1::NodeRole) -> v1::SetRoleRequest {
    v1::SetRoleRequest {
        node_id: node.into(),
        role: role.into(),
        deadline_ms: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_had_its_time_on_a_draining_node_is_done_anew_elsewhere() -> Result<()> {
    let options = ClusterOptions::pair(MODEL);
    let mut cluster = Cluster::start(options).await?;
    let reference = finish(start(&cluster).await?).await?;
    let running = start(&cluster).await?;
    busy(&cluster, "decode-0", STREAMS as u32).await?;
    cluster.add("decode").await?;
    cluster.wait_listed().await?;
    cluster.admin().await?.drain(drain("decode-0", Duration::ZERO)).await?;
    same(&finish(running).await?, &reference)?;
    ensure!(cluster.decode[0].ended(LIMIT).await? == 0);
    cluster.decode.remove(0);
    cluster.wait_idle(LIMIT).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_changes_its_role_and_back_under_load() -> Result<()> {
    let options = ClusterOptions {
        decode: 2,
        ..ClusterOptions::pair(MODEL)
    };
    let cluster = Cluster::start(options).await?;
    let reference = finish(start(&cluster).await?).await?;
    let before = ready_as(&cluster, "decode-1", v1::NodeRole::Decode).await?;
    let mut admin = cluster.admin().await?;

    for role in [v1::NodeRole::Prefill, v1::NodeRole::Decode] {
        let running = start(&cluster).await?;
        busy(&cluster, "decode-0", 1).await?;
        admin.set_role(set_role("decode-1", role)).await?;
        same(&finish(running).await?, &reference)?;
        let after = ready_as(&cluster, "decode-1", role).await?;
        ensure!(after.instance == before.instance, "it was started anew");
        // It serves in its new role: so many at once, and a second prefill node gets its share.
        same(&finish(start(&cluster).await?).await?, &reference)?;
        cluster.wait_idle(LIMIT).await?;
    }

    let unknown = admin
        .set_role(set_role("decode-9", v1::NodeRole::Decode))
        .await
        .unwrap_err();
    ensure!(unknown.message().contains("there are: decode-0, decode-1"), "{unknown}");
    let unset = admin
        .set_role(set_role("decode-1", v1::NodeRole::Unspecified))
        .await
        .unwrap_err();
    ensure!(unset.message().contains("role is missing"), "{unset}");
    Ok(())
}
