//! A cluster on a real etcd that is killed, restarted and wiped under load: no request is harmed, members stay in use while
//! etcd is away, and every node is registered again within 10 s of its return.

use anyhow::{Context, Result, bail, ensure};
use baton_tests::{Answer, Ask, Cluster, ClusterOptions, Etcd, Store, ask, long_campaign, until};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;

const MODEL: &str = "stub:prefill_us=200,decode_us=3000";
const ASKERS: usize = 6;
const TOKENS: u32 = 40;
const RETURN: Duration = Duration::from_secs(10);

/// How long etcd is away, and a lease that it outlasts: the default one under `BATON_TEST_LONG=1`.
fn outage() -> (Duration, &'static str) {
    let (seconds, lease) = if long_campaign() { (60, "10s") } else { (5, "3s") };
    (Duration::from_secs(seconds), lease)
}

fn request(index: usize) -> Ask {
    let ids = (0..80 + 50 * index)
        .map(|i| ((i * 11 + index * 17) % 200) as u32)
        .collect();
    Ask::greedy_ids(ids, TOKENS)
}

async fn cluster_on(etcd: &Etcd) -> Result<Cluster> {
    let flags = ["--lease-ttl", outage().1];
    let options = ClusterOptions {
        store: Store::Etcd(etcd.store()),
        prefill: 2,
        decode: 2,
        ..ClusterOptions::pair(MODEL)
    };
    let mut options = options.node_flags(&flags);
    options.coordinator_flags = flags.map(String::from).to_vec();
    Cluster::start(options).await
}

/// Askers that send one streamed request after another, each compared with its fault-free answer.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    askers: JoinSet<Result<()>>,
}

impl Load {
    async fn start(cluster: &Cluster) -> Result<Self> {
        let mut load = Self {
            stop: Arc::default(),
            answered: Arc::default(),
            askers: JoinSet::new(),
        };
        let client = cluster.client().await?;
        for index in 0..ASKERS {
            let expected = ask(&client, &request(index)).await??;
            let (client, stop, answered) = (client.clone(), Arc::clone(&load.stop), Arc::clone(&load.answered));
            load.askers.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let Answer { tokens, .. } = ask(&client, &request(index)).await??;
                    ensure!(
                        tokens == expected.tokens,
                        "request {index} differs from its fault-free answer"
                    );
                    answered.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
        }
        Ok(load)
    }

    /// Waits until every asker can have begun and ended a request since the call.
    async fn goes_on(&mut self, what: &str) -> Result<()> {
        let from = self.answered.load(Ordering::Relaxed);
        let answered = Arc::clone(&self.answered);
        let more = until(what, Duration::from_secs(30), || async {
            (answered.load(Ordering::Relaxed) >= from + 3 * ASKERS).then_some(())
        });
        tokio::select! {
            more = more => more,
            Some(ended) = self.askers.join_next() => match ended? {
                Ok(()) => bail!("an asker ended early"),
                Err(error) => Err(error.context(format!("{what}: a request was harmed"))),
            },
        }
    }

    async fn end(mut self) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.askers.join_next().await {
            ended??;
        }
        Ok(self.answered.load(Ordering::Relaxed))
    }
}

async fn all_registered(etcd: &Etcd, cluster: &Cluster) -> Result<()> {
    let wanted = cluster.prefill.len() + cluster.decode.len();
    let all = etcd.wait_registered(wanted, RETURN).await;
    all.with_context(|| cluster.logs())
}

async fn ready_nodes(cluster: &Cluster) -> Result<usize> {
    Ok(cluster
        .status()
        .await?
        .nodes
        .iter()
        .filter(|node| node.state == "ready")
        .count())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_etcd_harms_no_request() -> Result<()> {
    let mut etcd = Etcd::start().await?;
    let mut cluster = cluster_on(&etcd).await?;
    let mut load = Load::start(&cluster).await?;
    load.goes_on("requests before the outage").await?;
    for outage in [Duration::ZERO, outage().0] {
        etcd.kill().await?;
        load.goes_on("requests while etcd is away").await?;
        // The outage's length, which is to be longer than a lease, and not a wait for something.
        tokio::time::sleep(outage).await;
        load.goes_on("requests after a lease without etcd").await?;
        ensure!(
            ready_nodes(&cluster).await? == 4,
            "members were dropped because etcd is away:\n{}",
            cluster.logs()
        );
        etcd.restart(false).await?;
        all_registered(&etcd, &cluster).await?;
        load.goes_on("requests after etcd's return").await?;
        ensure!(
            ready_nodes(&cluster).await? == 4,
            "members were dropped at etcd's return:\n{}",
            cluster.logs()
        );
    }
    let answered = load.end().await?;
    println!("{answered} requests answered, none harmed");
    // The watch follows again: a newcomer is found, and one that leaves is missed.
    cluster.add("decode").await?;
    cluster.wait_listed().await?;
    ensure!(cluster.decode[2].terminate(RETURN).await? == 0);
    until("the leaver is gone", RETURN, || async {
        (ready_nodes(&cluster).await.ok()? == 4).then_some(())
    })
    .await?;
    cluster.wait_idle(RETURN).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_etcd_harms_no_request() -> Result<()> {
    let mut etcd = Etcd::start().await?;
    let mut cluster = cluster_on(&etcd).await?;
    let mut load = Load::start(&cluster).await?;
    load.goes_on("requests before the wipe").await?;
    etcd.restart(true).await?;
    load.goes_on("requests after the wipe").await?;
    all_registered(&etcd, &cluster).await?;
    // Longer than the lease that members have to come back.
    tokio::time::sleep(outage().0).await;
    load.goes_on("requests on registered nodes").await?;
    ensure!(
        ready_nodes(&cluster).await? == 4,
        "members were dropped after the wipe:\n{}",
        cluster.logs()
    );
    load.end().await?;
    // A node that dies between wipe and registration must not stay for ever.
    etcd.kill().await?;
    cluster.prefill[1].kill().await?;
    etcd.restart(true).await?;
    until("the dead node is gone", Duration::from_secs(20), || async {
        (ready_nodes(&cluster).await.ok()? == 3).then_some(())
    })
    .await?;
    let client = cluster.client().await?;
    ask(&client, &request(0)).await??;
    // The dead node's last figures are shown until its lease has ended.
    cluster.wait_idle(RETURN * 2).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_waits_for_an_etcd_that_went_away_while_it_loaded() -> Result<()> {
    let mut etcd = Etcd::start().await?;
    let mut cluster = cluster_on(&etcd).await?;
    let killed = cluster.decode[1].name.clone();
    cluster.decode[1].kill().await?;
    // Its successor finds the name held by the dead process's lease, and etcd gone before that has ended.
    let restarting = cluster.restart("decode", 1);
    let outage = async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        etcd.kill().await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        etcd.restart(false).await
    };
    let (restarted, came_back) = tokio::join!(restarting, outage);
    came_back?;
    restarted?;
    ensure!(cluster.decode[1].name == killed);
    cluster.wait_listed().await?;
    all_registered(&etcd, &cluster).await
}
