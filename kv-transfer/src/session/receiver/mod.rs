//! The receiver's half of every hand-over of one endpoint: who is expected, who waits for room, who may write which blocks,
//! what arrived, and which blocks a past writer may still write.
//!
//! Invariants:
//! - an epoch has one writer, one kind of path, one list of blocks; its number is never used again by this process;
//! - a block belongs to at most one epoch, from its allocation until it was committed or its writer was proven unable to
//!   write: the book of `owners` refuses an allocation that says otherwise;
//! - an epoch is committed only while live, with everything in and a valid Complete; it is dead from then on;
//! - a dead epoch gets no claim, and its blocks are let go only on proof (`epochs`), never because time has passed;
//! - what arrived whole under a dead epoch is kept aside for the next grant of its ticket, within bounds (`resume`);
//! - an attempt ends: in a commit, or in exactly one `Failed` per attempt that was not superseded or forgotten.

mod asks;
mod ends;
mod epochs;
#[cfg(test)]
mod model;
mod resume;
#[cfg(test)]
mod tests;

use super::message::{Header, ToReceiver, ToSender};
use crate::{Fallback, PathKind, TransferError};
use asks::{Ask, Asks, Pending};
use baton_types::{Attempt, BlockId, Epoch, Instance, Ticket};
use bytes::Bytes;
use epochs::{EpochState, LastWord};
use resume::Seeking;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::time::Duration;

/// Bounds of the machine.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Layers of a block.
    pub layers: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Kinds of path that writers can come over.
    pub paths: Vec<PathKind>,
    /// Reserved plus quarantined blocks of one writer; one hand-over of any size passes where it has none.
    pub peer_blocks: usize,
    /// A grant without progress for this long ends its attempt.
    pub lease: Duration,
    /// Time for the proof that an epoch is over, before the writer's connections are destroyed.
    pub fence_timeout: Duration,
    /// An ask that waited this long is served before all that came later, whatever their deadlines.
    pub ageing: Duration,
    /// Hand-overs expected at once.
    pub handovers: usize,
    /// Committed tickets that are remembered, to answer late attempts.
    pub remembered: usize,
}

/// One data connection of one writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Connection {
    pub path: PathKind,
    pub writer: Instance,
    pub number: u64,
}

/// The right to write one extent, given by [`Receiver::claim`], to be handed back to `land` or `release` exactly once.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ClaimTicket {
    epoch: Epoch,
    ordinal: u32,
    layers: Range<u32>,
    block: BlockId,
}

impl ClaimTicket {
    pub(crate) fn block(&self) -> BlockId {
        self.block
    }
}

/// What happens to the machine.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// The role expects a hand-over.
    Expect {
        ticket: Ticket,
        attempt: Attempt,
        blocks: u32,
        context_tokens: u64,
        deadline: Duration,
    },
    /// The role gives it to a later attempt.
    Supersede { ticket: Ticket, attempt: Attempt },
    /// The role has no use for it any more.
    Forget { ticket: Ticket },
    /// A sender speaks.
    Message {
        from: Instance,
        header: Header,
        message: ToReceiver,
    },
    /// Answer to [`Effect::Allocate`].
    Allocated {
        epoch: Epoch,
        held: u32,
        fresh: Vec<BlockId>,
    },
    /// Answer to [`Effect::Allocate`].
    NoRoom { epoch: Epoch },
    /// In-band marker: nothing more of the epoch comes on this connection.
    Marker { from: Connection, epoch: Epoch },
    /// The connection is closed and holds no claim.
    ConnectionClosed { from: Connection },
    /// A payload was not what its checksum says.
    Corrupt { from: Connection, epoch: Epoch },
    /// The control connection of a sender is lost.
    PeerLost { instance: Instance },
    /// Answer to [`Effect::Disconnect`]: nothing that the writer had there can write any more.
    Disconnected {
        instance: Instance,
        path: PathKind,
        through: Epoch,
    },
    /// Answer to [`Effect::Verify`].
    Verified { epoch: Epoch, matches: bool },
    /// Blocks became free elsewhere.
    RoomChanged,
    /// The endpoint ends: so does every attempt.
    Shutdown,
    /// Time passed.
    Tick,
}

