//! The sender's driver of one hand-over: performs the effects of its machine. The machine and the queue of extents stand
//! under one lock; whoever brings an event performs what needs no waiting, and the hand-over's task does the rest: it links
//! up, opens paths, sums, writes, fences, and watches the time.
//!
//! Every extent that was pushed is kept, with its claim, until the outcome: another path may have to write it again.

use super::digest::Digester;
use super::link::{Link, Links};
use super::outgoing::{Granted, HandoverReport, OutgoingSpec};
use super::peer_paths::{PathWish, SharedPath};
use super::stats::Counters;
use crate::session::{Header, Outcome, Push, Sender, SenderEffect, SenderEvent, SenderLimits};
use crate::transport::{Extent, Path, PathError, SourceClaim};
use crate::{PathKind, Peer, TransferError};
use baton_node_runtime::{Clock, Moment};
use baton_types::{Attempt, BlockId, Epoch, KvGeometry, Ticket};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// Extents and bytes of one write: enough to keep every connection busy, few enough that a fence need not wait long.
const BATCH: usize = 256;
const BATCH_BYTES: u64 = 8 << 20;

pub(super) struct SendingParts {
    pub spec: OutgoingSpec,
    pub geometry: KvGeometry,
    pub fence_timeout: Duration,
    pub answer_timeout: Duration,
    /// Where the receiver is to be told a digest.
    pub digester: Option<Digester>,
    pub clock: Clock,
    pub counters: Arc<Counters>,
}

/// One hand-over being made.
pub(super) struct Sending {
    ticket: Ticket,
    attempt: Attempt,
    context_tokens: u64,
    peer: Peer,
    layer_bytes: u64,
    /// What paths are chosen by.
    wish: PathWish,
    digester: Option<Digester>,
    clock: Clock,
    started: Moment,
    counters: Arc<Counters>,
    state: Mutex<State>,
    /// The task has something to do.
    wake: Notify,
    /// Grant or outcome changed.
    changed: watch::Sender<()>,
}

struct State {
    machine: Sender,
    link: Option<Arc<Link>>,
    /// What was pushed, in that order.
    kept: Vec<Kept>,
    /// Those of it that are to be written under the current grant.
    queue: VecDeque<usize>,
    fence: Option<Epoch>,
    /// Kinds of path that broke: another is to be found.
    next_path: Option<Vec<PathKind>>,
    /// The path is to be closed at the end.
    close_path: bool,
    /// Something went to the path under the grant.
    wrote: bool,
    /// For so long paths that broke were at work.
    busy_before: Duration,
    path: Option<Arc<SharedPath>>,
    /// The first grant, which the role knows.
    granted: Option<Granted>,
    bytes: u64,
    asked_at: Option<Moment>,
    granted_at: Option<Moment>,
    completed_at: Option<Moment>,
    ended_at: Option<Moment>,
}

struct Kept {
    ordinal: u32,
    layers: Range<u32>,
    source: BlockId,
    claim: SourceClaim,
    /// It is in the digest.
    summed: bool,
}

/// What the task waits for.
enum Done {
    Written(Epoch, Result<(), PathError>),
    Fenced(u32, Result<(), PathError>),
}

/// What the task does: at most one thing each.
#[derive(Default)]
struct Work {
    path: Option<Arc<SharedPath>>,
    opening: Option<BoxFuture<'static, Result<Arc<SharedPath>, TransferError>>>,
    writing: Option<BoxFuture<'static, Done>>,
    closing: Option<BoxFuture<'static, ()>>,
}

impl Sending {
    pub(super) fn new(parts: SendingParts) -> Self {
        let SendingParts {
            spec,
            geometry,
            fence_timeout,
            answer_timeout,
            digester,
            clock,
            counters,
        } = parts;
        let limits = SenderLimits {
            layers: geometry.layers,
            deadline: spec.deadline,
            fence_timeout,
            answer_timeout,
            digest: digester.is_some(),
        };
        let state = State {
            machine: Sender::new(limits),
            link: None,
            kept: Vec::new(),
            queue: VecDeque::new(),
            fence: None,
            next_path: None,
            close_path: false,
            wrote: false,
            busy_before: Duration::ZERO,
            path: None,
            granted: None,
            bytes: 0,
            asked_at: None,
            granted_at: None,
            completed_at: None,
            ended_at: None,
        };
        let started = clock.now();
        let wish = PathWish::new(&spec, &geometry, started);
        Self {
            ticket: spec.ticket,
            attempt: spec.attempt,
            context_tokens: spec.context_tokens as u64,
            peer: spec.peer,
            layer_bytes: geometry.layer_bytes() as u64,
            wish,
            digester,
            clock,
            started,
            counters,
            state: Mutex::new(state),
            wake: Notify::new(),
            changed: watch::Sender::new(()),
        }
    }

