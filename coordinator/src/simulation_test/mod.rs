//! A whole cluster by seed: the coordinator as it is (front end, placement, request tasks, membership, heartbeats, index,
//! its gRPC connections), three prefill and three decode nodes and a store around the real block pool and service, on one
//! thread, under a clock that only moves when all wait. Processes die, stop, drain and come back; wires and the store go
//! away; messages are late and overtake each other; clients leave.
//!
//! A seed decides everything: `BATON_SEED=n` runs one, and a run again is the same, event for event. Whatever happens, each
//! stream is what a cluster without faults would have said, ends once, and in time; at rest nothing is left behind; and the
//! index knows what the store told, not longer than its leases.

mod clients;
mod faults;
mod handover;
mod network;
mod node;
mod store;

use crate::control::Record;
use crate::driver::{Coordinator, CoordinatorOptions, RoutingOptions};
use crate::membership::{Members, Model, WatchOptions, endpoint, watch, watch_locations};
use crate::tenants::Tenants;
use baton_node_runtime::{Clock, Supervisor};
use baton_scheduling::{AdmissionLimits, BlockIndex, Decision, Policy, RefuseReason, Routed, Slo};
use baton_text::{EngineFacts, ModelCard};
use baton_types::{Instance, KvDtype, ModelFingerprint, NumericsId};
use network::Network;
use node::Process;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use store::{LEASE, Store, Watches};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Uri;

const BLOCK_TOKENS: usize = 16;
const NODES: RangeInclusive<usize> = 1..=6;
/// Within which a cluster where nothing happens any more is at rest.
const REST: Duration = Duration::from_secs(20);

/// What the test must catch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planted {
    /// A node keeps a block of each request whose client left.
    LeakOnCancel,
    /// A piece under an epoch that is over is written all the same.
    LateWrite,
    /// The coordinator is not told that a lease has ended.
    LostGone,
}

/// What a run comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Told {
    log: u64,
    events: u64,
    finished: u64,
    failed: u64,
    left: u64,
    moved: u64,
    again: u64,
}

impl Told {
    fn add(&mut self, other: Self) {
        self.log = self.log.wrapping_add(other.log);
        self.events += other.events;
        self.finished += other.finished;
        self.failed += other.failed;
        self.left += other.left;
        self.moved += other.moved;
        self.again += other.again;
    }
}

struct Sim {
    dice: Mutex<u64>,
    numbers: Mutex<u64>,
    begun: Instant,
    told: Mutex<Told>,
    complaints: Mutex<Vec<String>>,
    network: Network,
    store: Store,
    members: OnceLock<Members>,
    /// Nothing goes wrong here.
    calm: OnceLock<bool>,
    bug: Option<Planted>,
}

/// The token that follows a context.
fn draw(context: &[u32]) -> u32 {
    let hash = context
        .iter()
        .fold(17_u32, |hash, token| hash.wrapping_mul(31).wrapping_add(*token + 1));
    (hash >> 7) % 250
}

fn card() -> ModelCard {
    let engine = EngineFacts {
        fingerprint: ModelFingerprint([1; 32]),
        numerics: NumericsId("simulated".into()),
        block_tokens: BLOCK_TOKENS as u32,
        kv_dtype: KvDtype::F16,
    };
    ModelCard::stub("m", 400, engine)
}

