//! The store, as nodes and coordinator see it: names and block locations under leases, and a watch without gaps.

use super::network::{COORDINATOR, STORE};
use super::node::Process;
use super::{Planted, Sim};
use baton_cluster_state::{BlockSegment, LocationEvent, MembershipEvent, NodeRecord};
use baton_types::{BlockChanges, BlockHash, Instance, NodeId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

pub(super) const LEASE: Duration = Duration::from_secs(3);
/// What may lie between a lease's end and the coordinator's knowing of it, while all is well.
const KNOWN_WITHIN: Duration = Duration::from_secs(2);
/// A watch that was away for so long may find its revision compacted.
const COMPACTED_AFTER: Duration = Duration::from_secs(1);

struct Lease {
    record: NodeRecord,
    expires: Instant,
    held: BTreeSet<BlockHash>,
}

enum Told {
    Put(Box<NodeRecord>),
    Gone(NodeId, Instance),
    Segment(Instance, BlockChanges),
}

struct State {
    up: bool,
    leases: BTreeMap<NodeId, Lease>,
    /// When the leases of former lives ended.
    ended: BTreeMap<Instance, Instant>,
}

pub(super) struct Store {
    state: Mutex<State>,
    feed: mpsc::UnboundedSender<Told>,
}

/// Where the coordinator's watches are fed.
pub(super) struct Watches {
    pub(super) nodes: mpsc::UnboundedSender<MembershipEvent>,
    pub(super) locations: mpsc::UnboundedSender<LocationEvent>,
}

/// What the coordinator was told of locations.
type Mirror = BTreeMap<Instance, BTreeSet<BlockHash>>;

fn segment(changes: BlockChanges) -> BlockSegment {
    BlockSegment {
        since_unix_us: 0,
        changes,
    }
}

fn apply(changes: &BlockChanges, held: &mut BTreeSet<BlockHash>) {
    held.retain(|hash| !changes.evicted.contains(hash));
    held.extend(&changes.stored);
}

impl Store {
    pub(super) fn new() -> (Self, Feed) {
        let (feed, told) = mpsc::unbounded_channel();
        let state = Mutex::new(State {
            up: true,
            leases: BTreeMap::new(),
            ended: BTreeMap::new(),
        });
        (Self { state, feed }, Feed(told))
    }

    /// A store that comes back gives every lease its whole time again.
    pub(super) fn set_up(&self, up: bool) {
        let mut state = self.state.lock().unwrap();
        state.up = up;
        let expires = Instant::now() + LEASE;
        state.leases.values_mut().for_each(|lease| lease.expires = expires);
    }

    pub(super) fn live(&self) -> BTreeSet<Instance> {
        let state = self.state.lock().unwrap();
        state.leases.values().map(|lease| lease.record.instance).collect()
    }

    /// A node's word: it lives, and this changed. False: it was not heard.
    fn hear(&self, process: &Process) -> bool {
        let state = &mut *self.state.lock().unwrap();
        if !state.up {
            return false;
        }
        let record = process.record();
        let (name, instance) = (record.node_id.clone(), record.instance);
        let known = state.leases.get(&name).map(|lease| lease.record.instance);
        if known.is_some_and(|known| known != instance) {
            // The name is a former life's until its lease ends.
            return false;
        }
        let expires = Instant::now() + LEASE;
        let changes = process.pool.take_changes();
        let mut held = process.told.lock().unwrap();
        apply(&changes, &mut held);
        let told = match state.leases.get_mut(&name) {
            Some(lease) => {
                lease.expires = expires;
                lease.held.clone_from(&held);
                changes
            }
            None => {
                let lease = Lease {
                    record: record.clone(),
                    expires,
                    held: held.clone(),
                };
                state.leases.insert(name, lease);
                state.ended.remove(&instance);
                let _ = self.feed.send(Told::Put(Box::new(record)));
                BlockChanges {
                    stored: held.iter().copied().collect(),
                    evicted: Vec::new(),
                }
            }
        };
        if !told.stored.is_empty() || !told.evicted.is_empty() {
            let _ = self.feed.send(Told::Segment(instance, told));
        }
        true
    }

    /// Ends the leases that nobody renewed.
    pub(super) async fn expire(&self) {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let state = &mut *self.state.lock().unwrap();
            let now = Instant::now();
            let up = state.up;
            let (ended, feed) = (&mut state.ended, &self.feed);
            state.leases.retain(|name, lease| {
                let lives = !up || lease.expires > now;
                if !lives {
                    ended.insert(lease.record.instance, now);
                    let _ = feed.send(Told::Gone(name.clone(), lease.record.instance));
                }
                lives
            });
        }
    }
}