    pub(super) fn key(&self) -> (Ticket, Attempt) {
        (self.ticket, self.attempt)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.clock.now().saturating_since(self.started)
    }

    /// Brings an event to the machine and performs what follows from it.
    pub(super) fn handle(&self, event: SenderEvent) {
        let now = self.now();
        let mut state = self.lock();
        match &event {
            SenderEvent::Reserve { .. } => drop(state.asked_at.get_or_insert(self.started + now)),
            SenderEvent::Complete { .. } => drop(state.completed_at.get_or_insert(self.started + now)),
            _ => {}
        }
        state.machine.handle(now, event);
        self.settle(state, now);
    }

    /// Performs effects, and says what became of the hand-over to those who wait for it.
    fn settle(&self, mut state: MutexGuard<'_, State>, now: Duration) {
        self.perform(&mut state, now);
        let first = state.machine.grant().filter(|_| state.granted.is_none());
        let first = first.map(|grant| Granted {
            epoch: grant.epoch,
            held: grant.held as usize,
            wanted: grant.wanted.clone(),
        });
        let newly_granted = first.is_some();
        let newly_ended = state.ended_at.is_none() && state.machine.outcome().is_some();
        let mut kept = Vec::new();
        if newly_granted {
            state.granted = first;
            state.granted_at = Some(self.started + now);
        }
        if newly_ended {
            state.ended_at = Some(self.started + now);
            self.count(&state);
            state.queue.clear();
            kept = std::mem::take(&mut state.kept);
        }
        drop(state);
        // Their claims are the role's objects: dropped without the lock.
        drop(kept);
        if newly_granted || newly_ended {
            self.changed.send_replace(());
        }
        self.wake.notify_one();
    }

    fn perform(&self, state: &mut State, now: Duration) {
        loop {
            let effects = state.machine.take_effects();
            if effects.is_empty() {
                return;
            }
            for effect in effects {
                self.perform_one(state, now, effect);
            }
        }
    }

    fn perform_one(&self, state: &mut State, now: Duration, effect: SenderEffect) {
        let Some(link) = &state.link else { return };
        match effect {
            SenderEffect::Send { epoch, message } => {
                let header = Header {
                    ticket: self.ticket,
                    attempt: self.attempt,
                    epoch,
                };
                link.tell(&header, &message);
            }
            SenderEffect::Fence { epoch } => state.fence = Some(epoch),
            SenderEffect::NextPath { failed } => {
                state.queue.clear();
                state.next_path = Some(failed);
            }
            SenderEffect::Rewrite => {
                let grant = state.machine.grant();
                let wanted = |kept: &Kept| grant.is_some_and(|grant| grant.destination(kept.ordinal).is_some());
                let again = state.kept.iter().enumerate().filter(|(_, kept)| wanted(kept));
                state.queue = again.map(|(at, _)| at).collect();
                if state.queue.is_empty() {
                    state.machine.handle(now, SenderEvent::Drained);
                }
            }
            SenderEffect::ClosePath => state.close_path = true,
        }
    }

    fn count(&self, state: &State) {
        match (state.machine.outcome(), state.machine.path()) {
            (Some(Ok(())), Some(path)) => self.counters.sent(&self.report(state, path)),
            (Some(Err(error)), path) => {
                tracing::debug!(ticket = %self.ticket, attempt = self.attempt.0, %error, "hand-over failed");
                self.counters.failed(path, "out");
            }
            (Some(Ok(())), None) | (None, _) => {}
        }
    }

