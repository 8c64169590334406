//! The sender's half that all transports share: a path of several lanes, each one connection with one task that carries.
//!
//! Invariants:
//! - A write ends when its last batch was applied at the destination; its claims end when its batches were carried.
//! - Bytes queued and not yet carried are at most `bytes_in_flight_max` per path (one extent may be larger; it then goes
//!   alone). The lanes' channels have no bound of their own because this one holds for all of them together.
//! - A batch is queued, and an epoch fenced, under one lock: no batch of an epoch stands behind its marker in any lane.
//! - The first failure of any lane ends all of them: a path is whole or over.
//! - What was queued and not carried keeps its claims until *every* lane has closed its connection and ended.
//!
//! A lane that can carry on the writer's own thread says so with [`LaneQueue::driven_by`].
//!
//! A lane's task owns its [`LaneQueue`] and must drop its connection before it; [`PathState`] is shared by all.

use super::raw::{Sources, extent_bytes};
use super::{Extent, Path, PathError};
use crate::PathKind;
use baton_types::{ArenaView, Epoch};
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::task::AtomicWaker;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Most lanes of a path.
pub(super) const LANES_MAX: usize = 64;
/// A batch holds at most so many bytes (or one extent): enough to hide what a batch costs at both ends.
pub(super) const BATCH_BYTES: usize = 4 << 20;
/// Where a write is spread over lanes, its batches have at least so many bytes.
const BATCH_BYTES_MIN: usize = 256 << 10;
/// And at most so many extents.
pub(super) const BATCH_EXTENTS: usize = 1024;
/// Room is taken for a share of the bound at a time: each time wakes the writer.
const ROOM_SHARES: usize = 2;
/// Writes of so many bytes are carried on the writer's thread where they can be.
const INLINE_BYTES_MAX: usize = 256 << 10;
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
    pub(super) extents: Sources,
    bytes: usize,
    load: Arc<AtomicUsize>,
    ticket: Ticket,
    _room: OwnedSemaphorePermit,
}

impl Batch {
    /// All of it was applied at the destination: lets the claims go, makes room, tells the writer.
    pub(super) fn carried(self) {
        self.taken().applied();
    }