/// Keeps a process's name and locations in the store.
pub(super) async fn keep(process: Arc<Process>) {
    let sim = Arc::clone(&process.sim);
    loop {
        sim.travel(process.at, STORE).await;
        let heard = sim.store.hear(&process);
        sim.travel(STORE, process.at).await;
        let pause = if heard { 300 + sim.throw(300) } else { 100 };
        tokio::time::sleep(Duration::from_millis(pause as u64)).await;
    }
}

/// The coordinator's end of the watch.
pub(super) struct Feed(mpsc::UnboundedReceiver<Told>);

impl Feed {
    /// Tells the coordinator in order; checks that its index is what it was told.
    pub(super) async fn run(mut self, sim: Arc<Sim>, watches: Watches) {
        let mut mirror = Mirror::new();
        let _ = watches.nodes.send(MembershipEvent::Snapshot(Vec::new()));
        let _ = watches.locations.send(LocationEvent::Restart);
        let (mut ticks, mut well_since) = (tokio::time::interval(Duration::from_millis(200)), Instant::now());
        loop {
            tokio::select! {
                biased;
                told = self.0.recv() => {
                    let Some(told) = told else { return };
                    let sent = Instant::now();
                    sim.travel(STORE, COORDINATOR).await;
                    if sent.elapsed() > COMPACTED_AFTER && sim.one_in(2) {
                        while self.0.try_recv().is_ok() {}
                        tell_all(&sim, &watches, &mut mirror);
                    } else {
                        tell(&sim, &watches, &mut mirror, told);
                        // What was sent meanwhile comes with it.
                        while let Ok(told) = self.0.try_recv() {
                            tell(&sim, &watches, &mut mirror, told);
                        }
                    }
                    // For the coordinator's tasks to take it in.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    let wanted: usize = mirror.values().map(BTreeSet::len).sum();
                    let mut known = 0;
                    sim.members().index(|index| known = index.locations());
                    sim.note("index", known as u64);
                    if known != wanted {
                        sim.complain(format!("the index has {known} locations, but {wanted} were told"));
                    }
                }
                _ = ticks.tick() => {}
            }
            let well = sim.network.is_open(STORE, COORDINATOR) && sim.store.state.lock().unwrap().up;
            if !well {
                well_since = Instant::now();
            }
            let state = sim.store.state.lock().unwrap();
            for instance in mirror.keys() {
                let over = state.ended.get(instance).map(|ended| ended.max(&well_since).elapsed());
                if over.is_some_and(|over| over > KNOWN_WITHIN) {
                    sim.complain(format!(
                        "locations of {instance:?} are trusted {over:?} after its lease"
                    ));
                }
            }
        }
    }
}

fn tell(sim: &Sim, watches: &Watches, mirror: &mut Mirror, told: Told) {
    match told {
        Told::Put(record) => {
            let _ = watches.nodes.send(MembershipEvent::Put(*record));
        }
        Told::Gone(node_id, instance) => {
            let _ = watches.nodes.send(MembershipEvent::Gone { node_id, instance });
            if sim.bug != Some(Planted::LostGone) {
                mirror.remove(&instance);
                let _ = watches.locations.send(LocationEvent::Gone { instance });
            }
        }
        Told::Segment(instance, changes) => {
            let held = mirror.entry(instance).or_default();
            apply(&changes, held);
            let event = LocationEvent::Segment {
                instance,
                segment: segment(changes),
                is_live: true,
            };
            let _ = watches.locations.send(event);
        }
    }
}

/// After a compaction: everything as it is now.
fn tell_all(sim: &Sim, watches: &Watches, mirror: &mut Mirror) {
    let state = sim.store.state.lock().unwrap();
    let records = state.leases.values().map(|lease| lease.record.clone()).collect();
    let _ = watches.nodes.send(MembershipEvent::Snapshot(records));
    let _ = watches.locations.send(LocationEvent::Restart);
    mirror.clear();
    for lease in state.leases.values().filter(|lease| !lease.held.is_empty()) {
        let instance = lease.record.instance;
        mirror.insert(instance, lease.held.clone());
        let changes = BlockChanges {
            stored: lease.held.iter().copied().collect(),
            evicted: Vec::new(),
        };
        let event = LocationEvent::Segment {
            instance,
            segment: segment(changes),
            is_live: false,
        };
        let _ = watches.locations.send(event);
    }
}
