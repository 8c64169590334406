//! The writer's end of one queue pair: batches become chains of work requests, completions let their claims go.
//!
//! Invariants: never more work requests are posted than the queue holds, nor more notifications than the receiver has posted
//! receives (its credits). The last request of every chain and of every batch asks for a completion. A batch is carried when
//! its last request completed with success, and so all before it; after a failure its claims go only once the queue pair is
//! destroyed.

use super::arena::RemoteArena;
use super::pair::{Done, PairEnd};
use super::plan::{Piece, Plan, Step, WriteLimits};
use super::verbs::{Chain, Completion, Failure, VerbsError, Work};
use super::wire::{Message, Slots};
use crate::PathKind;
use crate::transport::lanes::{Batch, LaneItem, LaneQueue};
use crate::transport::{PathError, metric};
use baton_node_runtime::{Clock, Moment};
use std::any::Any;
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;

/// Most requests of one post.
const CHAIN_MAX: usize = 64;
/// Most bytes of one write: a completion is never far away.
const WRITE_BYTES_MAX: u32 = 1 << 20;
/// Steps planned ahead of what is posted: enough to fill a chain.
const PLANNED_MIN: usize = 2 * CHAIN_MAX;
/// Messages of the receiver that can be on their way: it returns credits by the quarter.
pub(super) const CREDIT_RECEIVES: usize = 8;
/// Messages being sent at once.
pub(super) const MESSAGES: usize = 64;

/// An item of the lane with what is left to post of it.
struct Job {
    plan: Plan,
    item: LaneItem,
}

/// Requests that were posted, up to one that asks for a completion.
struct Flight {
    last: u64,
    requests: usize,
    messages: Vec<usize>,
    /// The item that ends with them.
    item: Option<LaneItem>,
}

/// What of the connection is not the queue pair.
pub(super) struct SenderParts {
    pub(super) remote: Arc<RemoteArena>,
    /// Receives that the peer has posted.
    pub(super) credits: usize,
    /// The rendezvous, with one of a path's queue pairs.
    pub(super) rendezvous: Option<TcpStream>,
    pub(super) queue: LaneQueue,
    pub(super) clock: Clock,
    pub(super) progress_timeout: Duration,
}

/// One queue pair of a path.
pub(super) struct Sender {
    end: PairEnd,
    parts: SenderParts,
    limits: WriteLimits,
    slots: Slots,
    jobs: VecDeque<Job>,
    planned: usize,
    chain: Chain,
    /// What was put into the chain since the last request that asks for a completion.
    open: Flight,
    flights: VecDeque<Flight>,
    /// Requests that the queue still takes.
    room: usize,
    next: u64,
    done: Vec<Completion>,
}

impl Sender {
    pub(super) fn new(end: PairEnd, parts: SenderParts) -> Self {
        let capacity = end.capacity();
        Self {
            limits: WriteLimits {
                parts: capacity.parts.max(1) as usize,
                bytes: WRITE_BYTES_MAX.min(end.port().message_bytes.max(1)),
            },
            room: capacity.sends as usize,
            end,
            parts,
            slots: Slots::default(),
            jobs: VecDeque::new(),
            planned: 0,
            chain: Chain::default(),
            open: Flight::new(),
            flights: VecDeque::new(),
            next: 0,
            done: Vec::new(),
        }
    }

    /// Carries until the path ends.
    pub(super) async fn run(mut self) {
        if let Err(error) = self.carry().await {
            self.parts.queue.state().fail(error);
        }
        let Self {
            mut end,
            parts,
            jobs,
            open,
            flights,
            ..
        } = self;
        let SenderParts {
            mut queue, rendezvous, ..
        } = parts;
        let flying = flights.into_iter().chain([open]).filter_map(|flight| flight.item);
        let items: Vec<_> = flying.chain(jobs.into_iter().map(|job| job.item)).collect();
        let items = Arc::new(items);
        end.guard(Arc::clone(&items) as Arc<dyn Any + Send + Sync>);
        drop(end);
        drop(rendezvous);
        // None where the queue pair could not be destroyed: it may read them still, so their claims never go.
        for item in Arc::into_inner(items).into_iter().flatten() {
            queue.give_back(item);
        }
    }

