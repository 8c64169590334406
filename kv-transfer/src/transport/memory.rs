//! Hand-overs within one process: extents are copied block to block, by tasks and queues as if over a wire.
//!
//! Receivers are found by name in a [`MemoryNetwork`]. Each lane has one task which is both the writer's sending task and the
//! receiver's receiving task: it claims, copies in pieces, lands. It yields between pieces, so that a fence, a cancelled
//! request or a closed path meets it in the middle of an extent, as over a network.

use super::lanes::{LANES_MAX, LaneItem, LaneOptions, LanePath, LaneQueue};
use super::local::check_same;
use super::raw::{Destination, Source};
use super::writers::{NoEntry, WriterEntry, Writers};
use super::{ConnectError, Local, Path, PathError, Transport, metric};
use crate::{PathKind, Peer, WIRE_MAJOR};
use baton_types::Instance;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::HashMap;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Bytes copied between two looks at the stop signs.
const PIECE: usize = 256 << 10;
const KIND: PathKind = PathKind::Memory;

/// Names of receivers. Clones share them.
#[derive(Clone, Default)]
pub struct MemoryNetwork(Arc<Mutex<HashMap<String, Weak<Shared>>>>);

impl MemoryNetwork {
    /// One of its own, for tests.
    pub fn new() -> Self {
        Self::default()
    }

    /// The one that all nodes of this process share, as they share the loopback interface.
    pub fn of_process() -> Self {
        static NETWORK: OnceLock<MemoryNetwork> = OnceLock::new();
        NETWORK.get_or_init(Self::new).clone()
    }

    fn names(&self) -> MutexGuard<'_, HashMap<String, Weak<Shared>>> {
        // No code that can panic runs under this lock, so what it guards is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name is in use in that network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("memory://{name} is taken")]
pub struct NameTaken {
    /// Which.
    pub name: String,
}

/// How a memory transport is made.
#[derive(Debug, Clone)]
pub struct MemoryOptions {
    /// Its name in the network.
    pub name: String,
    /// Lanes of each path that it opens.
    pub connections_per_peer: usize,
    /// Bytes queued on one path before writes wait.
    pub bytes_in_flight_max: usize,
}

struct Shared {
    options: MemoryOptions,
    local: Local,
    network: MemoryNetwork,
    writers: Arc<Writers>,
    /// Ends the paths that were opened from here.
    stop: CancellationToken,
    lanes: TaskTracker,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.stop.cancel();
        self.writers.stop();
        // Only its own name: after a shutdown another may have taken it.
        let mut names = self.network.names();
        if names
            .get(&self.options.name)
            .is_some_and(|holder| holder.strong_count() == 0)
        {
            names.remove(&self.options.name);
        }
    }
}

/// The memory transport of one node. Dropped without `shutdown`, it ends all connections by and by.
pub struct MemoryTransport(Arc<Shared>);

impl MemoryTransport {
    /// Listens under its name.
    ///
    /// # Errors
    /// Where the name is in use.
    pub fn start(network: &MemoryNetwork, options: MemoryOptions, local: Local) -> Result<Self, NameTaken> {
        let mut names = network.names();
        if names.get(&options.name).is_some_and(|holder| holder.strong_count() > 0) {
            return Err(NameTaken { name: options.name });
        }
        let writers = Writers::new(KIND, Arc::clone(&local.landing));
        let name = options.name.clone();
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            options,
            local,
            network: network.clone(),
            writers,
            stop,
            lanes: TaskTracker::new(),
        });
        names.insert(name, Arc::downgrade(&shared));
        Ok(Self(shared))
    }
}

