//! What block locations cost: a real etcd, many simulated nodes whose caches change all the time, and one coordinator that
//! indexes what they publish.
//!
//! Every node has its own connection, registration and publisher, as in a process of its own, and its cache changes at a
//! fixed rate: as many blocks come as leave. The caches begin full, so that the run begins as after a wiped store: with
//! everything published at once. Staleness is what the coordinator measures too: from the look at a cache before a change
//! was found to the moment when the index knows it, on one machine's clock.

use anyhow::{Context, Result, ensure};
use baton_cluster_state::keys::blocks::BlockSegment;
use baton_cluster_state::{
    LocationBudget, LocationEvent, LocationWatch, NodeRecord, Registration, Store, StoreOptions,
};
use baton_node_runtime::{Clock, Supervisor};
use baton_scheduling::BlockIndex;
use baton_tests::Etcd;
use baton_types::{
    BlockChanges, BlockHash, Instance, KvDtype, KvGeometry, ModelFingerprint, NodeId, NodeRole, NodeState, NumericsId,
};
use clap::Parser;
use serde::Serialize;
use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Nodes that register at once.
const JOINING: usize = 50;
/// How long the first publication of all caches may take.
const FILL_TIME_MAX: Duration = Duration::from_secs(300);
/// A segment's value without its hashes.
const SEGMENT_HEADER_BYTES: usize = 13;

/// Measures what block locations cost etcd and a coordinator.
#[derive(Debug, Parser)]
struct Options {
    /// Simulated nodes, a run each
    #[arg(long, value_name = "COUNT,...", value_delimiter = ',', default_values_t = [10, 100, 1000])]
    nodes: Vec<usize>,
    /// Blocks of each node's cache
    #[arg(long, value_name = "COUNT", default_value_t = 2000)]
    blocks: usize,
    /// Blocks that come, and as many that leave, per node and second; 100 are a prefill of 1,600 tokens per second
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    rate: usize,
    /// How long each run is measured
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    seconds: u64,
    /// The cluster's budget of writes per second
    #[arg(long, value_name = "COUNT", default_value_t = LocationBudget::default().writes_per_s)]
    location_writes: u32,
    /// The cluster's budget of bytes per second
    #[arg(long, value_name = "BYTES", default_value_t = LocationBudget::default().bytes_per_s)]
    location_bytes: u64,
    /// Prints one line of JSON per run
    #[arg(long)]
    json: bool,
}

/// One run.
#[derive(Debug, Default, Serialize)]
struct Row {
    nodes: usize,
    /// Until the index knew all caches, seconds.
    fill_s: f64,
    writes_per_s: f64,
    /// Values of the segments.
    bytes_per_s: f64,
    /// Blocks that came or left, as written.
    changes_per_s: f64,
    staleness_ms_median: f64,
    staleness_ms_p99: f64,
    staleness_ms_max: f64,
    /// Processor time of etcd, of one core.
    etcd_cores: f64,
    etcd_resident_bytes: u64,
    /// Its files at the end.
    etcd_data_bytes: u64,
    locations: usize,
    index_bytes: usize,
    /// Blocks added or removed per second of the index's own time.
    index_changes_per_s: f64,
}

/// A cache in which old blocks make room for new ones.
struct Cache {
    held: VecDeque<BlockHash>,
    blocks: usize,
    rate: f64,
    changed: Instant,
    owed: f64,
    next: u64,
}

impl Cache {
    fn new(node: usize, options: &Options) -> Self {
        Self {
            held: VecDeque::new(),
            blocks: options.blocks,
            rate: options.rate as f64,
            changed: Instant::now(),
            owed: options.blocks as f64,
            next: (node as u64) << 40,
        }
    }

    fn take_changes(&mut self) -> BlockChanges {
        let now = Instant::now();
        self.owed += self.rate * (now - self.changed).as_secs_f64();
        self.changed = now;
        let mut changes = BlockChanges::default();
        while self.owed >= 1.0 {
            self.owed -= 1.0;
            self.next += 1;
            let hash = hash(self.next);
            self.held.push_back(hash);
            changes.stored.push(hash);
            if self.held.len() > self.blocks {
                changes.evicted.extend(self.held.pop_front());
            }
        }
        changes
    }
}

