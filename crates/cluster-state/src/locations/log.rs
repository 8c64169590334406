//! What a node has written of its blocks, and what it should write next. Pure; the publisher does the writing.
//!
//! Changes wait in a queue until they are written, oldest first; those that undo each other meanwhile are never written.
//! Each write is one segment. Two rules bound what stands in the store, each at the cost of rewriting something now and
//! then: small segments are gathered into one once there are [`SMALL_SEGMENTS`] of them, and the oldest one is rewritten
//! without its dead entries while more than half of all entries are dead. Either way the new segment and the removal of
//! those that it replaces are one txn, so that a reader never misses a block in between.

use crate::keys::blocks::{self, BlockSegment};
use baton_types::{BlockChanges, BlockHash};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;

/// More segments than this of less than half the largest size are made one.
const SMALL_SEGMENTS: usize = 16;

/// One write: a new segment, and the removal of others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Write {
    /// Place of the new segment.
    pub(super) seq: u64,
    pub(super) segment: BlockSegment,
    /// Places of those that it replaces.
    pub(super) replaces: Range<u64>,
}

/// A segment that stands in the store.
#[derive(Debug)]
struct Kept {
    seq: u64,
    entries: usize,
    evicted: Vec<BlockHash>,
}

#[derive(Debug)]
pub(super) struct LocationLog {
    entries_max: usize,
    /// What the node holds.
    held: HashSet<BlockHash>,
    /// What the segments say that it holds, and the place of the one that says so last.
    told: HashMap<BlockHash, u64>,
    /// What may have changed, and since when: the oldest first.
    queue: VecDeque<(u64, Vec<BlockHash>)>,
    queued: usize,
    segments: VecDeque<Kept>,
    next_seq: u64,
}

impl LocationLog {
    pub(super) fn new() -> Self {
        Self::with_segments_of(blocks::HASHES_MAX)
    }

    fn with_segments_of(entries_max: usize) -> Self {
        Self {
            entries_max,
            held: HashSet::new(),
            told: HashMap::new(),
            queue: VecDeque::new(),
            queued: 0,
            segments: VecDeque::new(),
            next_seq: 0,
        }
    }

    /// The node's blocks changed, at this time at the earliest.
    pub(super) fn change(&mut self, changes: BlockChanges, since_unix_us: u64) {
        let BlockChanges { stored, mut evicted } = changes;
        for hash in &evicted {
            self.held.remove(hash);
        }
        self.held.extend(&stored);
        evicted.extend(stored);
        self.enqueue(evicted, since_unix_us);
        // Blocks that come and go while nothing can be written would make the queue ever longer.
        if self.queued > 2 * (self.held.len() + self.told.len()) + self.entries_max {
            let oldest = self.waiting_since().unwrap_or(since_unix_us);
            self.enqueue_difference(oldest);
        }
    }

    /// Since when the oldest change waits to be written.
    pub(super) fn waiting_since(&self) -> Option<u64> {
        self.queue.front().map(|(since, _)| *since)
    }

    /// Nothing of what was written stands any more: all is to be written again.
    pub(super) fn restart(&mut self, now_unix_us: u64) {
        self.told.clear();
        self.segments.clear();
        let oldest = self.waiting_since().unwrap_or(now_unix_us);
        self.enqueue_difference(oldest);
    }

    /// The next write; `None` where nothing has changed. It counts as done: repeat it until it is, or [`Self::restart`].
    pub(super) fn next_write(&mut self) -> Option<Write> {
        self.drop_settled();
        let since_unix_us = self.waiting_since()?;
        let seq = self.next_seq;
        self.next_seq += 1;
        let (replaced, room) = self.choose_replaced();
        let mut changes = self.take_queued(seq, room);
        let gone: Vec<Kept> = self.segments.drain(replaced.clone()).collect();
        let replaces = match (gone.first(), gone.last()) {
            (Some(first), Some(last)) => first.seq..last.seq + 1,
            _ => seq..seq,
        };
        if !gone.is_empty() {
            for (hash, place) in self.told.iter_mut().filter(|(_, place)| replaces.contains(*place)) {
                *place = seq;
                changes.stored.push(*hash);
            }
            // What left only matters where an older segment may still say that it is there.
            if replaced.start > 0 {
                let left = gone.into_iter().flat_map(|segment| segment.evicted);
                changes
                    .evicted
                    .extend(left.filter(|hash| !self.told.contains_key(hash)));
            }
        }
        self.segments.push_back(Kept {
            seq,
            entries: changes.len(),
            evicted: changes.evicted.clone(),
        });
        let segment = BlockSegment { since_unix_us, changes };
        Some(Write { seq, segment, replaces })
    }

