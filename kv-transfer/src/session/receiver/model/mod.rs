//! The receiving machine against random schedules: senders that keep the protocol, break it, die, come back and speak late;
//! connections that close, frames that hang half written, duplicates, old epochs, time that jumps.
//!
//! The world keeps its own books, independent of the machine: which block of the pool belongs to whom, and what was last
//! written into it. After every step: no block is where two parties may use it; a committed context holds exactly what its
//! writer wrote under that epoch; in the end every attempt has ended and every block is back.

mod schedule;

use super::*;
use crate::transport::Reject;
use schedule::Step;
use std::collections::{BTreeSet, HashMap};

const BLOCKS: u32 = 12;
const WRITERS: u64 = 3;
const TICKETS: u128 = 4;
const LAYERS: u32 = 2;
const MS: Duration = Duration::from_millis(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Pool,
    Reserved(Epoch),
    Quarantined(Epoch),
    Sequence,
}

/// What the writers know of a grant.
#[derive(Debug, Clone)]
struct Known {
    header: Header,
    epoch: Epoch,
    writer: Instance,
    wanted: Range<u32>,
    /// The writer fenced it, and writes no more.
    fenced: bool,
}

/// A frame that is being written: it may touch its block until it ends.
struct Frame {
    claim: ClaimTicket,
    from: Connection,
    epoch: Epoch,
    ordinal: u32,
    layers: Range<u32>,
}

struct World {
    machine: Receiver,
    now: Duration,
    owners: Vec<Owner>,
    /// What each layer of each block holds: the epoch and ordinal that wrote it.
    content: Vec<Vec<Option<(Epoch, u32)>>>,
    grants: Vec<Known>,
    frames: Vec<Frame>,
    /// Blocks of each reservation: ordinal of the first, and the blocks.
    reservations: HashMap<Epoch, Vec<BlockId>>,
    /// Epochs that held each reservation, its own last.
    chains: HashMap<Epoch, BTreeSet<Epoch>>,
    condemned: Vec<(Instance, Epoch)>,
    epochs: BTreeSet<Epoch>,
    /// Attempts that the role waits for.
    open: HashMap<Ticket, Attempt>,
    contexts: HashMap<Ticket, u64>,
    commits: HashMap<Ticket, usize>,
    connections: u64,
    /// Planted: blocks go back to the pool without quarantine.
    no_quarantine: bool,
}

impl World {
    fn new() -> Self {
        let limits = Limits {
            layers: LAYERS,
            block_tokens: 1,
            paths: vec![PathKind::Tcp],
            peer_blocks: 8,
            lease: 300 * MS,
            fence_timeout: 100 * MS,
            ageing: 200 * MS,
            handovers: 4,
            remembered: 3,
        };
        Self {
            machine: Receiver::new(limits),
            now: MS,
            owners: vec![Owner::Pool; BLOCKS as usize],
            content: vec![vec![None; LAYERS as usize]; BLOCKS as usize],
            grants: Vec::new(),
            frames: Vec::new(),
            reservations: HashMap::new(),
            chains: HashMap::new(),
            condemned: Vec::new(),
            epochs: BTreeSet::new(),
            open: HashMap::new(),
            contexts: HashMap::new(),
            commits: HashMap::new(),
            connections: 0,
            no_quarantine: false,
        }
    }

    fn bring(&mut self, event: Event) {
        self.machine.handle(self.now, event);
        self.settle();
    }

    fn settle(&mut self) {
        loop {
            let effects = self.machine.take_effects();
            if effects.is_empty() {
                break;
            }
            for effect in effects {
                self.perform(effect);
            }
        }
        self.machine.check();
        for frame in &self.frames {
            let owner = self.owners[frame.claim.block().index()];
            let holds = owner == Owner::Reserved(frame.epoch) || owner == Owner::Quarantined(frame.epoch);
            assert!(
                holds,
                "a frame of {:?} is being written into a block of {owner:?}",
                frame.epoch
            );
        }
    }