/// What the driver has to do, in this order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Reserve the blocks of the ticket under this epoch, and answer at once.
    Allocate { epoch: Epoch, ticket: Ticket },
    /// Give a reservation back that no writer can write: none was told of it, or there is proof.
    Discard { epoch: Epoch },
    /// The reservation of `old`, which is proven over, is that of `new` from now on.
    Regrant { old: Epoch, new: Epoch },
    /// Tell a sender.
    Send {
        to: Instance,
        header: Header,
        message: ToSender,
    },
    /// Tell the role.
    Granted {
        ticket: Ticket,
        epoch: Epoch,
        held: u32,
        fresh: u32,
    },
    /// Tell the role.
    FirstBlock { ticket: Ticket },
    /// Compare the digest of these blocks, each with its ordinal, and answer.
    Verify {
        epoch: Epoch,
        blocks: Vec<(u32, BlockId)>,
        digest: u64,
    },
    /// Turn the reservation into a table and give it to the role.
    Commit {
        ticket: Ticket,
        attempt: Attempt,
        epoch: Epoch,
        held: u32,
        payload: Bytes,
        bytes: u64,
        path: PathKind,
        fallbacks: Vec<Fallback>,
    },
    /// Tell the role that an attempt is over.
    Failed {
        ticket: Ticket,
        attempt: Attempt,
        path: Option<PathKind>,
        error: TransferError,
    },
    /// Take the reservation from everyone.
    Quarantine { epoch: Epoch },
    /// Nobody can write the quarantined blocks any more.
    Release { epoch: Epoch },
    /// See to it that nothing that the writer has on this kind of path can write any more, and answer. `through` is the last
    /// epoch that this proves over.
    Disconnect {
        instance: Instance,
        path: PathKind,
        through: Epoch,
    },
}

/// Where the current attempt of a ticket is.
#[derive(Debug)]
enum Stage {
    /// Its sender has not asked yet.
    Idle,
    /// Its sender waits for room.
    Asking(Pending),
    /// Its sender waits for the proof that lets it have what is kept aside.
    Awaiting(Pending),
    /// Its sender may write.
    Granted(Epoch),
    /// The path broke under its sender, which is to ask again over another.
    Seeking(Seeking),
    /// It is over; the role may name a later one.
    Failed(TransferError),
}

#[derive(Debug)]
struct Expected {
    blocks: u32,
    context_tokens: u64,
    deadline: Duration,
    /// The highest attempt seen. Lower ones are fenced.
    attempt: Attempt,
    stage: Stage,
    /// The dead epoch whose reservation is kept for the next grant. Never while asking for other blocks, or granted.
    aside: Option<Epoch>,
    /// The path that broke last under this attempt, and why; taken by the next grant.
    broken: Option<(PathKind, String)>,
    /// Those that came before.
    fallbacks: Vec<Fallback>,
    /// The role was told of the attempt's first block.
    first_block: bool,
}

/// Why a ticket cannot be expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotExpected {
    Duplicate(Attempt),
    TooMany(usize),
}

/// The machine. See the module's head.
#[derive(Debug)]
pub(crate) struct Receiver {
    limits: Limits,
    next_epoch: u64,
    // Trees: what is done for several at once is done in one order, so that a schedule can be run again.
    tickets: BTreeMap<Ticket, Expected>,
    /// What was committed, oldest first, to answer late attempts.
    committed: BTreeMap<Ticket, (Attempt, Epoch)>,
    committed_order: VecDeque<Ticket>,
    asks: Asks,
    epochs: BTreeMap<Epoch, EpochState>,
    owners: BTreeMap<BlockId, Epoch>,
    /// Reserved plus quarantined blocks per writer; no entry where there are none.
    outstanding: BTreeMap<Instance, usize>,
    /// What is being disconnected: nothing is granted there meanwhile.
    condemned: BTreeSet<(Instance, PathKind)>,
    effects: Vec<Effect>,
    /// No deadline lies before this.
    earliest: Duration,
}