impl Sim {
    /// A number below `sides`.
    fn throw(&self, sides: usize) -> usize {
        let mut dice = self.dice.lock().unwrap();
        // SplitMix64.
        *dice = dice.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *dice;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides.max(1) as u64) as usize
    }

    fn one_in(&self, sides: usize) -> bool {
        self.throw(sides) == 0
    }

    fn number(&self) -> u64 {
        let mut numbers = self.numbers.lock().unwrap();
        *numbers += 1;
        *numbers
    }

    fn members(&self) -> &Members {
        self.members.get().expect("the coordinator is there")
    }

    fn is_calm(&self) -> bool {
        self.calm.get().is_some_and(|calm| *calm)
    }

    /// Takes down what happened, and when.
    fn note(&self, what: &str, detail: u64) {
        let at = self.begun.elapsed().as_micros() as u64;
        if std::env::var_os("BATON_SEED").is_some() {
            println!("{at:>10} {what} {detail}");
        }
        let mut told = self.told.lock().unwrap();
        told.events += 1;
        for word in what.bytes().map(u64::from).chain([at, detail]) {
            told.log = (told.log ^ word).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// Something is as it must not be.
    fn complain(&self, of: String) {
        let at = self.begun.elapsed();
        self.complaints.lock().unwrap().push(format!("after {at:?}: {of}"));
    }
}

fn coordinator(sim: &Arc<Sim>, clock: Clock, supervisor: &Supervisor) -> (Coordinator, Watches) {
    let dial = Arc::clone(sim);
    let connect = move |address: &str| {
        let sim = Arc::clone(&dial);
        let connector = tower::service_fn(move |uri: Uri| {
            let at = uri.host().and_then(|host| host.strip_prefix("node-")?.parse().ok());
            Arc::clone(&sim).connect(at.unwrap_or(usize::MAX))
        });
        Ok(endpoint(address)?.connect_with_connector_lazy(connector))
    };
    let inhibit = Duration::from_secs(2);
    let members = Members::new(clock, LEASE, inhibit, BlockIndex::new(100_000), Arc::new(connect));
    let _ = sim.members.set(members.clone());
    let (nodes, node_events) = mpsc::unbounded_channel();
    let (locations, location_events) = mpsc::unbounded_channel();
    let location_events = UnboundedReceiverStream::new(location_events);
    watch_locations(location_events, members.clone(), clock, supervisor);
    let watching = WatchOptions {
        members: members.clone(),
        instance: Instance(u64::MAX),
        heartbeat: Duration::from_millis(500),
        clock,
        supervisor: supervisor.clone(),
    };
    watch(UnboundedReceiverStream::new(node_events), watching);
    let options = CoordinatorOptions {
        members,
        instance: Instance(u64::MAX),
        limits: AdmissionLimits {
            requests_max: 64,
            queued_max: 16,
        },
        tenants: Tenants::load(None, clock).unwrap(),
        routing: RoutingOptions {
            policy: Policy::default(),
            slo: Slo::default(),
        },
        decisions_max: 16,
        record: Record::default(),
        timeout_default: Duration::from_secs(20),
        timeout_max: Duration::from_secs(60),
        clock,
        supervisor: supervisor.clone(),
    };
    (Coordinator::new(options), Watches { nodes, locations })
}

async fn world(seed: u64, bug: Option<Planted>) -> (Told, Vec<String>) {
    let (store, feed) = Store::new();
    let sim = Arc::new(Sim {
        dice: Mutex::new(seed),
        numbers: Mutex::new(0),
        begun: Instant::now(),
        told: Mutex::default(),
        complaints: Mutex::default(),
        network: Network::new(),
        store,
        members: OnceLock::new(),
        calm: OnceLock::new(),
        bug,
    });
    let _ = sim.calm.set(sim.one_in(8));
    let (clock, supervisor) = (Clock::new(), Supervisor::new());
    let (coordinator, watches) = coordinator(&sim, clock, &supervisor);
    tokio::spawn(feed.run(Arc::clone(&sim), watches));
    let expiring = Arc::clone(&sim);
    tokio::spawn(async move { expiring.store.expire().await });
    NODES.for_each(|at| Process::start(&sim, at));
    // A cluster comes up whole; its model's card is at hand.
    while sim.members().served().is_empty() {
        tokio::time::sleep(Duration::from_millis(50)).await;
        sim.members().set_model("m", Model::new(card(), 0).unwrap());
    }
    let clients = clients::start(&sim, &coordinator);
    let coordinator_dies = !sim.is_calm() && sim.one_in(4);
    if !sim.is_calm() {
        faults::run(&sim, coordinator_dies).await;
    }
    clients.join_all().await;
    rest(&sim, &coordinator, coordinator_dies).await;
    let told = *sim.told.lock().unwrap();
    let complaints = std::mem::take(&mut *sim.complaints.lock().unwrap());
    (told, complaints)
}

/// Everything has ended and nothing goes wrong any more.
async fn rest(sim: &Arc<Sim>, coordinator: &Coordinator, coordinator_died: bool) {
    if coordinator.requests() > 0 {
        sim.complain(format!("{} requests after all have ended", coordinator.requests()));
    }
    let by = Instant::now() + REST;
    let left = |at| {
        sim.network
            .process(at)
            .map_or(Some("gone".into()), |process| process.left_behind())
    };
    let rests = || NODES.into_iter().all(|at| left(at).is_none());
    while !rests() && Instant::now() < by {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for at in NODES {
        if let Some(left) = left(at) {
            sim.complain(format!("node {at} has {left}"));
        }
    }
    if coordinator_died {
        return;
    }
    tokio::time::sleep(LEASE * 2).await;
    let instances = NODES
        .filter_map(|at| sim.network.process(at))
        .map(|process| process.instance);
    let instances = instances.collect();
    if sim.store.live() != instances {
        sim.complain(format!("{:?} are registered, {instances:?} live", sim.store.live()));
    }
    let mut views = Vec::new();
    sim.members().route("m", &[], |_, prefill, decode| {
        views = [prefill, decode].concat();
        Routed {
            decision: Decision::Refuse {
                reason: RefuseReason::NoDecodeNode,
                retry_after: Duration::ZERO,
            },
            candidates: Vec::new(),
        }
    });
    let busy = |view: &&baton_scheduling::NodeView| view.queued_requests + view.running_requests > 0;
    if views.len() != NODES.count() || views.iter().any(|view| busy(&view)) {
        sim.complain(format!("at rest the nodes are seen as {views:?}"));
    }
}

fn run(seed: u64, bug: Option<Planted>) -> (Told, Vec<String>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(world(seed, bug))
}

fn told(seed: u64) -> Told {
    let (told, complaints) = run(seed, None);
    assert!(complaints.is_empty(), "BATON_SEED={seed}: {complaints:#?}");
    told
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn whatever_happens_requests_end_once_and_nothing_is_left_behind() {
    let seeds = match (variable("BATON_SEED"), variable("BATON_TEST_LONG")) {
        (Some(seed), _) => seed..seed + 1,
        (None, Some(1)) => 0..10_000,
        (None, _) => 0..60,
    };
    let runs = seeds.end - seeds.start;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let some = &|first: usize| {
        let mut sum = Told::default();
        for seed in seeds.clone().skip(first).step_by(threads) {
            sum.add(told(seed));
        }
        sum
    };
    let mut sum = Told::default();
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|first| scope.spawn(move || some(first))).collect();
        running.into_iter().for_each(|thread| sum.add(thread.join().unwrap()));
    });
    println!("clusters {seeds:?}: {sum:?}");
    // They reach what they are there for.
    if runs > 1 {
        assert!(sum.finished > 10 * runs, "{sum:?}");
        assert!(sum.moved > 0 && sum.again > runs / 8, "{sum:?}");
    }
}

#[test]
fn a_cluster_run_again_is_the_same() {
    for seed in 0..15 {
        assert_eq!(told(seed), told(seed), "BATON_SEED={seed}");
    }
}

#[test]
fn every_planted_bug_is_caught() {
    let bugs = [
        (Planted::LeakOnCancel, "has BlockCounts"),
        (Planted::LateWrite, "reads"),
        (Planted::LostGone, "locations"),
    ];
    for (bug, how) in bugs {
        let caught = (0..200).find_map(|seed| {
            let (_, complaints) = run(seed, Some(bug));
            complaints.first().map(|first| (seed, first.clone()))
        });
        let (seed, said) = caught.unwrap_or_else(|| panic!("{bug:?} was not seen"));
        println!("{bug:?}: cluster {seed}: {said}");
        assert!(said.contains(how), "{bug:?} was seen otherwise: {said}");
    }
}
