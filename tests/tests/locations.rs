//! The coordinator knows which node holds which blocks, and forgets a node's blocks with its lease.

use anyhow::{Context, Result};
use baton_tests::{Ask, Cluster, ClusterOptions, Process, ask, http_get, until};
use std::time::Duration;

async fn metric(of: &Process, name: &str) -> Option<f64> {
    let admin = of.announcement.admin.as_deref()?;
    let (_, page) = http_get(&format!("http://{admin}"), "/metrics").await.ok()?;
    let line = page.lines().find(|line| line.split(' ').next() == Some(name))?;
    line.split(' ').nth(1)?.trim().parse().ok()
}

async fn until_indexed(cluster: &Cluster, wanted: f64) -> Result<()> {
    let name = "baton_coordinator_indexed_blocks";
    let what = format!("{wanted} locations");
    until(&what, Duration::from_secs(30), || async {
        (metric(&cluster.coordinator, name).await? == wanted).then_some(())
    })
    .await
    .with_context(|| cluster.logs())
}

#[tokio::test(flavor = "multi_thread")]
async fn locations_are_known_and_go_with_the_lease() -> Result<()> {
    let options = ClusterOptions::pair("stub")
        .node_flags(&["--lease-ttl", "2s"])
        .always_handed_over();
    let mut cluster = Cluster::start(options).await?;
    let client = cluster.client().await?;
    let prompt = |seed: u32| (0..64).map(|at| 1 + (at * 7 + seed) % 200).collect();
    // Four full blocks on either node.
    ask(&client, &Ask::greedy_ids(prompt(0), 2)).await??;
    until_indexed(&cluster, 8.0).await?;
    ask(&client, &Ask::greedy_ids(prompt(1), 2)).await??;
    until_indexed(&cluster, 16.0).await?;
    let again = ask(&client, &Ask::greedy_ids(prompt(0), 2)).await??;
    assert_eq!((again.usage.cached_tokens, again.timeline.held_tokens), (48, 64));
    let measured = metric(
        &cluster.coordinator,
        "baton_coordinator_location_staleness_seconds_count",
    )
    .await;
    assert!(measured.is_some_and(|count| count >= 2.0), "{measured:?}");
    cluster.prefill[0].kill().await?;
    until_indexed(&cluster, 8.0).await
}
