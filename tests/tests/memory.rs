//! A coordinator's memory after many requests is what it was after some: 15,000 of them here, a million where
//! `BATON_TEST_LONG=1`.

use anyhow::{Context, Result, ensure};
use baton_tests::{Ask, Cluster, ClusterOptions, ask, long_campaign};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::task::JoinSet;

const STREAMS: usize = 16;
const TOKENS: u32 = 4;
/// What may come on top: pools and tables that grow in steps. A request that left 1 KiB behind would leave 11 MiB.
const GROWTH_MAX_KIB: u64 = 8 * 1024;

fn resident_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("VmRSS")?.parse()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_does_not_grow_with_the_requests_it_has_served() -> Result<()> {
    let requests = if long_campaign() { 1_000_000 } else { 15_000 };
    // The log of decisions is full after a quarter, so that it is no growth.
    let first = requests / 4;
    let options = ClusterOptions {
        kv_bytes: "16MiB".into(),
        coordinator_flags: ["--decisions-max", "1024"].map(String::from).to_vec(),
        ..ClusterOptions::colocated("stub")
    };
    let cluster = Cluster::start(options.node_flags(&["--queue", "256"])).await?;
    let pid = cluster.coordinator.pid();
    let number = Arc::new(AtomicU64::new(0));
    let mut after_first = 0;
    for end in [first, requests] {
        let mut streams = JoinSet::new();
        for _ in 0..STREAMS {
            let (client, number) = (cluster.client().await?, Arc::clone(&number));
            streams.spawn(async move {
                loop {
                    let next = number.fetch_add(1, Ordering::Relaxed);
                    if next >= end {
                        return anyhow::Ok(());
                    }
                    let ids = (0..32).map(|i| (next as u32 + i * 31) % 250).collect();
                    ask(&client, &Ask::greedy_ids(ids, TOKENS)).await??;
                }
            });
        }
        while let Some(stream) = streams.join_next().await {
            stream??;
        }
        if end == first {
            after_first = resident_kib(pid)?;
        }
    }
    let at_end = resident_kib(pid)?;
    println!("coordinator: {after_first} KiB after {first} requests, {at_end} KiB after {requests}");
    ensure!(
        at_end <= after_first + GROWTH_MAX_KIB,
        "{after_first} KiB after {first} requests, {at_end} KiB after {requests}"
    );
    Ok(())
}
