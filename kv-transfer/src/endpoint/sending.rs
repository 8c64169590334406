//! The sender's driver of one hand-over: performs the effects of its machine. The machine and the queue of extents stand
//! under one lock; whoever brings an event performs what needs no waiting, and the hand-over's task does the rest: it links
//! up, writes, fences, and watches the time.

use super::link::{Link, Links};
use super::outgoing::{Granted, HandoverReport, OutgoingSpec};
use super::peer_paths::{PathWish, SharedPath};
use super::stats::Counters;
use crate::session::{Header, Outcome, Sender, SenderEffect, SenderEvent, SenderLimits};
use crate::transport::{Extent, Path, PathError, SourceClaim};
use crate::{Peer, TransferError};
use baton_node_runtime::{Clock, Moment};
use baton_types::{Attempt, BlockId, Epoch, KvGeometry, Ticket};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// Extents of one write: enough to keep every connection busy, few enough that a fence need not wait long.
const BATCH: usize = 256;

pub(super) struct SendingParts {
    pub spec: OutgoingSpec,
    pub geometry: KvGeometry,
    pub fence_timeout: Duration,
    pub answer_timeout: Duration,
    pub clock: Clock,
    pub counters: Arc<Counters>,
}

/// One hand-over being made.
pub(super) struct Sending {
    ticket: Ticket,
    attempt: Attempt,
    context_tokens: u64,
    peer: Peer,
    /// What paths are chosen by.
    wish: PathWish,
    layer_bytes: u64,
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
    path: Option<Arc<SharedPath>>,
    queue: VecDeque<Extent>,
    fence: Option<Epoch>,
    /// Something went to the path under the grant.
    wrote: bool,
    bytes: u64,
    asked_at: Option<Moment>,
    granted_at: Option<Moment>,
    completed_at: Option<Moment>,
    ended_at: Option<Moment>,
}

/// What the task waits for.
enum Done {
    Written(Result<(), PathError>),
    Fenced(u32, Result<(), PathError>),
}

impl Sending {
    pub(super) fn new(parts: SendingParts) -> Self {
        let SendingParts {
            spec,
            geometry,
            fence_timeout,
            answer_timeout,
            clock,
            counters,
        } = parts;
        let limits = SenderLimits {
            layers: geometry.layers,
            deadline: spec.deadline,
            fence_timeout,
            answer_timeout,
        };
        let state = State {
            machine: Sender::new(limits),
            link: None,
            path: None,
            queue: VecDeque::new(),
            fence: None,
            wrote: false,
            bytes: 0,
            asked_at: None,
            granted_at: None,
            completed_at: None,
            ended_at: None,
        };
        let started = clock.now();
        let bytes = (geometry.blocks_for(spec.context_tokens) * geometry.block_bytes()) as u64;
        let wish = PathWish {
            bytes,
            deadline: started + spec.deadline,
        };
        Self {
            ticket: spec.ticket,
            attempt: spec.attempt,
            context_tokens: spec.context_tokens as u64,
            peer: spec.peer,
            wish,
            layer_bytes: geometry.layer_bytes() as u64,
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
        self.perform(&mut state);
        let newly_granted = state.granted_at.is_none() && state.machine.grant().is_some();
        let newly_ended = state.ended_at.is_none() && state.machine.outcome().is_some();
        let mut unsent = VecDeque::new();
        if newly_granted {
            state.granted_at = Some(self.started + now);
        }
        if newly_ended {
            state.ended_at = Some(self.started + now);
            self.count(&state);
            unsent = std::mem::take(&mut state.queue);
        }
        drop(state);
        // Their claims are the role's objects: dropped without the lock.
        drop(unsent);
        if newly_granted || newly_ended {
            self.changed.send_replace(());
        }
        self.wake.notify_one();
    }

    fn perform(&self, state: &mut State) {
        for effect in state.machine.take_effects() {
            let Some(link) = &state.link else { continue };
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
                SenderEffect::BreakLink => link.break_off(),
            }
        }
    }

    fn count(&self, state: &State) {
        match (state.machine.outcome(), state.machine.path()) {
            (Some(Ok(())), Some(path)) => {
                let report = self.report(state);
                self.counters.sent(path, report.0, report.1, report.2);
            }
            (Some(Err(error)), path) => {
                tracing::debug!(ticket = %self.ticket, attempt = self.attempt.0, %error, "hand-over failed");
                self.counters.failed(path, "out");
            }
            (Some(Ok(())), None) | (None, _) => {}
        }
    }

