//! The sender's half that all transports share: a path of several lanes, each one connection with one task that carries.
//!
//! Invariants:
//! - Bytes queued and not yet carried are at most `bytes_in_flight_max` per path (one extent may be larger; it then goes
//!   alone). The lanes' channels have no bound of their own because this one holds for all of them together.
//! - A batch is queued, and an epoch fenced, under one lock: no batch of an epoch stands behind its marker in any lane.
//! - The first failure of any lane ends all of them: a path is whole or over.
//! - What was queued and not carried keeps its claims until *every* lane has closed its connection and ended.
//!
//! A lane's task owns its [`LaneQueue`] and must drop its connection before it; [`PathState`] is shared by all.

use super::raw::Source;
use super::{Extent, Path, PathError};
use crate::PathKind;
use baton_types::{ArenaView, Epoch};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Most lanes of a path.
pub(super) const LANES_MAX: usize = 64;
/// A batch holds about so many bytes: enough to hide a system call's cost, few enough to spread over lanes.
pub(super) const BATCH_BYTES: usize = 1 << 20;
/// And at most so many extents.
pub(super) const BATCH_EXTENTS: usize = 512;
/// What a batch takes of the bound at least, so that the number of queued batches is bounded too.
const BATCH_COST_MIN: usize = 4096;
/// How many fenced epochs are remembered. A write can only meet an epoch that was fenced while it waited for room.
const FENCED_REMEMBERED: usize = 1024;

/// Work for one lane, in order.
pub(super) enum LaneItem {
    Batch(Batch),
    Fence(Marker),
}

/// Extents that travel together. Dropped without [`Batch::carried`], its writer is told that the path failed.
pub(super) struct Batch {
    pub(super) epoch: Epoch,
    pub(super) extents: Vec<Source>,
    bytes: usize,
    load: Arc<AtomicUsize>,
    done: oneshot::Sender<()>,
    _room: OwnedSemaphorePermit,
}

impl Batch {
    /// All of it was handed to the wire: lets the claims go, makes room, tells the writer.
    pub(super) fn carried(self) {
        let Self {
            extents,
            bytes,
            load,
            done,
            _room,
            ..
        } = self;
        drop(extents);
        load.fetch_sub(bytes, Ordering::Relaxed);
        // The writer may have gone; its extents were sent all the same.
        let _ = done.send(());
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// A fence's marker, to be sent behind everything before it.
pub(super) struct Marker {
    pub(super) epoch: Epoch,
    done: oneshot::Sender<()>,
}

impl Marker {
    /// It was handed to the wire.
    pub(super) fn carried(self) {
        let _ = self.done.send(());
    }
}

/// What all lanes of a path share.
pub(super) struct PathState {
    stop: CancellationToken,
    failure: Mutex<Option<PathError>>,
    ended: CancellationToken,
    remains: Mutex<Remains>,
}

struct Remains {
    lanes_alive: usize,
    uncarried: Vec<mpsc::UnboundedReceiver<LaneItem>>,
    torn: Vec<LaneItem>,
}

impl PathState {
    /// Ends the path; the first reason stays.
    pub(super) fn fail(&self, error: PathError) {
        lock(&self.failure).get_or_insert(error);
        self.stop.cancel();
    }

    fn failure(&self) -> PathError {
        lock(&self.failure).clone().unwrap_or(PathError::Closed)
    }
}

/// The carrying end of one lane. Dropping it says that the lane's connection is closed and its task over.
pub(super) struct LaneQueue {
    state: Arc<PathState>,
    queue: Option<mpsc::UnboundedReceiver<LaneItem>>,
    torn: Vec<LaneItem>,
}

impl LaneQueue {
    pub(super) fn state(&self) -> &PathState {
        &self.state
    }

    /// Cancelled when the lane is to end.
    pub(super) fn stopped(&self) -> CancellationToken {
        self.state.stop.clone()
    }

    /// The next item; none when the path was dropped. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<LaneItem> {
        match &mut self.queue {
            Some(queue) => queue.recv().await,
            None => None,
        }
    }

    /// The next item, where there is one now.
    pub(super) fn try_next(&mut self) -> Option<LaneItem> {
        self.queue.as_mut()?.try_recv().ok()
    }

    /// Takes back what could not be carried to its end, so that its claims outlive all lanes.
    pub(super) fn give_back(&mut self, item: LaneItem) {
        self.torn.push(item);
    }
}

impl Drop for LaneQueue {
    fn drop(&mut self) {
        let mut remains = lock(&self.state.remains);
        remains.uncarried.extend(self.queue.take());
        remains.torn.append(&mut self.torn);
        remains.lanes_alive -= 1;
        if remains.lanes_alive > 0 {
            drop(remains);
            // A lane that is over ends the others: a path is whole or over.
            self.state.stop.cancel();
            return;
        }
        let uncarried = std::mem::take(&mut remains.uncarried);
        let torn = std::mem::take(&mut remains.torn);
        drop(remains);
        self.state.stop.cancel();
        drop((uncarried, torn));
        self.state.ended.cancel();
    }
}

struct Lane {
    queue: mpsc::UnboundedSender<LaneItem>,
    load: Arc<AtomicUsize>,
}

/// What decides the order of batches and markers.
struct Order {
    lanes: Vec<Lane>,
    fenced: VecDeque<Epoch>,
}

struct Shared {
    kind: PathKind,
    lanes: u32,
    arena: ArenaView,
    state: Arc<PathState>,
    room: Arc<Semaphore>,
    room_max: usize,
    order: Mutex<Order>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.state.stop.cancel();
    }
}

