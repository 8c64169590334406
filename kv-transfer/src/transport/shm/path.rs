//! The writer's half: extents are copied into the receiver's arena by whoever polls the write, then a notice is published.
//!
//! There is no queue and no copying task: a small write ends in its first poll, a large one goes on between looks at the
//! gate, one per [`PIECE`]. Invariants:
//! - Whoever copies holds the gate shared and has looked: the path is whole and the epoch not fenced. Its notices are
//!   published before it lets go. So once the gate was held alone, no copy of a fenced epoch, or of an ended path, is under
//!   way or will begin, and a fence's marker stands behind all notices of its epoch.
//! - The gate is held within one poll only: a write that nobody polls holds nobody up.
//! - Bytes copied that the receiver has not read the notice of are at most `bytes_in_flight_max` (one extent may be larger;
//!   it then goes alone).
//! - `DETACHED` is sent after the unmapping, by the path's one task, which ends the path for whatever reason.

use super::copy::settle;
use super::map::{PeerArena, Run};
use super::ring::{CAPACITY, Malformed, Notice, Producer};
use super::socket::{Bell, DETACHED, STOP, hear, receive_signal, send_signal};
use crate::PathKind;
use crate::transport::{Extent, Path, PathError, metric};
use baton_types::{ArenaView, Epoch};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const KIND: PathKind = PathKind::Shm;
/// Most bytes copied between two looks at the gate, and of small extents published together.
const PIECE: usize = 256 << 10;
/// Pieces of one write between two turns of other tasks.
const PIECES_PER_TURN: usize = 4;
/// Bytes made present between two looks at the stop sign.
const POPULATE_STEP: usize = 16 << 20;
/// Places in the ring that only markers take.
const MARKERS: usize = 64;
/// How many fenced epochs are remembered. A write can only meet an epoch that was fenced while it was under way.
const FENCED_REMEMBERED: usize = 1024;

/// What decides whether a copy may begin.
struct Gate {
    failure: Option<PathError>,
    fenced: VecDeque<Epoch>,
    /// Gone when the path has ended.
    peer: Option<Arc<PeerArena>>,
}

/// What writes, fences and the path's task share.
pub(super) struct Shared {
    arena: ArenaView,
    gate: RwLock<Gate>,
    producer: Mutex<Producer>,
    /// Bytes that may still be copied ahead of the receiver.
    room: Semaphore,
    room_max: usize,
    /// What an extent takes of it at least, so that the ring cannot overflow.
    cost_min: usize,
    /// Who waits for room or a place now.
    waiting: AtomicUsize,
    /// Something that a waiting task could wait for has changed.
    changed: Notify,
    receiver: Bell,
    stop: CancellationToken,
    ended: CancellationToken,
}

/// What a path is made of.
pub(super) struct PathParts {
    pub(super) arena: ArenaView,
    pub(super) peer: PeerArena,
    pub(super) producer: Producer,
    /// Wakes the receiver.
    pub(super) receiver: Bell,
    pub(super) bytes_in_flight_max: usize,
    /// Cancelled when the path is to end.
    pub(super) stop: CancellationToken,
}

impl Shared {
    pub(super) fn new(parts: PathParts) -> Arc<Self> {
        let places = CAPACITY - MARKERS;
        let room_max = parts.bytes_in_flight_max.clamp(places, u32::MAX as usize);
        let room_max = room_max.min(Semaphore::MAX_PERMITS);
        Arc::new(Self {
            arena: parts.arena,
            gate: RwLock::new(Gate {
                failure: None,
                fenced: VecDeque::new(),
                peer: Some(Arc::new(parts.peer)),
            }),
            producer: Mutex::new(parts.producer),
            room: Semaphore::new(room_max),
            room_max,
            cost_min: room_max.div_ceil(places),
            waiting: AtomicUsize::new(0),
            changed: Notify::new(),
            receiver: parts.receiver,
            stop: parts.stop,
            ended: CancellationToken::new(),
        })
    }