/// As good as random, and never the same for two numbers.
fn hash(number: u64) -> BlockHash {
    let mut bytes = [0; 16];
    let mixed = (number ^ (number >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bytes[..8].copy_from_slice(&(mixed ^ (mixed >> 32)).to_le_bytes());
    bytes[8..].copy_from_slice(&number.to_le_bytes());
    BlockHash(bytes)
}

fn record(node: usize) -> NodeRecord {
    NodeRecord {
        node_id: NodeId::new(format!("node-{node}")),
        instance: Instance::random(),
        role: NodeRole::Prefill,
        state: NodeState::Ready,
        grpc_address: "127.0.0.1:1".to_owned(),
        transfer: vec!["tcp://127.0.0.1:2".to_owned()],
        model: "simulated".to_owned(),
        card_digest: String::new(),
        fingerprint: ModelFingerprint([0; 32]),
        numerics: NumericsId("simulated".to_owned()),
        geometry: KvGeometry {
            layers: 1,
            kv_heads: 1,
            head_dim: 1,
            block_tokens: 16,
            dtype: KvDtype::F16,
        },
        host_id: String::new(),
        build: String::new(),
        stub: true,
        blocks: 0,
        queue_capacity: 0,
        context_tokens: 0,
    }
}

async fn connect(etcd: &Etcd, supervisor: &Supervisor) -> Result<Store> {
    let options = StoreOptions::new(etcd.store().parse()?);
    Ok(Store::connect(options, Clock::new(), supervisor.clone()).await?)
}

/// Brings all nodes up; they publish until their registrations are dropped.
async fn join(etcd: &Etcd, supervisor: &Supervisor, options: &Options, nodes: usize) -> Result<Vec<Registration>> {
    let mut registrations = Vec::new();
    for first in (0..nodes).step_by(JOINING) {
        let mut joining = JoinSet::new();
        for node in first..nodes.min(first + JOINING) {
            let store = connect(etcd, supervisor).await?;
            joining.spawn(async move { store.register(record(node)).await });
        }
        while let Some(registered) = joining.join_next().await {
            registrations.push(registered??);
        }
    }
    let budget = LocationBudget {
        writes_per_s: options.location_writes,
        bytes_per_s: options.location_bytes,
    };
    for (node, registration) in registrations.iter().enumerate() {
        let mut cache = Cache::new(node, options);
        registration.publish_blocks(budget, move || cache.take_changes());
    }
    Ok(registrations)
}

/// The coordinator's side.
struct Indexer {
    watch: LocationWatch,
    index: BlockIndex,
    /// Of live segments since the measurement began.
    staleness_us: Vec<u64>,
    bytes: usize,
    changes: usize,
    busy: Duration,
}

impl Indexer {
    /// Takes in what comes until `done`.
    async fn follow_until(&mut self, limit: Duration, done: impl Fn(&BlockIndex) -> bool) -> Result<()> {
        let deadline = tokio::time::Instant::now() + limit;
        while !done(&self.index) {
            match tokio::time::timeout_at(deadline, self.watch.next()).await {
                Err(_) => break,
                Ok(LocationEvent::Restart) => ensure!(self.index.locations() == 0, "the watch began anew in mid run"),
                Ok(LocationEvent::Gone { instance }) => self.index.drop_node(instance),
                Ok(LocationEvent::Segment { instance, segment, .. }) => self.take_in(instance, &segment),
            }
        }
        Ok(())
    }

    fn take_in(&mut self, instance: Instance, segment: &BlockSegment) {
        let BlockChanges { stored, evicted } = &segment.changes;
        let began = Instant::now();
        self.index.remove(instance, evicted);
        self.index.add(instance, stored);
        self.busy += began.elapsed();
        let age = Clock::new().unix_us().saturating_sub(segment.since_unix_us);
        self.staleness_us.push(age);
        self.bytes += SEGMENT_HEADER_BYTES + 16 * segment.changes.len();
        self.changes += segment.changes.len();
    }

    fn begin(&mut self) {
        self.staleness_us.clear();
        (self.bytes, self.changes, self.busy) = (0, 0, Duration::ZERO);
    }
}

/// Processor time in seconds and resident bytes of a process, as Linux tells them.
fn usage(pid: u32) -> Result<(f64, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat
        .rsplit(") ")
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let field = |at: usize| -> Result<u64> { Ok(fields.get(at).context("a short /proc/PID/stat")?.parse()?) };
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let page = rustix::param::page_size() as u64;
    Ok(((field(11)? + field(12)?) as f64 / ticks, field(21)? * page))
}

fn folder_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let (path, meta) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)))?;
        bytes += if meta.is_dir() {
            folder_bytes(&path)?
        } else {
            meta.len()
        };
    }
    Ok(bytes)
}