/// A [`Path`] over lanes.
pub(super) struct LanePath(Arc<Shared>);

/// What a path is made of.
pub(super) struct LaneOptions {
    pub(super) kind: PathKind,
    pub(super) lanes: u32,
    pub(super) bytes_in_flight_max: usize,
    /// Cancelled when the path is to end.
    pub(super) stop: CancellationToken,
}

impl LanePath {
    /// A path that sends from `arena`, and the ends that carry: one per lane, each to be given to a task of its own.
    pub(super) fn new(options: LaneOptions, arena: ArenaView) -> (Self, Vec<LaneQueue>) {
        let state = Arc::new(PathState {
            stop: options.stop,
            failure: Mutex::new(None),
            ended: CancellationToken::new(),
            remains: Mutex::new(Remains {
                lanes_alive: options.lanes as usize,
                uncarried: Vec::new(),
                torn: Vec::new(),
            }),
        });
        let mut lanes = Vec::with_capacity(options.lanes as usize);
        let mut queues = Vec::with_capacity(options.lanes as usize);
        for _ in 0..options.lanes {
            let (sender, receiver) = mpsc::unbounded_channel();
            lanes.push(Lane {
                queue: sender,
                load: Arc::default(),
            });
            queues.push(LaneQueue {
                state: Arc::clone(&state),
                queue: Some(receiver),
                torn: Vec::new(),
            });
        }
        let room_max = options
            .bytes_in_flight_max
            .clamp(BATCH_COST_MIN, u32::MAX as usize)
            .min(Semaphore::MAX_PERMITS);
        let shared = Shared {
            kind: options.kind,
            lanes: options.lanes,
            arena,
            state,
            room: Arc::new(Semaphore::new(room_max)),
            room_max,
            order: Mutex::new(Order {
                lanes,
                fenced: VecDeque::new(),
            }),
        };
        (Self(Arc::new(shared)), queues)
    }
}

impl Shared {
    /// Waits for room for a batch.
    async fn room(&self, bytes: usize) -> Result<OwnedSemaphorePermit, PathError> {
        let cost = bytes.clamp(BATCH_COST_MIN, self.room_max);
        let cost = u32::try_from(cost).expect("room_max is at most u32::MAX");
        tokio::select! {
            biased;
            () = self.state.stop.cancelled() => Err(self.state.failure()),
            permit = Arc::clone(&self.room).acquire_many_owned(cost) => permit.map_err(|_| PathError::Closed),
        }
    }