impl Shared {
    fn connect(&self, wanted: Instance, address: &str) -> Result<Arc<dyn Path>, ConnectError> {
        let name = address
            .strip_prefix("memory://")
            .ok_or_else(|| ConnectError::BadAddress {
                address: address.to_owned(),
                path: KIND,
            })?;
        if self.stop.is_cancelled() {
            return Err(ConnectError::ShuttingDown);
        }
        let unreachable = || ConnectError::Unreachable {
            address: address.to_owned(),
            kind: ErrorKind::ConnectionRefused,
        };
        let receiver = self
            .network
            .names()
            .get(name)
            .and_then(Weak::upgrade)
            .ok_or_else(unreachable)?;
        let theirs = &receiver.local.identity;
        if theirs.instance != wanted {
            return Err(ConnectError::WrongInstance {
                wanted,
                found: theirs.instance,
            });
        }
        check_same(&self.local.identity, WIRE_MAJOR, &theirs.fingerprint, &theirs.geometry)?;
        let lanes = self.options.connections_per_peer.clamp(1, LANES_MAX) as u32;
        let entries: Result<Vec<WriterEntry>, NoEntry> = (0..lanes)
            .map(|_| receiver.writers.enter(self.local.identity.instance))
            .collect();
        let entries = entries.map_err(|no_entry| match no_entry {
            NoEntry::Full => ConnectError::Handshake {
                address: address.to_owned(),
                reason: "the receiver has too many connections",
            },
            NoEntry::ShuttingDown | NoEntry::Leaving => unreachable(),
        })?;
        let options = LaneOptions {
            kind: KIND,
            lanes,
            bytes_in_flight_max: self.options.bytes_in_flight_max,
            stop: self.stop.child_token(),
        };
        let (path, queues) = LanePath::new(options, self.local.arena.clone());
        for (queue, entry) in queues.into_iter().zip(entries) {
            let carrier = Carrier {
                local: receiver.local.clone(),
                entry,
                queue,
            };
            self.local
                .supervisor
                .spawn("transfer-memory-lane", self.lanes.track_future(carrier.run()));
        }
        Ok(Arc::new(path))
    }
}

impl Transport for MemoryTransport {
    fn path(&self) -> PathKind {
        KIND
    }

    fn address(&self) -> String {
        format!("memory://{}", self.0.options.name)
    }

    fn reaches(&self, address: &str) -> bool {
        let name = address.strip_prefix("memory://");
        name.is_some_and(|name| self.0.network.names().contains_key(name))
    }

    fn connect(&self, peer: &Peer, address: &str) -> BoxFuture<'_, Result<Arc<dyn Path>, ConnectError>> {
        let connected = self.0.connect(peer.instance, address);
        async move { connected }.boxed()
    }

    fn disconnect_instance(&self, instance: Instance) -> BoxFuture<'_, ()> {
        self.0.writers.disconnect(Some(instance)).boxed()
    }

    fn shutdown(&self) -> BoxFuture<'_, ()> {
        async {
            self.0.stop.cancel();
            self.0
                .network
                .names()
                .retain(|_, holder| !std::ptr::eq(holder.as_ptr(), Arc::as_ptr(&self.0)));
            self.0.writers.shutdown().await;
            self.0.lanes.close();
            self.0.lanes.wait().await;
        }
        .boxed()
    }
}

/// Carries the extents of one lane. Fields drop in order: the receiver's side is over before the writer's queue is.
struct Carrier {
    local: Local,
    entry: WriterEntry,
    queue: LaneQueue,
}

impl Carrier {
    async fn run(mut self) {
        let stop = self.queue.stopped();
        let closed = self.entry.stopped().clone();
        loop {
            let item = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = closed.cancelled() => return self.lost(),
                item = self.queue.next() => item,
            };
            match item {
                None => return,
                Some(LaneItem::Fence(marker)) => {
                    self.entry.landing().fenced(self.entry.from(), marker.epoch);
                    marker.carried();
                }
                Some(LaneItem::Batch(batch)) => {
                    for source in batch.extents.iter() {
                        if !self.carry(source, &stop, &closed).await {
                            self.queue.give_back(LaneItem::Batch(batch));
                            if !stop.is_cancelled() {
                                self.lost();
                            }
                            return;
                        }
                    }
                    metric::sent(KIND, batch.extents.len(), batch.bytes());
                    batch.carried();
                }
            }
        }
    }

    /// The receiver closed the connection: the writer is told so.
    fn lost(&self) {
        self.queue.state().fail(PathError::Lost {
            kind: ErrorKind::ConnectionReset,
        });
    }

    /// Carries one extent; false where it was stopped in the middle.
    async fn carry(&self, source: &Source, stop: &CancellationToken, closed: &CancellationToken) -> bool {
        let header = source.header();
        let claimed = self.entry.landing().claim(self.entry.from(), header);
        let destination = claimed.and_then(|claim| Destination::new(&self.local.arena, header, claim));
        let mut destination = match destination {
            Ok(destination) => destination,
            Err(reject) => {
                metric::rejected(KIND, reject);
                return true;
            }
        };
        for from in (0..source.len()).step_by(PIECE) {
            destination.copy_from(source, from, PIECE.min(source.len() - from));
            tokio::task::yield_now().await;
            if stop.is_cancelled() || closed.is_cancelled() {
                return false;
            }
        }
        match destination.land() {
            Ok(()) => metric::landed(KIND, 1, source.len()),
            Err(reject) => metric::rejected(KIND, reject),
        }
        true
    }
}
