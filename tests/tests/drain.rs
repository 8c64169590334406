//! Nodes that leave, and nodes that change their role, under load: every answer is the undisturbed one, token for token, and
//! a node that was told to leave ends with exit code 0.

use anyhow::{Result, ensure};
use baton_proto::v1;
use baton_tests::{
    Ask, Cluster, ClusterOptions, Leave, Streams, busy, leave_under_load, long_campaign, model_path, same_tokens, until,
};
use std::time::Duration;

const STREAMS: usize = 8;
/// A token takes 10 ms: a stream lasts as many hundredths of a second as it has tokens.
const MODEL: &str = "stub:prefill_us=500,decode_us=10000";
const LIMIT: Duration = Duration::from_secs(60);

/// Eight requests of unequal lengths.
fn asks(tokens: u32) -> Vec<Ask> {
    let ids = |index: usize| (0..100 + 40 * index).map(move |i| ((i * 7 + index * 13) % 200) as u32);
    (0..STREAMS)
        .map(|index| Ask::greedy_ids(ids(index).collect(), tokens))
        .collect()
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
async fn running_sequences_move_with_their_kv_when_their_node_leaves() -> Result<()> {
    for leave in [Leave::Drain, Leave::Sigterm] {
        let left = leave_under_load(ClusterOptions::pair(MODEL), &asks(400), STREAMS, leave).await?;
        println!("{leave:?}: {left:?}");
        ensure!(left.moved == STREAMS, "{leave:?}: not all were moved: {left:?}");
        ensure!(left.anew == 0, "{leave:?}: some were done anew: {left:?}");
    }
    Ok(())
}

/// The times are printed, and measured by `bench/src/bin/drain.rs`; what is judged here are the tokens.
#[tokio::test(flavor = "multi_thread")]
async fn a_real_model_goes_on_token_for_token() -> Result<()> {
    let model = model_path().display().to_string();
    // The stub's streams are left by SIGTERM in every run; these take 9 s each, so that none ends before the other node is there.
    let (leaves, runs): (&[Leave], _) = if long_campaign() {
        (&[Leave::Drain, Leave::Sigterm], 5)
    } else {
        (&[Leave::Drain], 1)
    };
    for leave in leaves {
        for _ in 0..runs {
            // Drafts end some answers before the node is told to leave.
            let flags = ["--threads", "1", "--speculation", "off"];
            let options = ClusterOptions::pair(&model).node_flags(&flags);
            let left = leave_under_load(options, &asks(400), STREAMS, *leave).await?;
            println!("{leave:?}: {left:?}");
            ensure!(left.moved == STREAMS, "{leave:?}: not all were moved: {left:?}");
        }
    }
    let options = ClusterOptions::pair(&model).node_flags(&["--threads", "1", "--speculation", "always"]);
    // With drafts the first may be through before the last has begun.
    let left = leave_under_load(options, &asks(400), 2, Leave::Drain).await?;
    println!("with drafts: {left:?}");
    ensure!(left.moved > 0, "none was moved with its drafts: {left:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_dies_while_sequences_move_to_it_costs_no_answer() -> Result<()> {
    let asks = asks(300);
    for delay_ms in [5, 150, 400] {
        let mut cluster = Cluster::start(ClusterOptions::pair(MODEL)).await?;
        let reference = Streams::start(&cluster, &asks).await?.finish().await?;
        // Heartbeats are late: until they say so, the node looks as busy as it was.
        cluster.wait_idle(LIMIT).await?;
        let running = Streams::start(&cluster, &asks).await?;
        busy(&cluster, "decode-0", STREAMS).await?;
        cluster.add("decode").await?;
        cluster.add("decode").await?;
        cluster.wait_listed().await?;
        cluster.admin().await?.drain(drain("decode-0", LIMIT)).await?;
        // Those that it took up already are done anew, the others go to the third node or stay.
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        cluster.decode[1].kill().await?;
        let answers = running.finish().await?;
        same_tokens(&answers, &reference)?;
        let anew = answers.iter().filter(|answer| answer.timeline.attempts > 1).count();
        println!("killed after {delay_ms} ms: {anew} of {STREAMS} were done anew");
        ensure!(cluster.decode[0].ended(LIMIT).await? == 0);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nobody_has_room_a_draining_node_goes_on_until_its_time_is_over() -> Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::pair(MODEL)).await?;
    let asks = asks(200);
    let reference = Streams::start(&cluster, &asks).await?.finish().await?;
    // Heartbeats are late: until they say so, the node looks as busy as it was.
    cluster.wait_idle(LIMIT).await?;
    let running = Streams::start(&cluster, &asks).await?;
    busy(&cluster, "decode-0", STREAMS).await?;
    let drained = cluster.admin().await?.drain(drain("decode-0", LIMIT)).await;
    drained?;
    // There is no other decode node: all end where they are, and the node leaves when they have.
    let answers = running.finish().await?;
    same_tokens(&answers, &reference)?;
    ensure!(answers.iter().all(|answer| answer.timeline.attempts == 1));
    ensure!(cluster.decode[0].ended(LIMIT).await? == 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_had_its_time_on_a_draining_node_is_done_anew_elsewhere() -> Result<()> {
    let options = ClusterOptions::pair(MODEL);
    let mut cluster = Cluster::start(options).await?;
    let asks = asks(200);
    let reference = Streams::start(&cluster, &asks).await?.finish().await?;
    // Heartbeats are late: until they say so, the node looks as busy as it was.
    cluster.wait_idle(LIMIT).await?;
    let running = Streams::start(&cluster, &asks).await?;
    busy(&cluster, "decode-0", STREAMS).await?;
    cluster.add("decode").await?;
    cluster.wait_listed().await?;
    cluster.admin().await?.drain(drain("decode-0", Duration::ZERO)).await?;
    same_tokens(&running.finish().await?, &reference)?;
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
    let asks = asks(200);
    let reference = Streams::start(&cluster, &asks).await?.finish().await?;
    // Heartbeats are late: until they say so, the node looks as busy as it was.
    cluster.wait_idle(LIMIT).await?;
    let before = ready_as(&cluster, "decode-1", v1::NodeRole::Decode).await?;
    let mut admin = cluster.admin().await?;

    for role in [v1::NodeRole::Prefill, v1::NodeRole::Decode] {
        let running = Streams::start(&cluster, &asks).await?;
        busy(&cluster, "decode-0", 1).await?;
        admin.set_role(set_role("decode-1", role)).await?;
        same_tokens(&running.finish().await?, &reference)?;
        let after = ready_as(&cluster, "decode-1", role).await?;
        ensure!(after.instance == before.instance, "it was started anew");
        // It serves in its new role: so many at once, and a second prefill node gets its share.
        let again = Streams::start(&cluster, &asks).await?;
        same_tokens(&again.finish().await?, &reference)?;
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