    /// Puts a batch on the lane with the least to do.
    fn queue(
        &self,
        epoch: Epoch,
        extents: Vec<Source>,
        bytes: usize,
        room: OwnedSemaphorePermit,
    ) -> Result<oneshot::Receiver<()>, PathError> {
        let (done, carried) = oneshot::channel();
        let order = lock(&self.order);
        if order.fenced.contains(&epoch) {
            return Err(PathError::Fenced { epoch });
        }
        let lane = order
            .lanes
            .iter()
            .min_by_key(|lane| lane.load.load(Ordering::Relaxed))
            .ok_or(PathError::Closed)?;
        lane.load.fetch_add(bytes, Ordering::Relaxed);
        let batch = Batch {
            epoch,
            extents,
            bytes,
            load: Arc::clone(&lane.load),
            done,
            _room: room,
        };
        lane.queue
            .send(LaneItem::Batch(batch))
            .map_err(|_| self.state.failure())?;
        Ok(carried)
    }

    async fn write(self: Arc<Self>, epoch: Epoch, extents: Vec<Extent>) -> Result<(), PathError> {
        let sources: Result<Vec<Source>, PathError> = extents
            .into_iter()
            .map(|extent| Source::new(&self.arena, epoch, extent))
            .collect();
        let mut sources = sources?.into_iter().peekable();
        let mut waits = Vec::new();
        while let Some(first) = sources.next() {
            let mut bytes = first.len();
            let mut batch = vec![first];
            while let Some(next) =
                sources.next_if(|next| batch.len() < BATCH_EXTENTS && bytes + next.len() <= BATCH_BYTES)
            {
                bytes += next.len();
                batch.push(next);
            }
            let room = self.room(bytes).await?;
            waits.push(self.queue(epoch, batch, bytes, room)?);
        }
        self.all(waits).await
    }

    /// Waits until all of it was carried.
    async fn all(&self, waits: Vec<oneshot::Receiver<()>>) -> Result<(), PathError> {
        for carried in waits {
            carried.await.map_err(|_| self.state.failure())?;
        }
        Ok(())
    }

    /// Puts the marker on every lane: a superset of those that carried the epoch, which needs no bookkeeping.
    fn mark(&self, epoch: Epoch) -> Result<Vec<oneshot::Receiver<()>>, PathError> {
        let mut order = lock(&self.order);
        if order.fenced.len() >= FENCED_REMEMBERED {
            order.fenced.pop_front();
        }
        order.fenced.push_back(epoch);
        order
            .lanes
            .iter()
            .map(|lane| {
                let (done, carried) = oneshot::channel();
                lane.queue
                    .send(LaneItem::Fence(Marker { epoch, done }))
                    .map_err(|_| self.state.failure())?;
                Ok(carried)
            })
            .collect()
    }
}

impl Path for LanePath {
    fn kind(&self) -> PathKind {
        self.0.kind
    }

    fn connections(&self) -> u32 {
        self.0.lanes
    }

    fn write(&self, epoch: Epoch, extents: Vec<Extent>) -> BoxFuture<'static, Result<(), PathError>> {
        Arc::clone(&self.0).write(epoch, extents).boxed()
    }

    fn fence(&self, epoch: Epoch) -> BoxFuture<'static, Result<(), PathError>> {
        let shared = Arc::clone(&self.0);
        // At once, not when polled: whoever asks for a fence before a later write means that order.
        let marked = shared.mark(epoch);
        async move { shared.all(marked?).await }.boxed()
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        let state = Arc::clone(&self.0.state);
        state.fail(PathError::Closed);
        async move { state.ended.cancelled().await }.boxed()
    }
}

/// No code that can panic runs under these locks, so what they guard is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