    /// Bytes, exposed time, wait for the grant.
    fn report(&self, state: &State) -> (u64, Duration, Duration) {
        let between = |from: Option<Moment>, to: Option<Moment>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_since(from),
            (Some(_) | None, _) => Duration::ZERO,
        };
        let exposed = between(state.completed_at, state.ended_at);
        (state.bytes, exposed, between(state.asked_at, state.granted_at))
    }

    pub(super) async fn granted(&self) -> Result<Granted, TransferError> {
        self.handle(SenderEvent::Reserve {
            context_tokens: self.context_tokens,
        });
        self.wait(|state| match (state.machine.outcome(), state.machine.grant()) {
            (Some(outcome), _) => Some(Err(failure(outcome))),
            (None, Some(grant)) => Some(Ok(Granted {
                epoch: grant.epoch,
                held: grant.held as usize,
                wanted: grant.wanted.clone(),
            })),
            (None, None) => None,
        })
        .await
    }

    pub(super) async fn committed(&self) -> Result<HandoverReport, TransferError> {
        self.wait(|state| match (state.machine.outcome()?, state.machine.path()) {
            (Ok(()), Some(path)) => {
                let (bytes, exposed, reserve_wait) = self.report(state);
                Some(Ok(HandoverReport {
                    path,
                    fallbacks: Vec::new(),
                    bytes,
                    busy: state.path.as_ref().map_or(Duration::ZERO, |path| path.busy()),
                    exposed,
                    reserve_wait,
                }))
            }
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
        let wanted = state.machine.push(now, ordinal, &layers);
        if let Ok(Some(destination)) = wanted {
            state.bytes += layers.len() as u64 * self.layer_bytes;
            state.queue.push_back(Extent {
                ordinal,
                layers,
                source,
                destination,
                claim,
            });
        }
        // An error may have ended the attempt.
        self.settle(state, now);
        wanted.map(drop)
    }

    /// The hand-over's task.
    pub(super) async fn run(self: Arc<Self>, links: Arc<Links>) {
        let Some(link) = self.link_up(&links).await else {
            return;
        };
        if let Some(path) = self.path_up(&links).await {
            self.drive(&*path).await;
            let broken = matches!(
                self.lock().machine.outcome(),
                Some(Err(TransferError::PathFailed { .. }))
            );
            if broken {
                path.close().await;
            }
        }
        link.deregister(&self);
    }

    /// Opens a path, unless the hand-over ends before.
    async fn path_up(&self, links: &Links) -> Option<Arc<SharedPath>> {
        let opening = links.path(&self.peer, self.wish, &[]);
        tokio::pin!(opening);
        let opened = loop {
            let (over, next_tick) = self.look();
            if over {
                return None;
            }
            tokio::select! {
                opened = &mut opening => break opened,
                () = self.wake.notified() => {}
                () = self.clock.sleep_until(next_tick) => self.handle(SenderEvent::Tick),
            }
        };
        match opened {
            Ok(path) => {
                self.lock().path = Some(Arc::clone(&path));
                self.handle(SenderEvent::Connected { path: path.kind() });
                Some(path)
            }
            Err(error) => {
                self.handle(SenderEvent::ConnectFailed { error });
                None
            }
        }
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

    async fn drive(&self, path: &dyn Path) {
        let mut working: Option<BoxFuture<'static, Done>> = None;
        loop {
            let (over, next_tick) = self.look();
            if over {
                return;
            }
            self.next_work(path, &mut working);
            let work = async {
                match working.as_mut() {
                    Some(work) => work.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                done = work => {
                    working = None;
                    self.done(done);
                }
                () = self.wake.notified() => {}
                () = self.clock.sleep_until(next_tick) => self.handle(SenderEvent::Tick),
            }
        }
    }

    /// A fence goes before what is not yet in the wire's queue: dropping a write stops it.
    fn next_work(&self, path: &dyn Path, working: &mut Option<BoxFuture<'static, Done>>) {
        let mut state = self.lock();
        if let Some(epoch) = state.fence.take() {
            if !state.wrote {
                drop(state);
                *working = Some(async { Done::Fenced(0, Ok(())) }.boxed());
                return;
            }
            drop(state);
            let connections = path.connections();
            *working = Some(
                path.fence(epoch)
                    .map(move |sent| Done::Fenced(connections, sent))
                    .boxed(),
            );
        } else if working.is_none()
            && !state.queue.is_empty()
            && let Some(epoch) = state.machine.grant().map(|grant| grant.epoch)
        {
            state.wrote = true;
            let count = state.queue.len().min(BATCH);
            let extents: Vec<Extent> = state.queue.drain(..count).collect();
            drop(state);
            *working = Some(path.write(epoch, extents).map(Done::Written).boxed());
        }
    }

    fn done(&self, done: Done) {
        match done {
            Done::Written(Ok(())) => {
                if self.lock().queue.is_empty() {
                    self.handle(SenderEvent::Drained);
                }
            }
            Done::Written(Err(error)) => {
                let path = self
                    .lock()
                    .machine
                    .path()
                    .map_or_else(String::new, |path| path.to_string());
                let error = TransferError::PathFailed {
                    path,
                    reason: error.to_string(),
                };
                self.handle(SenderEvent::WriteFailed { error });
            }
            Done::Fenced(connections, Ok(())) => self.handle(SenderEvent::FenceSent { connections }),
            Done::Fenced(_, Err(_)) => self.handle(SenderEvent::FenceFailed),
        }
    }
}

fn failure(outcome: &Outcome) -> TransferError {
    outcome.clone().err().unwrap_or(TransferError::AlreadyCommitted)
}