    /// Nothing reads the sources any more: lets the claims go and makes room. The writer is told by the ticket.
    pub(super) fn taken(self) -> Ticket {
        self.load.fetch_sub(self.bytes, Ordering::Relaxed);
        self.ticket
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// How a write learns that its batches were applied.
#[derive(Default)]
struct Progress {
    left: AtomicUsize,
    failed: AtomicBool,
    waker: AtomicWaker,
}

impl Progress {
    /// Ready once all tickets were applied, or one was not.
    fn poll(&self, context: &mut Context<'_>) -> Poll<Result<(), ()>> {
        let look = || match (self.failed.load(Ordering::Acquire), self.left.load(Ordering::Acquire)) {
            (true, _) => Poll::Ready(Err(())),
            (false, 0) => Poll::Ready(Ok(())),
            (false, _) => Poll::Pending,
        };
        if look().is_pending() {
            self.waker.register(context.waker());
        }
        look()
    }
}

/// One batch's part in the end of its write. Dropped without [`Ticket::applied`], the write has failed.
pub(super) struct Ticket(Option<Arc<Progress>>);

impl Ticket {
    fn of(progress: &Arc<Progress>) -> Self {
        progress.left.fetch_add(1, Ordering::Relaxed);
        Self(Some(Arc::clone(progress)))
    }

    /// The batch was applied at the destination.
    pub(super) fn applied(mut self) {
        if let Some(progress) = self.0.take()
            && progress.left.fetch_sub(1, Ordering::AcqRel) == 1
        {
            // The writer may have gone; its extents were sent all the same.
            progress.waker.wake();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(progress) = self.0.take() {
            progress.failed.store(true, Ordering::Release);
            progress.waker.wake();
        }
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

/// Who carries a lane's items, to be told that there are some.
pub(super) trait Drive: Send + Sync {
    /// There is a new item. `inline`: it is small, carry it now and on this thread if that takes no more than some
    /// microseconds.
    fn drive(&self, inline: bool);
}

/// The carrying end of one lane. Dropping it says that the lane's connection is closed and its task over.
pub(super) struct LaneQueue {
    state: Arc<PathState>,
    queue: Option<mpsc::UnboundedReceiver<LaneItem>>,
    driver: Arc<OnceLock<Weak<dyn Drive>>>,
    torn: Vec<LaneItem>,
}

impl LaneQueue {
    /// From now on this one is told of each new item. Said once, before the path is used.
    pub(super) fn driven_by(&self, driver: Weak<dyn Drive>) {
        // A lane has one carrier.
        let _ = self.driver.set(driver);
    }

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

#[derive(Clone)]
struct Lane {
    queue: mpsc::UnboundedSender<LaneItem>,
    load: Arc<AtomicUsize>,
    driver: Arc<OnceLock<Weak<dyn Drive>>>,
}

impl Lane {
    /// Tells who carries; not under the lock on the order of things.
    fn drive(&self, inline: bool) {
        if let Some(driver) = self.driver.get().and_then(Weak::upgrade) {
            driver.drive(inline);
        }
    }
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
            let driver = Arc::new(OnceLock::new());
            lanes.push(Lane {
                queue: sender,
                load: Arc::default(),
                driver: Arc::clone(&driver),
            });
            queues.push(LaneQueue {
                state: Arc::clone(&state),
                queue: Some(receiver),
                driver,
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
    /// Waits for room for so many bytes.
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
        extents: (Epoch, Sources),
        bytes: usize,
        room: OwnedSemaphorePermit,
        ticket: Ticket,
    ) -> Result<Lane, PathError> {
        let (epoch, extents) = extents;
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
            ticket,
            _room: room,
        };
        lane.queue
            .send(LaneItem::Batch(batch))
            .map_err(|_| self.state.failure())?;
        Ok(lane.clone())
    }

    async fn write(self: Arc<Self>, epoch: Epoch, extents: Vec<Extent>) -> Result<(), PathError> {
        // All of them are looked at first: where one is none, nothing is sent.
        let mut total = 0;
        for extent in &extents {
            total += extent_bytes(&self.arena, extent)?;
        }
        let inline = total <= INLINE_BYTES_MAX;
        let batch_bytes = (total / self.lanes as usize).clamp(BATCH_BYTES_MIN, BATCH_BYTES);
        let room_bytes = (self.room_max / ROOM_SHARES).max(1);
        let progress = Arc::new(Progress::default());
        let mut extents = extents.into_iter().peekable();
        while extents.peek().is_some() {
            let (mut batches, mut bytes) = (Vec::new(), 0);
            while let Some(batch) = self.next_batch(&mut extents, batch_bytes, room_bytes.saturating_sub(bytes))? {
                bytes += batch.1;
                batches.push(batch);
            }
            let mut room = self.room(bytes).await?;
            let last = batches.len() - 1;
            for ((batch, bytes), index) in batches.into_iter().zip(0..) {
                // The last takes what is left of the room, which may be more or less than its bytes.
                let left = room.num_permits();
                let own = if index == last { left } else { bytes.min(left) };
                let own = room.split(own).ok_or(PathError::Closed)?;
                let batch = Sources::new(&self.arena, epoch, batch)?;
                let lane = self.queue((epoch, batch), bytes, own, Ticket::of(&progress))?;
                lane.drive(inline);
            }
        }
        let applied = poll_fn(|context| progress.poll(context)).await;
        applied.map_err(|()| self.state.failure())
    }

    /// The next extents that travel together, and their bytes; none where the room for this time is used up.
    fn next_batch(
        &self,
        extents: &mut std::iter::Peekable<std::vec::IntoIter<Extent>>,
        batch_bytes: usize,
        room: usize,
    ) -> Result<Option<(Vec<Extent>, usize)>, PathError> {
        if room == 0 {
            return Ok(None);
        }
        let Some(first) = extents.next() else { return Ok(None) };
        let mut bytes = extent_bytes(&self.arena, &first)?;
        // Most batches are of extents of one size.
        let most = batch_bytes.min(room.max(bytes));
        let mut batch = Vec::with_capacity((most / bytes.max(1)).clamp(1, BATCH_EXTENTS).min(1 + extents.len()));
        batch.push(first);
        while let Some(next) = extents.peek()
            && batch.len() < BATCH_EXTENTS
        {
            let more = extent_bytes(&self.arena, next)?;
            if bytes + more > most {
                break;
            }
            bytes += more;
            batch.extend(extents.next());
        }
        Ok(Some((batch, bytes)))
    }

    /// Waits until all of them were carried.
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
        let mark = |lane: &Lane| {
            let (done, carried) = oneshot::channel();
            let marker = LaneItem::Fence(Marker { epoch, done });
            lane.queue.send(marker).map_err(|_| self.state.failure())?;
            Ok(carried)
        };
        let marked = order.lanes.iter().map(mark).collect();
        let lanes = order.lanes.clone();
        drop(order);
        lanes.iter().for_each(|lane| lane.drive(true));
        marked
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