    /// Ok where the path was stopped or dropped.
    async fn carry(&mut self) -> Result<(), PathError> {
        let stop = self.parts.queue.stopped();
        let mut progress = self.parts.clock.now();
        loop {
            let mut moved = self.settle()?;
            while self.planned < PLANNED_MIN {
                let Some(item) = self.parts.queue.try_next() else { break };
                self.plan(item)?;
            }
            moved |= self.post()?;
            if moved {
                progress = self.parts.clock.now();
                tokio::task::consume_budget().await;
            }
            let busy = !self.flights.is_empty() || !self.jobs.is_empty();
            let Self {
                end, parts, done, jobs, ..
            } = self;
            let SenderParts { queue, rendezvous, .. } = parts;
            let (clock, waited) = (parts.clock, parts.progress_timeout);
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = end.watch.failed() => return Err(lost(ErrorKind::NetworkDown)),
                item = queue.next(), if jobs.is_empty() => match item {
                    Some(item) => self.plan(item)?,
                    None => return Ok(()),
                },
                come = end.completions.next(done) => come.map_err(|error| broken(&error))?,
                kind = ended(rendezvous.as_ref()) => return Err(lost(kind)),
                () = stalled(clock, progress, waited), if busy => return Err(PathError::Stalled { waited }),
            }
        }
    }

    /// Takes note of what has completed; whether anything had.
    fn settle(&mut self) -> Result<bool, PathError> {
        let mut done = std::mem::take(&mut self.done);
        self.end.completions.poll(&mut done).map_err(|error| broken(&error))?;
        let any = !done.is_empty();
        for completion in done.drain(..) {
            match self.end.done(&completion).map_err(|failure| self.failed(failure))? {
                Done::Sent(last) => self.sent(last),
                Done::Message { slot, message } => {
                    self.end.receive_again([slot]).map_err(|error| broken(&error))?;
                    match message {
                        Ok(Message::Credit { count }) => self.parts.credits += usize::from(count),
                        Ok(Message::Bind { .. } | Message::Written { .. } | Message::Fence { .. }) | Err(_) => {
                            metric::malformed(PathKind::Rdma);
                            return Err(lost(ErrorKind::InvalidData));
                        }
                    }
                }
                Done::Word { .. } => {
                    metric::malformed(PathKind::Rdma);
                    return Err(lost(ErrorKind::InvalidData));
                }
            }
        }
        self.done = done;
        Ok(any)
    }

    fn failed(&self, failure: Failure) -> PathError {
        let device = self.end.device.context().name();
        tracing::warn!(
            device,
            status = failure.name(),
            "a write over rdma failed: its path ends"
        );
        lost(failure.kind())
    }

    /// All requests up to that number are over.
    fn sent(&mut self, last: u64) {
        while self.flights.front().is_some_and(|flight| flight.last <= last) {
            let Some(flight) = self.flights.pop_front() else { return };
            self.room += flight.requests;
            self.end.free_slots(flight.messages);
            match flight.item {
                Some(LaneItem::Batch(batch)) => {
                    metric::sent(PathKind::Rdma, batch.extents.len(), batch.bytes());
                    batch.carried();
                }
                Some(LaneItem::Fence(marker)) => marker.carried(),
                None => {}
            }
        }
    }

    fn plan(&mut self, item: LaneItem) -> Result<(), PathError> {
        let plan = match &item {
            LaneItem::Fence(marker) => Plan::fence(marker.epoch),
            LaneItem::Batch(batch) => Plan::batch(batch.epoch, self.pieces(batch)?, self.limits, &mut self.slots),
        };
        self.planned += plan.steps.len();
        self.jobs.push_back(Job { plan, item });
        Ok(())
    }

    fn pieces(&self, batch: &Batch) -> Result<Vec<Piece>, PathError> {
        let (layers, layer_bytes) = self.parts.remote.layers();
        let piece = |source: &crate::transport::raw::Source| {
            let header = source.header();
            let (address, destination) = source.places();
            let offset = u64::from(header.layers.start) * layer_bytes;
            Ok(Piece {
                ordinal: header.ordinal,
                layers: header.layers.clone(),
                whole: header.layers == (0..layers),
                from: self.end.device.arena().part(address, header.len),
                to: self.parts.remote.place(destination, offset)?,
            })
        };
        batch.extents.iter().map(piece).collect()
    }

    /// Posts as much as there is room and credit for; whether that was anything.
    fn post(&mut self) -> Result<bool, PathError> {
        let before = self.next;
        while let Some(step) = self.affordable() {
            let id = self.next;
            self.next += 1;
            self.room -= 1;
            self.planned -= 1;
            self.open.last = id;
            self.open.requests += 1;
            let job = self.jobs.front().expect("the step is of the first job");
            match step {
                Step::Write { parts, to, word } => {
                    let work = word.map_or(Work::Write(to), |word| Work::WriteAndTell(to, word));
                    self.parts.credits -= usize::from(word.is_some());
                    self.chain.push(id, work, job.plan.parts[parts].iter().copied());
                }
                Step::Tell(message) => {
                    let (slot, part) = self.end.put(&message).expect("there was a free slot");
                    self.parts.credits -= 1;
                    self.open.messages.push(slot);
                    self.chain.push(id, Work::Send, [part]);
                }
            }
            if job.plan.steps.is_empty() {
                self.open.item = self.jobs.pop_front().map(|job| job.item);
                self.signal();
            }
            if self.chain.len() >= CHAIN_MAX {
                self.flush()?;
            }
        }
        self.flush()?;
        Ok(self.next > before)
    }

    /// The next step, where it can be posted now.
    fn affordable(&mut self) -> Option<Step> {
        let job = self.jobs.front_mut()?;
        let (credits, tells) = match job.plan.steps.front()? {
            Step::Write { word, .. } => (usize::from(word.is_some()), false),
            Step::Tell(_) => (1, true),
        };
        let affordable = self.room > 0 && self.parts.credits >= credits && (!tells || self.end.has_slot());
        if affordable { job.plan.steps.pop_front() } else { None }
    }

    /// Asks for the completion of what was put into the chain last.
    fn signal(&mut self) {
        if self.open.requests > 0 {
            self.chain.signal();
            self.flights.push_back(std::mem::replace(&mut self.open, Flight::new()));
        }
    }

    fn flush(&mut self) -> Result<(), PathError> {
        self.signal();
        if self.chain.is_empty() {
            return Ok(());
        }
        self.end.post(&mut self.chain).map_err(|error| broken(&error))
    }
}

impl Flight {
    fn new() -> Self {
        Self {
            last: 0,
            requests: 0,
            messages: Vec::new(),
            item: None,
        }
    }
}

fn lost(kind: ErrorKind) -> PathError {
    PathError::Lost { kind }
}

fn broken(error: &VerbsError) -> PathError {
    tracing::warn!(%error, "the device refused work: its path ends");
    lost(error.source.kind())
}

async fn stalled(clock: Clock, since: Moment, waited: Duration) {
    clock.sleep_until(since + waited).await;
}

/// Resolves when the other side has gone; never without a connection that would tell. Cancel safe.
pub(super) async fn ended(rendezvous: Option<&TcpStream>) -> ErrorKind {
    let Some(stream) = rendezvous else {
        return std::future::pending().await;
    };
    loop {
        if let Err(error) = stream.readable().await {
            return error.kind();
        }
        match stream.try_read(&mut [0]) {
            Ok(0) => return ErrorKind::UnexpectedEof,
            Ok(_) => return ErrorKind::InvalidData,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return error.kind(),
        }
    }
}