    /// Ends the path; the first reason stays.
    fn fail(&self, error: PathError) {
        self.gate_alone().failure.get_or_insert(error);
        self.stop.cancel();
        self.changed.notify_waiters();
    }

    /// A copy of that epoch may begin while this is held.
    fn admit(&self, epoch: Epoch) -> Result<RwLockReadGuard<'_, Gate>, PathError> {
        let gate = self.gate();
        match &gate.failure {
            Some(failure) => Err(failure.clone()),
            None if gate.fenced.contains(&epoch) => Err(PathError::Fenced { epoch }),
            None => Ok(gate),
        }
    }

    /// What the extents take of the room; none where one of them is no extent.
    fn check(&self, extents: &[Extent]) -> Result<(), PathError> {
        let geometry = self.arena.geometry();
        let gate = self.gate();
        let peer = gate.peer.as_ref().filter(|_| gate.failure.is_none());
        let peer = peer.ok_or_else(|| gate.failure.clone().unwrap_or(PathError::Closed))?;
        for extent in extents {
            let layers = &extent.layers;
            if layers.is_empty() || layers.end > geometry.layers {
                return Err(PathError::NoSuchLayers {
                    ordinal: extent.ordinal,
                    layers: layers.clone(),
                    of: geometry.layers,
                });
            }
            self.arena.block_ptr(extent.source, 0, 1)?;
            peer.check(extent.destination)?;
        }
        Ok(())
    }

    fn bytes(&self, extent: &Extent) -> usize {
        extent.layers.len() * self.arena.geometry().layer_bytes()
    }

    /// Room that an extent takes until the receiver has read its notice.
    fn cost(&self, extent: &Extent) -> u32 {
        let cost = self.bytes(extent).clamp(self.cost_min, self.room_max);
        u32::try_from(cost).expect("room_max is at most u32::MAX")
    }

    /// How many of the extents go together, at least one; and what they cost.
    fn batch(&self, extents: &[Extent]) -> (usize, u32) {
        let (mut count, mut bytes, mut costs) = (0, 0, 0u32);
        for extent in extents {
            let (more, cost) = (self.bytes(extent), self.cost(extent));
            let fits = bytes + more <= PIECE && (costs + cost) as usize <= self.room_max;
            if count > 0 && !fits {
                break;
            }
            (count, bytes, costs) = (count + 1, bytes + more, costs.saturating_add(cost));
        }
        (count, costs)
    }

    async fn write(self: Arc<Self>, epoch: Epoch, extents: Vec<Extent>) -> Result<(), PathError> {
        self.check(&extents)?;
        let mut extents = extents.into_iter();
        let mut pieces = 0;
        while !extents.as_slice().is_empty() {
            let (count, cost) = self.batch(extents.as_slice());
            let room = self.room(epoch, cost).await?;
            let mut copied = 0;
            while let Some(next) = self.copy(epoch, &extents.as_slice()[..count], copied)? {
                copied = next;
                turn(&mut pieces).await;
            }
            // The receiver gives it back by reading the notices.
            room.forget();
            extents.by_ref().take(count).for_each(drop);
            if !extents.as_slice().is_empty() {
                turn(&mut pieces).await;
            }
        }
        Ok(())
    }

    /// Copies a piece of a batch of which `from` bytes are copied, and publishes the notices behind the last. Gives how much
    /// is copied now; none when all is.
    fn copy(&self, epoch: Epoch, batch: &[Extent], from: usize) -> Result<Option<usize>, PathError> {
        let gate = self.admit(epoch)?;
        let peer = gate.peer.as_deref().ok_or(PathError::Closed)?;
        if let [extent] = batch {
            let run = peer.run(&self.arena, extent)?;
            let len = PIECE.min(run.len() - from);
            run.copy(from, len);
            settle();
            if from + len < run.len() {
                return Ok(Some(from + len));
            }
        } else {
            self.copy_all(peer, batch)?;
        }
        let notices = batch.iter().map(|extent| {
            let (ordinal, layers) = (extent.ordinal, extent.layers.clone());
            (Notice::Extent { epoch, ordinal, layers }, self.cost(extent))
        });
        self.publish(notices);
        drop(gate);
        metric::sent(KIND, batch.len(), batch.iter().map(|extent| self.bytes(extent)).sum());
        Ok(None)
    }

    /// Copies whole extents, neighbours in one go.
    fn copy_all(&self, peer: &PeerArena, batch: &[Extent]) -> Result<(), PathError> {
        let mut last: Option<Run<'_>> = None;
        for extent in batch {
            let next = peer.run(&self.arena, extent)?;
            if last.as_mut().is_some_and(|last| last.join(&next)) {
                continue;
            }
            // Its first bytes are on their way while those before it are copied.
            next.ask();
            if let Some(run) = last.replace(next) {
                run.copy(0, run.len());
            }
        }
        if let Some(run) = last {
            run.copy(0, run.len());
        }
        settle();
        Ok(())
    }

    fn publish(&self, notices: impl Iterator<Item = (Notice, u32)>) {
        let mut producer = self.producer();
        for (notice, cost) in notices {
            producer.push(&notice, cost);
        }
        let asleep = producer.publish();
        drop(producer);
        if asleep {
            self.receiver.ring();
        }
    }

    /// Waits for room. The permits are the extents' until their notices were read.
    async fn room(&self, epoch: Epoch, cost: u32) -> Result<SemaphorePermit<'_>, PathError> {
        if let Ok(room) = self.room.try_acquire_many(cost) {
            return Ok(room);
        }
        let _waiting = Waiting::begin(&self.waiting);
        self.look_for_room()?;
        tokio::select! {
            biased;
            error = self.refused(epoch) => Err(error),
            room = self.room.acquire_many(cost) => room.map_err(|_| PathError::Closed),
        }
    }

    /// Resolves when no copy of that epoch may begin any more.
    async fn refused(&self, epoch: Epoch) -> PathError {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Listens before it looks, so that a change in between is not missed.
            changed.as_mut().enable();
            if let Err(error) = self.admit(epoch).map(drop) {
                return error;
            }
            changed.await;
        }
    }

    /// Takes back the room of what the receiver has read, and asks to be told of more.
    fn look_for_room(&self) -> Result<(), PathError> {
        let producer = self.producer();
        producer.ask_for_room();
        self.reclaim(producer).map_err(|_| {
            let error = PathError::Lost {
                kind: ErrorKind::InvalidData,
            };
            metric::malformed(KIND);
            self.fail(error.clone());
            error
        })
    }

    fn reclaim(&self, mut producer: MutexGuard<'_, Producer>) -> Result<(), Malformed> {
        let freed = producer.reclaim()?;
        drop(producer);
        self.room.add_permits(freed);
        Ok(())
    }

    /// Puts the marker behind everything of that epoch.
    async fn mark(&self, epoch: Epoch) -> Result<(), PathError> {
        let _waiting = Waiting::begin(&self.waiting);
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(failure) = &self.gate().failure {
                return Err(failure.clone());
            }
            self.look_for_room()?;
            if self.try_mark(epoch) {
                return Ok(());
            }
            changed.await;
        }
    }

    /// Puts a marker into the ring, where a place is free.
    fn try_mark(&self, epoch: Epoch) -> bool {
        let mut producer = self.producer();
        if producer.free() == 0 {
            return false;
        }
        producer.push(&Notice::Fence { epoch }, 0);
        let asleep = producer.publish();
        drop(producer);
        if asleep {
            self.receiver.ring();
        }
        true
    }

    fn gate(&self) -> RwLockReadGuard<'_, Gate> {
        // A copy that panics (its run is checked; it cannot) changes nothing that the gate guards.
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn gate_alone(&self) -> RwLockWriteGuard<'_, Gate> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn producer(&self) -> MutexGuard<'_, Producer> {
        // Nothing under this lock panics while places are counted rightly.
        self.producer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets other tasks run, now and then.
async fn turn(pieces: &mut usize) {
    *pieces += 1;
    if pieces.is_multiple_of(PIECES_PER_TURN) {
        tokio::task::yield_now().await;
    }
}

/// One task that waits for room or a place.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Makes the receiver's arena present here, in the background, until the path ends.
pub(super) fn populate(shared: &Shared) -> impl FnOnce() + Send + 'static {
    let (peer, stop) = (shared.gate().peer.clone(), shared.stop.clone());
    move || {
        let Some(peer) = peer else { return };
        for from in (0..peer.bytes()).step_by(POPULATE_STEP) {
            if stop.is_cancelled() {
                return;
            }
            peer.populate(from, POPULATE_STEP);
        }
    }
}