async fn measure(options: &Options, nodes: usize) -> Result<Row> {
    let etcd = Etcd::start().await?;
    let pid = etcd.pid().context("etcd has ended")?;
    let supervisor = Supervisor::new();
    let store = connect(&etcd, &supervisor).await?;
    let all = nodes * options.blocks;
    let mut indexer = Indexer {
        watch: store.watch_blocks(),
        index: BlockIndex::new(2 * all),
        staleness_us: Vec::new(),
        bytes: 0,
        changes: 0,
        busy: Duration::ZERO,
    };
    let registrations = join(&etcd, &supervisor, options, nodes).await?;
    let began = Instant::now();
    let full = |index: &BlockIndex| index.locations() >= all - all / 100;
    indexer.follow_until(FILL_TIME_MAX, full).await?;
    ensure!(
        full(&indexer.index),
        "the caches were not published in {FILL_TIME_MAX:?}"
    );
    let fill_s = began.elapsed().as_secs_f64();
    // What came late during the first publication is no steady state.
    indexer.follow_until(Duration::from_secs(5), |_| false).await?;
    indexer.begin();
    let (began, (cpu_before, _)) = (Instant::now(), usage(pid)?);
    indexer
        .follow_until(Duration::from_secs(options.seconds), |_| false)
        .await?;
    let (seconds, (cpu, etcd_resident_bytes)) = (began.elapsed().as_secs_f64(), usage(pid)?);
    indexer.staleness_us.sort_unstable();
    let sorted = &indexer.staleness_us;
    let ms = |share: f64| {
        let at = (share * sorted.len().saturating_sub(1) as f64).round() as usize;
        sorted.get(at).map_or(0.0, |us| *us as f64 / 1e3)
    };
    let row = Row {
        nodes,
        fill_s,
        writes_per_s: sorted.len() as f64 / seconds,
        bytes_per_s: indexer.bytes as f64 / seconds,
        changes_per_s: indexer.changes as f64 / seconds,
        staleness_ms_median: ms(0.5),
        staleness_ms_p99: ms(0.99),
        staleness_ms_max: ms(1.0),
        etcd_cores: (cpu - cpu_before) / seconds,
        etcd_resident_bytes,
        etcd_data_bytes: folder_bytes(etcd.data())?,
        locations: indexer.index.locations(),
        index_bytes: indexer.index.bytes(),
        index_changes_per_s: indexer.changes as f64 / indexer.busy.as_secs_f64().max(1e-9),
    };
    drop(registrations);
    supervisor.begin_shutdown();
    if let Err(tasks) = supervisor.join(Duration::from_secs(10)).await {
        eprintln!("{} tasks still run at the end", tasks.len());
    }
    Ok(row)
}

fn show(row: &Row, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(row)?);
        return Ok(());
    }
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "| {} | {:.1} | {:.0} | {:.0} | {:.2} | {:.0} / {:.0} / {:.0} | {:.2} | {:.0} | {:.0} | {} | {:.1} ({:.0}) | {:.2} |",
        row.nodes,
        row.fill_s,
        row.writes_per_s,
        row.changes_per_s,
        row.bytes_per_s / f64::from(1 << 20),
        row.staleness_ms_median,
        row.staleness_ms_p99,
        row.staleness_ms_max,
        row.etcd_cores,
        mib(row.etcd_resident_bytes),
        mib(row.etcd_data_bytes),
        row.locations,
        row.index_bytes as f64 / f64::from(1 << 20),
        row.index_bytes as f64 / row.locations.max(1) as f64,
        row.index_changes_per_s / 1e6,
    );
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    if !options.json {
        println!(
            "| nodes | all published, s | writes/s | changes/s | MiB/s | staleness, ms: median / p99 / max | etcd, cores | etcd, MiB | its files, MiB | locations | index, MiB (bytes each) | index, million changes/s |"
        );
        println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    }
    for nodes in &options.nodes {
        let row = measure(&options, *nodes).await;
        show(&row.with_context(|| format!("{nodes} nodes"))?, options.json)?;
    }
    Ok(())
}