    /// Which segments the next write replaces, and how many new entries fit beside what it takes over from them.
    fn choose_replaced(&self) -> (Range<usize>, usize) {
        let (count, max) = (self.segments.len(), self.entries_max);
        let is_small = |segment: &&Kept| segment.entries < max / 2;
        if self.segments.iter().rev().take_while(is_small).count() >= SMALL_SEGMENTS {
            let (mut from, mut taken) = (count, 0);
            while from > 0 && taken + self.segments[from - 1].entries < max {
                from -= 1;
                taken += self.segments[from].entries;
            }
            return (from..count, max - taken);
        }
        let entries: usize = self.segments.iter().map(|segment| segment.entries).sum();
        if let Some(oldest) = self.segments.front()
            && entries > 2 * (self.told.len() + max)
        {
            let live = self.told.values().filter(|place| **place == oldest.seq).count();
            return (0..1, max - live);
        }
        (count..count, max)
    }

    /// Takes up to `room` changes off the queue.
    fn take_queued(&mut self, seq: u64, room: usize) -> BlockChanges {
        let mut changes = BlockChanges::default();
        while changes.len() < room {
            let Some((_, hashes)) = self.queue.front_mut() else {
                break;
            };
            let Some(hash) = hashes.pop() else {
                self.queue.pop_front();
                continue;
            };
            self.queued -= 1;
            match (self.held.contains(&hash), self.told.entry(hash)) {
                (true, Entry::Vacant(entry)) => {
                    entry.insert(seq);
                    changes.stored.push(hash);
                }
                (false, Entry::Occupied(entry)) => {
                    entry.remove();
                    changes.evicted.push(hash);
                }
                (true, Entry::Occupied(_)) | (false, Entry::Vacant(_)) => {}
            }
        }
        self.drop_settled();
        changes
    }

    /// Takes off the queue's front what has been undone.
    fn drop_settled(&mut self) {
        while let Some((_, hashes)) = self.queue.front_mut() {
            match hashes.last() {
                Some(hash) if self.held.contains(hash) != self.told.contains_key(hash) => return,
                Some(_) => {
                    hashes.pop();
                    self.queued -= 1;
                }
                None => drop(self.queue.pop_front()),
            }
        }
    }

    fn enqueue(&mut self, hashes: Vec<BlockHash>, since_unix_us: u64) {
        if !hashes.is_empty() {
            self.queued += hashes.len();
            self.queue.push_back((since_unix_us, hashes));
        }
    }

    /// Puts what differs in place of the queue.
    fn enqueue_difference(&mut self, since_unix_us: u64) {
        self.queue.clear();
        self.queued = 0;
        let came = self.held.iter().filter(|hash| !self.told.contains_key(*hash));
        let left = self.told.keys().filter(|hash| !self.held.contains(*hash));
        let hashes = came.chain(left).copied().collect();
        self.enqueue(hashes, since_unix_us);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    const ENTRIES_MAX: usize = 8;

    fn hash(n: u8) -> BlockHash {
        BlockHash([n; 16])
    }

    /// The store as readers see it: one that reads all of it, and one that followed every write.
    #[derive(Default)]
    struct Readers {
        segments: BTreeMap<u64, BlockSegment>,
        followed: BTreeSet<BlockHash>,
    }

    fn fold(into: &mut BTreeSet<BlockHash>, segment: &BlockSegment) {
        for hash in &segment.changes.evicted {
            into.remove(hash);
        }
        into.extend(&segment.changes.stored);
    }

    impl Readers {
        fn write(&mut self, write: Write) {
            assert!(write.segment.changes.len() <= ENTRIES_MAX, "{write:?}");
            assert!(self.segments.last_key_value().is_none_or(|(last, _)| *last < write.seq));
            fold(&mut self.followed, &write.segment);
            self.segments.insert(write.seq, write.segment);
            self.segments.retain(|seq, _| !write.replaces.contains(seq));
        }

        fn snapshot(&self) -> BTreeSet<BlockHash> {
            let mut all = BTreeSet::new();
            self.segments.values().for_each(|segment| fold(&mut all, segment));
            all
        }
    }

    #[derive(Debug, Clone)]
    enum Op {
        Toggle(Vec<u8>),
        Write,
        Restart,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            10 => prop::collection::vec(0u8..60, 1..12).prop_map(Op::Toggle),
            20 => Just(Op::Write),
            1 => Just(Op::Restart),
        ]
    }