/// The path's task: hears the receiver, and ends the path.
pub(super) struct Attendant {
    pub(super) shared: Arc<Shared>,
    pub(super) socket: UnixStream,
    /// Rung when there is room.
    pub(super) bell: AsyncFd<OwnedFd>,
    /// What else uses the mapping.
    pub(super) populating: TaskTracker,
}

impl Attendant {
    pub(super) async fn run(self) {
        let shared = &self.shared;
        let error = loop {
            tokio::select! {
                biased;
                () = shared.stop.cancelled() => break PathError::Closed,
                signal = receive_signal(&self.socket) => break lost(signal),
                heard = hear(&self.bell) => {
                    let looked = match shared.waiting.load(Ordering::SeqCst) {
                        0 => Ok(()),
                        _ => shared.look_for_room(),
                    };
                    if let (Err(error), _) | (_, Err(error)) = (heard.map_err(|_| PathError::Closed), looked) {
                        break error;
                    }
                    shared.changed.notify_waiters();
                }
            }
        };
        shared.fail(error);
        self.populating.close();
        self.populating.wait().await;
        // The last holder: whoever copies borrows it from the gate, which is held alone here.
        drop(shared.gate_alone().peer.take());
        send_signal(&self.socket, DETACHED);
        drop(self.socket);
        shared.ended.cancel();
    }
}