    fn shift(&mut self, epoch: Epoch, from: Owner, to: Owner) -> Vec<BlockId> {
        let blocks = self.reservations[&epoch].clone();
        for block in &blocks {
            assert_eq!(self.owners[block.index()], from, "{block:?} on its way to {to:?}");
            self.owners[block.index()] = to;
        }
        blocks
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Allocate { epoch, ticket } => {
                assert!(self.epochs.insert(epoch), "{epoch:?} was used before");
                let wanted = self.machine.tickets[&ticket].blocks as usize;
                let free = self
                    .owners
                    .iter()
                    .enumerate()
                    .filter(|(_, owner)| **owner == Owner::Pool);
                let free: Vec<BlockId> = free.map(|(block, _)| BlockId(block as u32)).take(wanted).collect();
                let answer = if free.len() < wanted {
                    Event::NoRoom { epoch }
                } else {
                    free.iter()
                        .for_each(|block| self.owners[block.index()] = Owner::Reserved(epoch));
                    self.reservations.insert(epoch, free.clone());
                    self.chains.insert(epoch, BTreeSet::from([epoch]));
                    Event::Allocated {
                        epoch,
                        held: 0,
                        fresh: free,
                    }
                };
                self.machine.handle(self.now, answer);
            }
            Effect::Discard { epoch } => drop(self.shift(epoch, Owner::Reserved(epoch), Owner::Pool)),
            Effect::Quarantine { epoch } if self.no_quarantine => {
                self.shift(epoch, Owner::Reserved(epoch), Owner::Pool);
            }
            Effect::Quarantine { epoch } => {
                self.shift(epoch, Owner::Reserved(epoch), Owner::Quarantined(epoch));
            }
            Effect::Release { .. } if self.no_quarantine => {}
            Effect::Release { epoch } => drop(self.shift(epoch, Owner::Quarantined(epoch), Owner::Pool)),
            Effect::Commit {
                ticket, attempt, epoch, ..
            } => {
                let blocks = self.shift(epoch, Owner::Reserved(epoch), Owner::Sequence);
                let context = self.contexts[&ticket] as usize;
                for (ordinal, block) in (0u32..).zip(&blocks[..context]) {
                    let content = &self.content[block.index()];
                    // What is kept of an earlier epoch was written under that.
                    let chain = &self.chains[&epoch];
                    let right =
                        |c: &Option<(Epoch, u32)>| c.is_some_and(|(by, at)| chain.contains(&by) && at == ordinal);
                    assert!(content.iter().all(right), "torn or foreign: {content:?}");
                }
                assert_eq!(
                    self.open.remove(&ticket),
                    Some(attempt),
                    "an attempt that had ended was committed"
                );
                *self.commits.entry(ticket).or_default() += 1;
                // The sequence ends at once.
                blocks.iter().for_each(|block| self.owners[block.index()] = Owner::Pool);
                self.contexts.remove(&ticket);
            }
            Effect::Failed { ticket, attempt, .. } => {
                assert_eq!(
                    self.open.remove(&ticket),
                    Some(attempt),
                    "an attempt failed that was not open"
                );
            }
            Effect::Send { to, header, message } => {
                if let ToSender::Grant {
                    wanted, destinations, ..
                } = message
                {
                    let epoch = header.epoch.expect("a grant names its epoch");
                    let asked_for = wanted.start as usize..wanted.end as usize;
                    assert_eq!(destinations, self.reservations[&epoch][asked_for]);
                    if !self.grants.iter().any(|known| known.epoch == epoch) {
                        self.grants.push(Known {
                            header,
                            epoch,
                            writer: to,
                            wanted,
                            fenced: false,
                        });
                    }
                }
            }
            Effect::Disconnect { instance, through, .. } => self.condemned.push((instance, through)),
            Effect::Regrant { old, new } => {
                assert!(self.epochs.insert(new), "{new:?} was used before");
                for block in self.shift(old, Owner::Reserved(old), Owner::Reserved(new)) {
                    let writes = |frame: &&Frame| frame.claim.block() == block;
                    assert!(
                        self.frames.iter().find(writes).is_none(),
                        "{block:?} is being written still"
                    );
                }
                let blocks = self.reservations[&old].clone();
                self.reservations.insert(new, blocks);
                let mut chain = self.chains[&old].clone();
                chain.insert(new);
                self.chains.insert(new, chain);
            }
            Effect::Verify { .. } => unreachable!("no digest is said here"),
            Effect::Granted { .. } | Effect::FirstBlock { .. } => {}
        }
    }

    fn known(&self, which: usize) -> Option<Known> {
        // Mostly one of the latest: the old ones are there to be refused.
        let back = which.checked_rem(if which.is_multiple_of(4) {
            self.grants.len()
        } else {
            self.grants.len().min(3)
        })?;
        self.grants.iter().rev().nth(back).cloned()
    }

    fn connection(&self, writer: Instance, number: u64) -> Connection {
        // Numbers are never reused: those closed lie below.
        Connection {
            path: PathKind::Tcp,
            writer,
            number: self.connections * 2 + number,
        }
    }

    fn end_frames(&mut self, ends: impl Fn(&Frame) -> bool) {
        while let Some(at) = self.frames.iter().position(&ends) {
            self.end_frame(at, false);
        }
    }

    /// The bytes are in the block when the frame ends; a torn one leaves half of them.
    fn end_frame(&mut self, at: usize, whole: bool) {
        let frame = self.frames.swap_remove(at);
        let block = frame.claim.block();
        for layer in frame.layers.clone() {
            let torn = !whole && layer == frame.layers.start;
            self.content[block.index()][layer as usize] = (!torn).then_some((frame.epoch, frame.ordinal));
        }
        if whole {
            let _ = self.machine.land(self.now, frame.claim, 1);
        } else {
            self.machine.release(self.now, &frame.claim);
        }
        self.settle();
    }

    fn step(&mut self, step: Step) {
        let header = |ticket: u128, attempt: u32| Header {
            ticket: Ticket(ticket),
            attempt: Attempt(attempt),
            epoch: None,
        };
        match step {
            Step::Expect { ticket, blocks, budget } => {
                let ticket = Ticket(ticket);
                if self.machine.may_expect(ticket).is_ok() {
                    let deadline = self.now + Duration::from_millis(budget);
                    self.open.insert(ticket, Attempt::FIRST);
                    self.contexts.insert(ticket, u64::from(blocks));
                    let (attempt, blocks, context_tokens) = (Attempt::FIRST, blocks + 1, u64::from(blocks));
                    self.bring(Event::Expect {
                        ticket,
                        attempt,
                        blocks,
                        context_tokens,
                        deadline,
                    });
                }
            }
            Step::Supersede { ticket, by } => {
                let ticket = Ticket(ticket);
                if let Some(expected) = self.machine.tickets.get(&ticket) {
                    let attempt = Attempt(expected.attempt.0 + by);
                    if by > 0 {
                        self.open.insert(ticket, attempt);
                    }
                    self.bring(Event::Supersede { ticket, attempt });
                }
            }
            Step::Forget { ticket } => {
                self.open.remove(&Ticket(ticket));
                self.contexts.remove(&Ticket(ticket));
                self.bring(Event::Forget { ticket: Ticket(ticket) });
            }
            Step::Reserve {
                writer,
                ticket,
                attempt,
                budget,
            } => {
                let expected = self
                    .machine
                    .tickets
                    .get(&Ticket(ticket))
                    .map(|expected| expected.attempt);
                if expected.is_some_and(|current| current < Attempt(attempt)) {
                    self.open.insert(Ticket(ticket), Attempt(attempt));
                }
                let context_tokens = self.contexts.get(&Ticket(ticket)).copied().unwrap_or(1);
                let budget = Duration::from_millis(budget);
                let message = ToReceiver::Reserve {
                    digest: false,
                    context_tokens,
                    path: PathKind::Tcp,
                    budget,
                };
                self.bring(Event::Message {
                    from: Instance(writer),
                    header: header(ticket, attempt),
                    message,
                });
            }
            Step::Claim {
                grant,
                ordinal,
                layers,
                connection,
                foreign,
            } => self.claim(grant, ordinal, layers, connection, foreign),
            Step::Frame { frame, whole } => {
                if let Some(at) = frame.checked_rem(self.frames.len()) {
                    self.end_frame(at, whole);
                }
            }
            Step::Complete { grant, foreign } => {
                if let Some(known) = self.known(grant) {
                    let from = if foreign {
                        Instance((known.writer.0 + 1) % WRITERS)
                    } else {
                        known.writer
                    };
                    let message = ToReceiver::Complete {
                        blocks: known.wanted,
                        payload: Bytes::new(),
                        digest: None,
                    };
                    self.bring(Event::Message {
                        from,
                        header: known.header,
                        message,
                    });
                }
            }
            Step::Abort { grant } => {
                if let Some(known) = self.known(grant) {
                    let message = ToReceiver::Abort {
                        error: TransferError::Deadline,
                    };
                    self.bring(Event::Message {
                        from: known.writer,
                        header: known.header,
                        message,
                    });
                }
            }
            Step::Fence { grant } => self.fence(grant),
            Step::Renew { grant } => {
                if let Some(known) = self.known(grant) {
                    self.bring(Event::Message {
                        from: known.writer,
                        header: known.header,
                        message: ToReceiver::Renew,
                    });
                }
            }
            Step::Close { writer, connection } => {
                let from = self.connection(Instance(writer), connection);
                self.end_frames(|frame| frame.from == from);
                self.bring(Event::ConnectionClosed { from });
                self.connections += 1;
            }
            Step::PeerLost { writer } => self.bring(Event::PeerLost {
                instance: Instance(writer),
            }),
            Step::Disconnected { which } => {
                if let Some(at) = which.checked_rem(self.condemned.len()) {
                    let (instance, through) = self.condemned.swap_remove(at);
                    // Joined: none of its frames is left.
                    self.end_frames(|frame| frame.from.writer == instance);
                    let path = PathKind::Tcp;
                    self.bring(Event::Disconnected {
                        instance,
                        path,
                        through,
                    });
                }
            }
            Step::Room => self.bring(Event::RoomChanged),
            Step::Wait { ms } => {
                self.now += Duration::from_millis(ms);
                if self.machine.next_tick() <= self.now {
                    self.bring(Event::Tick);
                }
            }
        }
    }

    fn claim(&mut self, grant: usize, ordinal: u32, layers: u32, connection: u64, foreign: bool) {
        let Some(known) = self.known(grant).filter(|known| !known.fenced) else {
            return;
        };
        let writer = if foreign {
            Instance((known.writer.0 + 1) % WRITERS)
        } else {
            known.writer
        };
        let layers = [0..1, 1..2, 0..2, 0..2, 0..2, 0..2][layers as usize].clone();
        let from = self.connection(writer, connection);
        match self.machine.claim(self.now, from, known.epoch, ordinal, &layers) {
            Ok(claim) => {
                assert!(!foreign, "a foreign writer got a claim");
                assert_eq!(self.owners[claim.block().index()], Owner::Reserved(known.epoch));
                assert_eq!(claim.block(), self.reservations[&known.epoch][ordinal as usize]);
                let double = self.frames.iter().any(|f| {
                    f.claim.block() == claim.block() && f.layers.start < layers.end && layers.start < f.layers.end
                });
                assert!(!double, "two frames into one place");
                self.frames.push(Frame {
                    claim,
                    from,
                    epoch: known.epoch,
                    ordinal,
                    layers,
                });
            }
            Err(Reject::DeadEpoch | Reject::WrongWriter | Reject::OutsideGrant | Reject::Duplicate) => {}
        }
        self.settle();
    }

    fn is_over(&self) -> bool {
        self.open.is_empty()
            && self.frames.is_empty()
            && self.machine.blocks_out() == (0, 0)
            && self.machine.asking() == 0
    }

    fn fence(&mut self, grant: usize) {
        let Some(at) = grant.checked_rem(self.grants.len()) else {
            return;
        };
        self.grants[at].fenced = true;
        let known = self.grants[at].clone();
        // In-band behind the data: what was on its way is in, or the connection is gone.
        while let Some(at) = self.frames.iter().position(|frame| frame.epoch == known.epoch) {
            self.end_frame(at, true);
        }
        for number in 0..2 {
            let from = self.connection(known.writer, number);
            self.bring(Event::Marker {
                from,
                epoch: known.epoch,
            });
        }
        let message = ToReceiver::Fenced { connections: 2 };
        self.bring(Event::Message {
            from: known.writer,
            header: known.header,
            message,
        });
    }
}
