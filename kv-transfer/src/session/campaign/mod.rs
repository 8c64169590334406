//! Both machines against each other, over a network that errs, by random schedules: several senders and receivers that die,
//! stop and come back; two kinds of path, one of which writes one-sidedly, at any time until there is proof that it cannot;
//! connections that break, frames that are delayed, reordered, duplicated, dropped, torn, harmed; leases, deadlines, attempts
//! that supersede each other.
//!
//! The world keeps its own books: who owns each block, and who wrote what into it when. Nothing that a machine believes is
//! taken for granted. A schedule is its seed: `BATON_SEED=n` runs that one, and a run again is the same step by step.

mod network;
mod receivers;
mod run;
mod senders;
mod steps;

use super::receiver::{ClaimTicket, Connection, Effect, Event, Limits, Receiver};
use super::{Header, Push, Sender, SenderEffect, SenderEvent, SenderLimits, ToReceiver, ToSender, mix};
use crate::{PathKind, TransferError};
use baton_types::{Attempt, BlockId, Epoch, Instance, Ticket};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::time::Duration;

const MS: Duration = Duration::from_millis(1);
const LAYERS: u32 = 2;
const BLOCKS: usize = 12;
const SOURCES: usize = 16;
const SENDERS: usize = 3;
const RECEIVERS: usize = 2;
const TICKETS: u128 = 30;
const LEASE: Duration = Duration::from_millis(300);
const FENCE: Duration = Duration::from_millis(60);
/// Both sides' messages and data; writes through the second are one-sided.
const KINDS: [PathKind; 2] = [PathKind::Tcp, PathKind::Shm];

/// Numbers that only look random: the same for the same seed.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: usize) -> usize {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides.max(1) as u64) as usize
    }

    fn one_in(&mut self, sides: usize) -> bool {
        self.throw(sides) == 0
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> Option<T> {
        (!of.is_empty()).then(|| of[self.throw(of.len())].clone())
    }
}

/// What one layer of a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cell {
    /// Of which context, and where in it. None: something else.
    value: Option<(Ticket, u32)>,
    by: (Instance, Epoch),
    torn: bool,
}

impl Cell {
    const EMPTY: Self = Self {
        value: None,
        by: (Instance(0), Epoch(0)),
        torn: false,
    };

    fn crc(&self, layer: u32) -> u64 {
        crc(self.value.filter(|_| !self.torn), layer)
    }
}

/// Stands for the checksum of a layer's bytes.
fn crc(value: Option<(Ticket, u32)>, layer: u32) -> u64 {
    value.map_or(u64::MAX, |(ticket, ordinal)| mix(ordinal, layer, ticket.0 as u64))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Pool,
    Reserved(Epoch),
    Quarantined(Epoch),
    Sequence(Ticket),
}

struct Reservation {
    /// Blocks that were here already.
    held: u32,
    blocks: Vec<usize>,
    /// Epochs that it was under, the present one last.
    chain: Vec<Epoch>,
}

/// A request at its receiver.
struct Role {
    attempt: Attempt,
    /// It waits for the attempt's end.
    open: bool,
    context: u32,
    held: u32,
    deadline: Duration,
}

struct ReceiverNode {
    life: u64,
    machine: Receiver,
    owners: Vec<Owner>,
    cells: Vec<[Cell; LAYERS as usize]>,
    reservations: BTreeMap<Epoch, Reservation>,
    writers: BTreeMap<Epoch, Instance>,
    /// Epochs that their writers were told are over, or whose blocks were quarantined.
    over: BTreeSet<Epoch>,
    condemned: Vec<(Instance, PathKind, Epoch)>,
    comparisons: Vec<Comparison>,
    roles: BTreeMap<Ticket, Role>,
    sequences: Vec<Sequence>,
}

/// Epoch, blocks, digest.
type Comparison = (Epoch, Vec<(u32, BlockId)>, u64);
/// Whose it is, its blocks, and what they held at the commit.
type Sequence = (Ticket, Vec<usize>, Vec<[Cell; LAYERS as usize]>);

#[derive(Clone, Copy, Default)]
struct SourceBlock {
    value: Option<(Ticket, u32)>,
    claims: u32,
}

struct SenderNode {
    instance: Instance,
    stopped: bool,
    sources: Vec<SourceBlock>,
}

/// What was pushed.
struct Piece {
    ordinal: u32,
    layers: Range<u32>,
    source: usize,
    summed: bool,
}

/// One hand-over being made.
struct Hand {
    at: usize,
    to: usize,
    ticket: Ticket,
    attempt: Attempt,
    deadline: Duration,
    machine: Sender,
    linked: bool,
    /// A path is to be found that is none of these.
    seeks: Option<Vec<PathKind>>,
    path: Option<u64>,
    sources: Vec<usize>,
    /// Yet to be pushed; none before the grant.
    plan: Option<VecDeque<(u32, Range<u32>)>>,
    completed: bool,
    kept: Vec<Piece>,
    queue: VecDeque<usize>,
    /// Frames that were not applied yet, under the current path.
    in_flight: BTreeSet<u64>,
    undrained: bool,
    wrote: bool,
    fence: Option<Epoch>,
    close_path: bool,
    leased_until: Duration,
}

/// A sender's connections to a receiver, of one kind, shared by its hand-overs.
struct Path {
    at: usize,
    instance: Instance,
    to: usize,
    kind: PathKind,
    connections: [u64; 2],
    broken: bool,
}

struct Frame {
    number: u64,
    hand: u64,
    epoch: Epoch,
    ordinal: u32,
    layers: Range<u32>,
    destination: BlockId,
    source: (usize, usize),
    /// What the source held when its process ended.
    remains: Option<Option<(Ticket, u32)>>,
    /// One-sided: the bytes are in the block.
    applied: bool,
}

enum Item {
    Frame(Frame),
    Marker(Epoch),
}

struct Wire {
    to: usize,
    from: Connection,
    items: VecDeque<Item>,
    /// Two-sided: what is being received.
    receiving: Option<(Option<ClaimTicket>, BlockId, Frame)>,
    /// The sender closed it, or is gone.
    closing: bool,
}

/// A control connection.
struct Line {
    instance: Instance,
    to_receiver: VecDeque<(Header, ToReceiver)>,
    to_sender: VecDeque<(Header, ToSender)>,
    latest: Option<Epoch>,
}

struct World {
    dice: Dice,
    now: Duration,
    digests: bool,
    /// One in so many things that could go wrong does.
    mildness: usize,
    /// Nothing goes wrong any more.
    calm: bool,
    receivers: Vec<ReceiverNode>,
    senders: Vec<SenderNode>,
    hands: BTreeMap<u64, Hand>,
    paths: BTreeMap<u64, Path>,
    wires: BTreeMap<u64, Wire>,
    lines: BTreeMap<(usize, usize), Line>,
    /// Ends of lines that one side has yet to see.
    unseen_by_sender: Vec<(usize, usize, Instance)>,
    unseen_by_receiver: Vec<(usize, Instance)>,
    /// Grants of former lives: receiver, header, former writer's place.
    grants: Vec<(usize, Header, usize, Instance, Range<u32>)>,
    numbers: u64,
    tickets: u128,
    commits: usize,
    resumed: usize,
    refused_digests: usize,
    /// Of everything that happened, in order.
    log: u64,
}

impl World {
    /// Takes a note of what happened.
    fn note(&mut self, words: &[u64]) {
        for word in words {
            // FNV-1a, by words.
            self.log = (self.log ^ word).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }
}