/// What the receiver's signal, or its end, means.
fn lost(signal: std::io::Result<Option<u8>>) -> PathError {
    let kind = match signal {
        Ok(Some(STOP) | None) => ErrorKind::ConnectionReset,
        Ok(Some(_)) => ErrorKind::InvalidData,
        Err(error) => error.kind(),
    };
    PathError::Lost { kind }
}

/// Ends the path when the last user has gone.
struct User(Arc<Shared>);

impl Drop for User {
    fn drop(&mut self) {
        self.0.stop.cancel();
    }
}

/// A [`Path`] into another process's arena.
pub(super) struct ShmPath(Arc<User>);

impl ShmPath {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(Arc::new(User(shared)))
    }
}

impl Path for ShmPath {
    fn kind(&self) -> PathKind {
        KIND
    }

    fn connections(&self) -> u32 {
        1
    }

    fn write(&self, epoch: Epoch, extents: Vec<Extent>) -> BoxFuture<'static, Result<(), PathError>> {
        let user = Arc::clone(&self.0);
        async move { Arc::clone(&user.0).write(epoch, extents).await }.boxed()
    }

    fn fence(&self, epoch: Epoch) -> BoxFuture<'static, Result<(), PathError>> {
        let user = Arc::clone(&self.0);
        // At once, not when polled: whoever asks for a fence before a later write means that order.
        let mut gate = user.0.gate_alone();
        if gate.fenced.len() >= FENCED_REMEMBERED {
            gate.fenced.pop_front();
        }
        gate.fenced.push_back(epoch);
        drop(gate);
        user.0.changed.notify_waiters();
        async move { user.0.mark(epoch).await }.boxed()
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        let shared = Arc::clone(&self.0.0);
        shared.fail(PathError::Closed);
        async move { shared.ended.cancelled().await }.boxed()
    }
}