    fn report(&self, state: &State, path: PathKind) -> HandoverReport {
        let between = |from: Option<Moment>, to: Option<Moment>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_since(from),
            (Some(_) | None, _) => Duration::ZERO,
        };
        let busy = state.path.as_ref().map_or(Duration::ZERO, |path| path.busy());
        HandoverReport {
            path,
            fallbacks: state.machine.fallbacks().to_vec(),
            bytes: state.bytes,
            busy: state.busy_before + busy,
            exposed: between(state.completed_at, state.ended_at),
            reserve_wait: between(state.asked_at, state.granted_at),
        }
    }

    pub(super) async fn granted(&self) -> Result<Granted, TransferError> {
        self.handle(SenderEvent::Reserve {
            context_tokens: self.context_tokens,
        });
        self.wait(|state| match (state.machine.outcome(), &state.granted) {
            (Some(outcome), _) => Some(Err(failure(outcome))),
            (None, Some(granted)) => Some(Ok(granted.clone())),
            (None, None) => None,
        })
        .await
    }

    pub(super) async fn committed(&self) -> Result<HandoverReport, TransferError> {
        self.wait(|state| match (state.machine.outcome()?, state.machine.path()) {
            (Ok(()), Some(path)) => Some(Ok(self.report(state, path))),
            (outcome, _) => Some(Err(failure(outcome))),
        })
        .await
    }

    pub(super) async fn failed(&self) -> TransferError {
        self.wait(|state| state.machine.outcome()?.clone().err()).await
    }

    async fn wait<T>(&self, look: impl Fn(&State) -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(found) = look(&self.lock()) {
                return found;
            }
            // Never an error: the channel's sender is this object's own.
            let _ = changed.changed().await;
        }
    }

    pub(super) fn push(
        &self,
        ordinal: u32,
        layers: Range<u32>,
        source: BlockId,
        claim: SourceClaim,
    ) -> Result<(), TransferError> {
        let now = self.now();
        let mut state = self.lock();
        let pushed = state.machine.push(now, ordinal, &layers);
        if let Ok(push @ (Push::Write(_) | Push::Keep)) = pushed {
            state.bytes += layers.len() as u64 * self.layer_bytes;
            let at = state.kept.len();
            state.kept.push(Kept {
                ordinal,
                layers,
                source,
                claim,
                summed: false,
            });
            if matches!(push, Push::Write(_)) {
                state.queue.push_back(at);
            }
        }
        // An error may have ended the attempt.
        self.settle(state, now);
        pushed.map(drop)
    }

    /// The hand-over's task.
    pub(super) async fn run(self: Arc<Self>, links: Arc<Links>) {
        let Some(link) = self.link_up(&links).await else {
            return;
        };
        let mut work = Work::default();
        self.open(&links, &mut work, Vec::new());
        self.drive(&links, &mut work).await;
        let close = self.lock().close_path;
        if let (true, Some(path)) = (close, &work.path) {
            path.close().await;
        }
        if let Some(closing) = work.closing {
            closing.await;
        }
        link.deregister(&self);
    }

    /// Opens a path that is none of these kinds.
    fn open(self: &Arc<Self>, links: &Arc<Links>, work: &mut Work, excluding: Vec<PathKind>) {
        let (this, links) = (Arc::clone(self), Arc::clone(links));
        work.opening = Some(async move { links.path(&this.peer, this.wish, &excluding).await }.boxed());
    }

    /// Links up, unless the hand-over ends before.
    async fn link_up(self: &Arc<Self>, links: &Arc<Links>) -> Option<Arc<Link>> {
        let mut making = match links.to(&self.peer) {
            Ok(making) => making,
            Err(error) => {
                self.handle(SenderEvent::ConnectFailed { error });
                return None;
            }
        };
        let linked = loop {
            let (over, next_tick) = self.look();
            if over {
                return None;
            }
            tokio::select! {
                made = making.wait_for(Option::is_some) => break match made {
                    Ok(made) => made.clone(),
                    Err(_) => None,
                },
                () = self.wake.notified() => {}
                () = self.clock.sleep_until(next_tick) => self.handle(SenderEvent::Tick),
            }
        };
        let linked = linked.unwrap_or(Err(TransferError::ShuttingDown));
        let linked = linked.and_then(|link| link.register(self).map(|()| link));
        match linked {
            Err(error) => {
                self.handle(SenderEvent::ConnectFailed { error });
                None
            }
            Ok(link) => {
                self.lock().link = Some(Arc::clone(&link));
                Some(link)
            }
        }
    }

    /// Whether all is over, and when to look again.
    fn look(&self) -> (bool, Moment) {
        let state = self.lock();
        (state.machine.is_over(), self.started + state.machine.next_tick())
    }

    async fn drive(self: &Arc<Self>, links: &Arc<Links>, work: &mut Work) {
        loop {
            let (over, next_tick) = self.look();
            if over {
                return;
            }
            self.next_work(links, work);
            tokio::select! {
                done = optional(&mut work.writing) => {
                    work.writing = None;
                    self.done(done);
                }
                opened = optional(&mut work.opening) => {
                    work.opening = None;
                    self.opened(opened, work);
                }
                () = optional(&mut work.closing) => work.closing = None,
                () = self.wake.notified() => {}
                () = self.clock.sleep_until(next_tick) => self.handle(SenderEvent::Tick),
            }
        }
    }

    fn opened(&self, opened: Result<Arc<SharedPath>, TransferError>, work: &mut Work) {
        match opened {
            Ok(path) => {
                let kind = path.kind();
                let before = self.lock().path.replace(Arc::clone(&path));
                if let Some(before) = before {
                    self.lock().busy_before += before.busy();
                }
                work.path = Some(path);
                self.handle(SenderEvent::Connected { path: kind });
                if let Some(fallback) = self.lock().machine.fallbacks().last() {
                    self.counters.fell_back(self.ticket, fallback);
                }
            }
            Err(error) => self.handle(SenderEvent::ConnectFailed { error }),
        }
    }

    /// What goes first: leaving a path that broke, then a fence, which goes before what is not yet in the wire's queue
    /// (dropping a write stops it), then a batch.
    fn next_work(self: &Arc<Self>, links: &Arc<Links>, work: &mut Work) {
        let mut state = self.lock();
        if let Some(failed) = state.next_path.take() {
            state.wrote = false;
            drop(state);
            work.writing = None;
            if let Some(broken) = work.path.take() {
                let before = work.closing.take();
                let closing = async move {
                    broken.close().await;
                    if let Some(before) = before {
                        before.await;
                    }
                };
                work.closing = Some(closing.boxed());
            }
            return self.open(links, work, failed);
        }
        let Some(path) = &work.path else { return };
        if let Some(epoch) = state.fence.take() {
            let wrote = state.wrote;
            drop(state);
            let connections = path.connections();
            work.writing = Some(match wrote {
                false => async { Done::Fenced(0, Ok(())) }.boxed(),
                true => path
                    .fence(epoch)
                    .map(move |sent| Done::Fenced(connections, sent))
                    .boxed(),
            });
        } else if work.writing.is_none() {
            work.writing = self.batch(state, path);
        }
    }

    /// Takes what is next in the queue, and sums it where it was not yet.
    fn batch(
        self: &Arc<Self>,
        mut state: MutexGuard<'_, State>,
        path: &Arc<SharedPath>,
    ) -> Option<BoxFuture<'static, Done>> {
        let epoch = state.machine.grant()?.epoch;
        let (mut extents, mut unsummed, mut bytes) = (Vec::new(), Vec::new(), 0);
        while let Some(at) = state.queue.front().copied()
            && extents.len() < BATCH
            && (bytes < BATCH_BYTES || extents.is_empty())
        {
            state.queue.pop_front();
            let kept = &state.kept[at];
            let Some(destination) = state.machine.grant()?.destination(kept.ordinal) else {
                continue;
            };
            let extent = Extent {
                ordinal: kept.ordinal,
                layers: kept.layers.clone(),
                source: kept.source,
                destination,
                claim: SourceClaim::clone(&kept.claim),
            };
            bytes += kept.layers.len() as u64 * self.layer_bytes;
            if self.digester.is_some() && !kept.summed {
                unsummed.push((at, extent.clone()));
            }
            extents.push(extent);
        }
        if extents.is_empty() {
            return None;
        }
        state.wrote = true;
        drop(state);
        let (this, path) = (Arc::clone(self), Arc::clone(path));
        let writing = async move {
            if let Err(error) = this.sum(unsummed).await {
                return Done::Written(epoch, Err(error));
            }
            Done::Written(epoch, path.write(epoch, extents).await)
        };
        Some(writing.boxed())
    }

    async fn sum(&self, unsummed: Vec<(usize, Extent)>) -> Result<(), PathError> {
        let Some(digester) = self.digester.as_ref().filter(|_| !unsummed.is_empty()) else {
            return Ok(());
        };
        let sums = digester
            .sums(unsummed.iter().map(|(_, extent)| extent.clone()).collect())
            .await?;
        for ((at, extent), sum) in unsummed.into_iter().zip(sums) {
            if let Some(kept) = self.lock().kept.get_mut(at) {
                kept.summed = true;
            }
            let layers = extent.layers.end - extent.layers.start;
            self.handle(SenderEvent::Summed {
                ordinal: extent.ordinal,
                layers,
                sum,
            });
        }
        Ok(())
    }

    fn done(&self, done: Done) {
        match done {
            Done::Written(_, Ok(())) => {
                if self.lock().queue.is_empty() {
                    self.handle(SenderEvent::Drained);
                }
            }
            Done::Written(epoch, Err(error)) => {
                let path = self.lock().machine.path();
                let failed = TransferError::PathFailed {
                    path: path.map_or_else(String::new, |path| path.to_string()),
                    reason: error.to_string(),
                };
                // What is wrong with the extents is wrong with them on every path.
                self.handle(match error.is_retryable() {
                    true => SenderEvent::WriteFailed { epoch, error: failed },
                    false => SenderEvent::Abort { error: failed },
                });
            }
            Done::Fenced(connections, Ok(())) => self.handle(SenderEvent::FenceSent { connections }),
            Done::Fenced(_, Err(_)) => self.handle(SenderEvent::FenceFailed),
        }
    }
}

/// What the future gives; pending where there is none.
async fn optional<T>(future: &mut Option<BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

fn failure(outcome: &Outcome) -> TransferError {
    outcome.clone().err().unwrap_or(TransferError::AlreadyCommitted)
}