impl Receiver {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            next_epoch: 1,
            tickets: BTreeMap::new(),
            committed: BTreeMap::new(),
            committed_order: VecDeque::new(),
            asks: Asks::default(),
            epochs: BTreeMap::new(),
            owners: BTreeMap::new(),
            outstanding: BTreeMap::new(),
            condemned: BTreeSet::new(),
            effects: Vec::new(),
            earliest: Duration::MAX,
        }
    }

    /// Whether [`Event::Expect`] would be taken.
    pub(crate) fn may_expect(&self, ticket: Ticket) -> Result<(), NotExpected> {
        if let Some(expected) = self.tickets.get(&ticket) {
            return Err(NotExpected::Duplicate(expected.attempt));
        }
        if let Some((attempt, _)) = self.committed.get(&ticket) {
            return Err(NotExpected::Duplicate(*attempt));
        }
        let limit = self.limits.handovers;
        if self.tickets.len() >= limit {
            Err(NotExpected::TooMany(limit))
        } else {
            Ok(())
        }
    }

    /// Takes an event. Effects are collected by [`Self::take_effects`].
    pub(crate) fn handle(&mut self, now: Duration, event: Event) {
        match event {
            Event::Expect {
                ticket,
                attempt,
                blocks,
                context_tokens,
                deadline,
            } => {
                if self.may_expect(ticket).is_ok() {
                    let expected = Expected {
                        blocks,
                        context_tokens,
                        deadline,
                        attempt,
                        stage: Stage::Idle,
                        aside: None,
                        broken: None,
                        fallbacks: Vec::new(),
                        first_block: false,
                    };
                    self.tickets.insert(ticket, expected);
                    self.wake_at(deadline);
                }
            }
            Event::Supersede { ticket, attempt } => self.supersede(now, ticket, attempt),
            Event::Forget { ticket } => self.forget(now, ticket),
            Event::Message { from, header, message } => self.message(now, from, header, message),
            Event::Allocated { epoch, held, fresh } => self.allocated(now, epoch, held, fresh),
            Event::NoRoom { epoch } => self.asks.no_room(epoch),
            Event::Marker { from, epoch } => self.marker(now, from, epoch),
            Event::ConnectionClosed { from } => self.connection_closed(now, from),
            Event::Corrupt { from, epoch } => {
                if self
                    .epochs
                    .get(&epoch)
                    .is_some_and(|state| state.is_live() && state.is_written_by(&from))
                {
                    let reason = "an extent's checksum was wrong".to_owned();
                    self.fail_epoch(now, epoch, TransferError::Corrupt { reason }, true);
                }
            }
            Event::PeerLost { instance } => self.peer_lost(now, instance),
            Event::Disconnected {
                instance,
                path,
                through,
            } => self.disconnected(now, instance, path, through),
            Event::Verified { epoch, matches } => self.verified(now, epoch, matches),
            Event::RoomChanged => self.serve(now),
            Event::Shutdown => {
                let all: Vec<Ticket> = self.tickets.keys().copied().collect();
                for ticket in all {
                    self.fail_ticket(now, ticket, TransferError::ShuttingDown, true);
                }
            }
            Event::Tick => self.tick(now),
        }
    }

    /// What is to be done, in order. Performing `Allocate` brings an event, and with it perhaps more effects.
    pub(crate) fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// When a `Tick` is due at the latest; never earlier than needed by more than work that ended meanwhile.
    pub(crate) fn next_tick(&self) -> Duration {
        self.earliest
    }

    /// Hand-overs expected and not yet committed.
    pub(crate) fn expected(&self) -> usize {
        self.tickets.len()
    }

    /// Asks that wait for room.
    pub(crate) fn asking(&self) -> usize {
        self.asks.len()
    }

    /// Blocks (granted to writers, quarantined).
    pub(crate) fn blocks_out(&self) -> (usize, usize) {
        self.epochs
            .values()
            .fold((0, 0), |(live, dead), state| match state.is_live() {
                true => (live + state.fresh().len(), dead),
                false => (live, dead + state.fresh().len()),
            })
    }

    /// What one writer has in quarantine that it got to write over that kind of path: (hand-overs, blocks).
    pub(crate) fn quarantined_of(&self, writer: Instance, path: PathKind) -> (usize, usize) {
        let its = |state: &&EpochState| state.writer() == writer && state.path() == path && !state.is_live();
        let its = self.epochs.values().filter(its);
        its.fold((0, 0), |(handovers, blocks), state| {
            (handovers + 1, blocks + state.fresh().len())
        })
    }

    /// Processes that have blocks here, granted or in quarantine, or whose connections are being destroyed.
    pub(crate) fn writers(&self) -> BTreeSet<Instance> {
        let condemned = self.condemned.iter().map(|(instance, _)| *instance);
        self.outstanding.keys().copied().chain(condemned).collect()
    }

    fn wake_at(&mut self, at: Duration) {
        self.earliest = self.earliest.min(at);
    }

    fn send(&mut self, to: Instance, header: Header, message: ToSender) {
        self.effects.push(Effect::Send { to, header, message });
    }

    fn message(&mut self, now: Duration, from: Instance, header: Header, message: ToReceiver) {
        match message {
            ToReceiver::Reserve {
                context_tokens,
                path,
                budget,
                digest,
            } => {
                let ask = Ask {
                    context_tokens,
                    path,
                    budget,
                    digest,
                };
                self.reserve(now, from, header, &ask);
            }
            ToReceiver::Renew => {
                if let Some(epoch) = self.current_epoch(from, &header) {
                    self.renew(now, epoch);
                }
            }
            ToReceiver::Complete {
                blocks,
                payload,
                digest,
            } => self.complete(now, from, header, &blocks, LastWord { payload, digest }),
            ToReceiver::Abort { error } => self.abort(now, from, header, error),
            ToReceiver::Fenced { connections } => {
                if let Some(epoch) = header.epoch {
                    self.fenced(now, from, epoch, connections);
                }
            }
            ToReceiver::PathBroken { error } => {
                if let Some(epoch) = header.epoch {
                    self.path_broken(now, from, epoch, &error);
                }
            }
        }
    }

    /// The epoch that the header names, where it is live, the ticket's current one, and written by that sender.
    fn current_epoch(&self, from: Instance, header: &Header) -> Option<Epoch> {
        let expected = self.tickets.get(&header.ticket)?;
        let Stage::Granted(epoch) = &expected.stage else {
            return None;
        };
        let state = self.epochs.get(epoch)?;
        let named = expected.attempt == header.attempt && header.epoch == Some(*epoch) && state.writer() == from;
        named.then_some(*epoch)
    }

    fn complete(&mut self, now: Duration, from: Instance, header: Header, blocks: &Range<u32>, word: LastWord) {
        if let Some((_, epoch)) = self.committed.get(&header.ticket) {
            let again = header.epoch == Some(*epoch);
            let message = if again {
                ToSender::Committed
            } else {
                ToSender::Fence {
                    error: TransferError::AlreadyCommitted,
                }
            };
            return self.send(from, header, message);
        }
        let Some(epoch) = self.current_epoch(from, &header) else {
            let error = match self.tickets.get(&header.ticket) {
                None => TransferError::UnknownTicket,
                Some(expected) => match &expected.stage {
                    Stage::Failed(error) if expected.attempt == header.attempt => error.clone(),
                    _ => TransferError::Fenced,
                },
            };
            return self.send(from, header, ToSender::Fence { error });
        };
        let promised = self.epochs.get(&epoch).is_some_and(EpochState::has_digest);
        if promised && word.digest.is_none() {
            let reason = "a digest was promised, and none came".to_owned();
            return self.fail_epoch(now, epoch, TransferError::Protocol { reason }, true);
        }
        match self.epochs.get_mut(&epoch).map(|state| state.completed(blocks, word)) {
            Some(true) => {
                self.renew(now, epoch);
                self.try_commit(now, epoch);
            }
            Some(false) => {
                let reason = format!("blocks {blocks:?} were completed, which are not those granted");
                self.fail_epoch(now, epoch, TransferError::Protocol { reason }, true);
            }
            None => {}
        }
    }

    fn abort(&mut self, now: Duration, from: Instance, header: Header, error: TransferError) {
        let Some(expected) = self.tickets.get(&header.ticket) else {
            return;
        };
        if expected.attempt != header.attempt {
            return;
        }
        match &expected.stage {
            Stage::Asking(Pending { from: writer, .. })
            | Stage::Awaiting(Pending { from: writer, .. })
            | Stage::Seeking(Seeking { writer, .. })
                if *writer == from =>
            {
                self.fail_ticket(now, header.ticket, error, false);
            }
            Stage::Granted(epoch) => {
                // The grant may have been under way when the sender gave up, so that it names none.
                let state = self.epochs.get(epoch);
                let by_writer = state.is_some_and(|state| state.writer() == from);
                if by_writer && header.epoch.is_none_or(|named| named == *epoch) {
                    self.fail_ticket(now, header.ticket, error, false);
                }
            }
            Stage::Idle | Stage::Asking(_) | Stage::Awaiting(_) | Stage::Seeking(_) | Stage::Failed(_) => {}
        }
    }

    fn remember_committed(&mut self, ticket: Ticket, attempt: Attempt, epoch: Epoch) {
        while self.committed_order.len() >= self.limits.remembered.max(1) {
            if let Some(oldest) = self.committed_order.pop_front() {
                self.committed.remove(&oldest);
            }
        }
        self.committed.insert(ticket, (attempt, epoch));
        self.committed_order.push_back(ticket);
    }

    /// Checks the books against each other.
    #[cfg(test)]
    pub(in crate::session) fn check(&self) {
        let mut outstanding: BTreeMap<Instance, usize> = BTreeMap::new();
        let mut owned = 0;
        for (epoch, state) in &self.epochs {
            for block in state.fresh() {
                assert_eq!(self.owners.get(block), Some(epoch), "{block:?} is not its epoch's");
                owned += 1;
            }
            if !state.fresh().is_empty() {
                *outstanding.entry(state.writer()).or_default() += state.fresh().len();
            }
            let current = matches!(
                self.tickets.get(&state.ticket()).map(|e| &e.stage), Some(Stage::Granted(e)) if e == epoch
            );
            assert_eq!(
                state.is_live(),
                current,
                "{epoch:?} is live without a ticket or the reverse"
            );
            let aside = self.tickets.get(&state.ticket()).and_then(|e| e.aside) == Some(*epoch);
            assert_eq!(
                state.is_aside(),
                aside,
                "{epoch:?} is kept aside for nobody or the reverse"
            );
        }
        assert_eq!(owned, self.owners.len(), "a block without an epoch is owned");
        assert_eq!(outstanding, self.outstanding, "outstanding blocks per writer");
        let asking = self
            .tickets
            .values()
            .filter(|e| {
                let without = !matches!(e.stage, Stage::Asking(_) | Stage::Granted(_));
                assert!(without || e.aside.is_none(), "blocks are kept aside of a grant");
                assert!(
                    e.aside.is_some() || !matches!(e.stage, Stage::Awaiting(_)),
                    "proof is awaited of nothing"
                );
                matches!(e.stage, Stage::Asking(_))
            })
            .count();
        assert_eq!(asking, self.asks.len(), "asks in the queue");
        assert!(self.committed.len() <= self.limits.remembered.max(1));
        assert!(self.earliest <= self.next_deadline(), "a deadline would be missed");
    }
}