    proptest! {
        #[test]
        fn readers_see_what_the_node_holds(ops in prop::collection::vec(op(), 0..400)) {
            let mut log = LocationLog::with_segments_of(ENTRIES_MAX);
            let (mut held, mut readers) = (BTreeSet::new(), Readers::default());
            for (op, now) in ops.into_iter().zip(1u64..) {
                match op {
                    Op::Toggle(numbers) => {
                        let mut changes = BlockChanges::default();
                        for n in numbers.into_iter().collect::<BTreeSet<u8>>() {
                            if held.remove(&hash(n)) {
                                changes.evicted.push(hash(n));
                            } else {
                                held.insert(hash(n));
                                changes.stored.push(hash(n));
                            }
                        }
                        log.change(changes, now);
                    }
                    Op::Write => {
                        let oldest = log.waiting_since();
                        if let Some(write) = log.next_write() {
                            prop_assert!(Some(write.segment.since_unix_us) >= oldest);
                            readers.write(write);
                        }
                    }
                    Op::Restart => {
                        readers = Readers::default();
                        log.restart(now);
                    }
                }
                prop_assert_eq!(readers.snapshot(), readers.followed.clone());
                prop_assert!(log.queued <= 2 * (log.held.len() + log.told.len()) + ENTRIES_MAX);
            }
            for _ in 0..1000 {
                match log.next_write() {
                    Some(write) => readers.write(write),
                    None => break,
                }
            }
            prop_assert_eq!(log.waiting_since(), None);
            prop_assert_eq!(readers.snapshot(), held);
        }

        #[test]
        fn what_stands_in_the_store_is_bounded(rounds in prop::collection::vec(prop::collection::vec(0u8..40, 1..4), 200..600)) {
            let mut log = LocationLog::with_segments_of(ENTRIES_MAX);
            let (mut held, mut readers) = (BTreeSet::<u8>::new(), Readers::default());
            for numbers in rounds {
                let numbers: BTreeSet<u8> = numbers.into_iter().collect();
                let (evicted, stored): (Vec<u8>, Vec<u8>) = numbers.into_iter().partition(|n| held.contains(n));
                held.retain(|n| !evicted.contains(n));
                held.extend(&stored);
                let hashes = |numbers: Vec<u8>| numbers.into_iter().map(hash).collect();
                log.change(BlockChanges { stored: hashes(stored), evicted: hashes(evicted) }, 0);
                if let Some(write) = log.next_write() {
                    readers.write(write);
                }
                let entries: usize = readers.segments.values().map(|segment| segment.changes.len()).sum();
                // Twice what lives, the slack of two segments, and what small ones may add before they are gathered.
                let slack = (2 + SMALL_SEGMENTS) * ENTRIES_MAX;
                prop_assert!(entries <= 2 * held.len() + slack, "{entries} entries for {} blocks", held.len());
                prop_assert!(readers.segments.len() <= 2 * SMALL_SEGMENTS + 2 * entries.div_ceil(ENTRIES_MAX / 2));
            }
        }
    }

    #[test]
    fn what_undoes_itself_is_never_written() {
        let mut log = LocationLog::new();
        let stored = |n| BlockChanges {
            stored: vec![hash(n)],
            ..BlockChanges::default()
        };
        let evicted = |n| BlockChanges {
            evicted: vec![hash(n)],
            ..BlockChanges::default()
        };
        log.change(stored(1), 5);
        log.change(evicted(1), 6);
        assert_eq!(log.next_write(), None);
        log.change(stored(2), 7);
        log.change(stored(3), 9);
        assert_eq!(log.waiting_since(), Some(7));
        let write = log.next_write().unwrap();
        assert_eq!((write.segment.since_unix_us, write.segment.changes.len()), (7, 2));
        assert_eq!(write.replaces, 0..0);
        log.change(evicted(3), 10);
        log.restart(11);
        let again = log.next_write().unwrap();
        assert_eq!(
            (again.seq, again.segment.changes.stored.as_slice()),
            (1, &[hash(2)][..])
        );
    }
}
