//! Which node holds which KV blocks, and from that how much of a prompt each node need not compute again.
//!
//! Two directions are kept: from a block to its holders, to walk a prompt's chain, and from a node to its blocks, to forget
//! a node at the cost of what it held. A block goes by eight bytes of its hash: two blocks that share them by chance (one in
//! 10^7 for an index of a million) cost a wrong hint. Up to three holders stand beside the block itself, more in a sorted list
//! or, where that is not larger, in a set of bits. Memory stays below 100 bytes per location, and locations below a bound given
//! at the start: what comes beyond it is counted and not indexed, which costs a prefix hit and never an answer.

use crate::digest::Digests;
use crate::table::{NOTHING, Table};
use baton_types::{BlockHash, Instance};
use std::collections::{HashMap, HashSet};

/// A block's name here. A published block hash is the end of a BLAKE3 digest: eight of its bytes are as good as any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key(u64);

impl From<&BlockHash> for Key {
    fn from(hash: &BlockHash) -> Self {
        Self(hash.0.first_chunk().map_or(0, |first| u64::from_le_bytes(*first)))
    }
}

/// Place of a node in `BlockIndex::nodes`; taken again once the node is dropped. Below [`NO_SLOT`].
type Slot = u32;

/// Bits of a slot in a [`Word`].
const SLOT_BITS: u32 = 21;
/// Where a word has fewer than [`FEW`] slots, this is in place of the others. Nodes beyond so many are not indexed.
const NO_SLOT: Slot = (1 << SLOT_BITS) - 1;
/// Slots of a word.
const FEW: usize = 3;

/// A block's holders: up to three sorted slots, or, where the highest bit is set, a place in `BlockIndex::sets`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Word(u64);

impl Word {
    const SHARED: u64 = 1 << 63;
    /// Nobody holds the block.
    const NOBODY: Self = Self(Self::SHARED - 1);

    /// As the table gives it.
    fn of(value: u64) -> Self {
        if value == NOTHING { Self::NOBODY } else { Self(value) }
    }

    /// Of at most [`FEW`] sorted slots.
    fn few(slots: &[Slot]) -> Self {
        let mut word = Self::NOBODY.0;
        for slot in slots.iter().rev() {
            word = word << SLOT_BITS | u64::from(*slot);
        }
        Self(word & !Self::SHARED)
    }

    fn set(place: usize) -> Self {
        Self(Self::SHARED | place as u64)
    }

    /// The place of its set, where it has one.
    fn place(self) -> Option<usize> {
        (self.0 & Self::SHARED != 0).then_some((self.0 & !Self::SHARED) as usize)
    }

    /// Its slots, where it has no set; those from `count` on are [`NO_SLOT`].
    fn slots(self) -> ([Slot; FEW], usize) {
        let slots = std::array::from_fn(|at| (self.0 >> (SLOT_BITS * at as u32)) as Slot & NO_SLOT);
        (slots, slots.iter().take_while(|slot| **slot != NO_SLOT).count())
    }
}

/// Blocks of a chain that are looked up together: their places in a large table are far apart, and fetched from memory at
/// the same time.
const AHEAD: usize = 32;

/// Many holders of one block.
#[derive(Debug)]
enum Holders {
    /// Sorted.
    List(Vec<Slot>),
    /// One bit per slot, grown as needed.
    Bits { words: Vec<u64>, count: u32 },
}

/// What one node holds.
#[derive(Debug)]
struct Holding {
    instance: Instance,
    blocks: HashSet<Key, Digests>,
}

/// For each node that holds the beginning of a chain, how many blocks it holds without a gap.
#[derive(Debug, Clone, Default)]
pub struct Held(HashMap<Instance, u32, Digests>);

impl Held {
    /// Blocks that a node holds; 0 where it does not hold the first.
    pub fn blocks(&self, node: Instance) -> u32 {
        self.0.get(&node).copied().unwrap_or(0)
    }

    /// Nodes that hold at least the first.
    pub fn nodes(&self) -> usize {
        self.0.len()
    }

    /// The same tokens may have another chain, where nodes differ in their arithmetic: the longer one counts.
    pub fn join(&mut self, other: Self) {
        for (node, blocks) in other.0 {
            let known = self.0.entry(node).or_default();
            *known = blocks.max(*known);
        }
    }
}

/// The index. Its memory is bounded by `limit`.
#[derive(Debug)]
pub struct BlockIndex {
    limit: usize,
    locations: usize,
    refused: u64,
    /// From keys to words.
    blocks: Table,
    sets: Vec<Holders>,
    free_sets: Vec<usize>,
    nodes: Vec<Option<Holding>>,
    free_nodes: Vec<Slot>,
    slots: HashMap<Instance, Slot>,
}

impl BlockIndex {
    /// An index of at most `limit` locations; a location is one block on one node.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            locations: 0,
            refused: 0,
            blocks: Table::new(),
            sets: Vec::new(),
            free_sets: Vec::new(),
            nodes: Vec::new(),
            free_nodes: Vec::new(),
            slots: HashMap::new(),
        }
    }

    /// Locations that are indexed.
    pub fn locations(&self) -> usize {
        self.locations
    }

    /// Locations that were not indexed, for want of room, since the start.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// `node` holds these blocks from now on. Those known already are no change.
    pub fn add(&mut self, node: Instance, hashes: &[BlockHash]) {
        if hashes.is_empty() {
            return;
        }
        let Some(slot) = self.slot(node) else {
            self.refused += hashes.len() as u64;
            return;
        };
        for key in hashes.iter().map(Key::from) {
            let full = self.locations >= self.limit;
            let Some(holding) = self.nodes[slot as usize].as_mut() else {
                return;
            };
            if full {
                self.refused += u64::from(!holding.blocks.contains(&key));
            } else if holding.blocks.insert(key) {
                self.locations += 1;
                self.hold(key, slot);
            }
        }
    }

    /// `node` holds these blocks no more. Those not known are no change.
    pub fn remove(&mut self, node: Instance, hashes: &[BlockHash]) {
        let Some(slot) = self.slots.get(&node).copied() else {
            return;
        };
        for key in hashes.iter().map(Key::from) {
            let holding = self.nodes[slot as usize].as_mut();
            if holding.is_some_and(|holding| holding.blocks.remove(&key)) {
                self.locations -= 1;
                self.release(key, slot);
            }
        }
    }

    /// `node` is gone, and all that it held. Costs time in proportion to what it held.
    pub fn drop_node(&mut self, node: Instance) {
        let Some(slot) = self.slots.remove(&node) else { return };
        let holding = self.nodes[slot as usize].take();
        for key in holding.iter().flat_map(|holding| &holding.blocks) {
            self.locations -= 1;
            self.release(*key, slot);
        }
        self.free_nodes.push(slot);
    }

    /// Which nodes hold the beginning of `chain`, and how much of it.
    pub fn held(&self, chain: &[BlockHash]) -> Held {
        let mut out = Held::default();
        self.walk(chain, &mut out);
        out
    }

    fn walk(&self, chain: &[BlockHash], out: &mut Held) {
        let Some(first) = chain.first().map(|hash| Word::of(self.blocks.get(Key::from(hash).0))) else {
            return;
        };
        if first == Word::NOBODY {
            return;
        }
        let mut alive = self.all(first);
        out.0.reserve(alive.len());
        let leave = |out: &mut Held, slot: Slot, blocks: usize| {
            if let Some(holding) = self.nodes[slot as usize].as_ref() {
                out.0
                    .insert(holding.instance, u32::try_from(blocks).unwrap_or(u32::MAX));
            }
        };
        let mut before = first;
        for (part, blocks) in chain.chunks(AHEAD).enumerate() {
            let keys: [u64; AHEAD] = std::array::from_fn(|at| blocks.get(at).map_or(0, |hash| Key::from(hash).0));
            let words = self.blocks.get_all(&keys).map(Word::of);
            for (at, word) in words[..blocks.len()].iter().enumerate() {
                if *word == before {
                    continue;
                }
                before = *word;
                let mut leaves = |slot| leave(out, slot, part * AHEAD + at);
                match word.place().map(|place| &self.sets[place]) {
                    None => {
                        let (slots, count) = word.slots();
                        alive.keep_list(&slots[..count], &mut leaves);
                    }
                    Some(Holders::List(list)) => alive.keep_list(list, &mut leaves),
                    Some(Holders::Bits { words, .. }) => alive.keep_bits(words, &mut leaves),
                }
                if alive.is_empty() {
                    return;
                }
            }
        }
        alive.each(|slot| leave(out, slot, chain.len()));
    }

    /// Memory in use, in bytes, from the capacities of all that is kept.
    pub fn bytes(&self) -> usize {
        /// A table of the standard library has 8 buckets for 7 entries, a power of two of them, and a byte beside each.
        fn table(capacity: usize, entry: usize) -> usize {
            let buckets = if capacity == 0 {
                0
            } else {
                (capacity * 8 / 7).next_power_of_two()
            };
            buckets * (entry + 1)
        }
        let sets = self.sets.iter().map(|set| match set {
            Holders::List(list) => list.capacity() * size_of::<Slot>(),
            Holders::Bits { words, .. } => words.capacity() * size_of::<u64>(),
        });
        let nodes = self.nodes.iter().flatten();
        self.blocks.bytes()
            + self.sets.capacity() * size_of::<Holders>()
            + sets.sum::<usize>()
            + self.free_sets.capacity() * size_of::<usize>()
            + self.free_nodes.capacity() * size_of::<Slot>()
            + self.nodes.capacity() * size_of::<Option<Holding>>()
            + nodes
                .map(|node| table(node.blocks.capacity(), size_of::<Key>()))
                .sum::<usize>()
            + table(self.slots.capacity(), size_of::<(Instance, Slot)>())
    }

    fn slot(&mut self, node: Instance) -> Option<Slot> {
        if let Some(slot) = self.slots.get(&node) {
            return Some(*slot);
        }
        let slot = match self.free_nodes.pop() {
            Some(slot) => slot,
            None => {
                let slot = Slot::try_from(self.nodes.len()).ok().filter(|slot| *slot < NO_SLOT)?;
                self.nodes.push(None);
                slot
            }
        };
        self.nodes[slot as usize] = Some(Holding {
            instance: node,
            blocks: HashSet::default(),
        });
        self.slots.insert(node, slot);
        Some(slot)
    }

    fn hold(&mut self, key: Key, slot: Slot) {
        let word = Word::of(self.blocks.get(key.0));
        if let Some(place) = word.place() {
            self.sets[place].insert(slot, self.nodes.len());
            return;
        }
        let (slots, count) = word.slots();
        let at = slots[..count].partition_point(|held| *held < slot);
        let mut all = [NO_SLOT; FEW + 1];
        all[..at].copy_from_slice(&slots[..at]);
        all[at] = slot;
        all[at + 1..=count].copy_from_slice(&slots[at..count]);
        if count < FEW {
            self.blocks.set(key.0, Word::few(&all[..=count]).0);
            return;
        }
        let list = Holders::List(all.to_vec());
        let place = match self.free_sets.pop() {
            Some(place) => {
                self.sets[place] = list;
                place
            }
            None => {
                self.sets.push(list);
                self.sets.len() - 1
            }
        };
        self.blocks.set(key.0, Word::set(place).0);
    }

    fn release(&mut self, key: Key, slot: Slot) {
        let word = Word::of(self.blocks.get(key.0));
        let Some(place) = word.place() else {
            let (slots, count) = word.slots();
            let mut left = slots;
            let at = slots[..count].partition_point(|held| *held < slot);
            left.copy_within(at + 1.., at);
            if count <= 1 {
                self.blocks.remove(key.0);
            } else {
                self.blocks.set(key.0, Word::few(&left[..count - 1]).0);
            }
            return;
        };
        if let Some(few) = self.sets[place].remove(slot, self.nodes.len()) {
            self.blocks.set(key.0, few.0);
            self.sets[place] = Holders::List(Vec::new());
            self.free_sets.push(place);
        }
    }

    fn all(&self, word: Word) -> Alive {
        match word.place().map(|place| &self.sets[place]) {
            None => {
                let (slots, count) = word.slots();
                Alive::List(slots[..count].to_vec())
            }
            Some(Holders::List(list)) => Alive::List(list.clone()),
            Some(Holders::Bits { words, .. }) => Alive::Bits(words.clone()),
        }
    }
}

/// Whether bits for so many nodes take no more room than a list of so many holders.
fn bits_are_smaller(holders: usize, nodes: usize) -> bool {
    nodes <= holders * 32
}

impl Holders {
    /// Adds a slot that is not in it; `nodes` is the number of slots there are.
    fn insert(&mut self, slot: Slot, nodes: usize) {
        match self {
            Self::List(list) => {
                let at = list.partition_point(|held| *held < slot);
                list.insert(at, slot);
                if bits_are_smaller(list.len(), nodes) {
                    let mut words = vec![0; nodes.div_ceil(64)];
                    list.iter()
                        .for_each(|held| words[*held as usize / 64] |= 1 << (held % 64));
                    let count = u32::try_from(list.len()).unwrap_or(u32::MAX);
                    *self = Self::Bits { words, count };
                }
            }
            Self::Bits { words, count } => {
                let word = slot as usize / 64;
                if words.len() <= word {
                    words.resize(word + 1, 0);
                }
                words[word] |= 1 << (slot % 64);
                *count += 1;
            }
        }
    }

    /// Takes out a slot that is in it; gives those that are left where they need no set.
    fn remove(&mut self, slot: Slot, nodes: usize) -> Option<Word> {
        match self {
            Self::List(list) => {
                list.retain(|held| *held != slot);
                (list.len() <= FEW).then(|| Word::few(list))
            }
            Self::Bits { words, count } => {
                words[slot as usize / 64] &= !(1 << (slot % 64));
                *count -= 1;
                // Half of what made it bits: a block at the border does not change its form each time.
                if bits_are_smaller(*count as usize * 2, nodes) && *count as usize > FEW {
                    return None;
                }
                let mut list = Vec::with_capacity(*count as usize);
                each_bit(words, |held| list.push(held));
                let few = (list.len() <= FEW).then(|| Word::few(&list));
                *self = Self::List(list);
                few
            }
        }
    }
}

fn each_bit(words: &[u64], mut each: impl FnMut(Slot)) {
    for (base, word) in (0..).step_by(64).zip(words) {
        let mut left = *word;
        while left != 0 {
            each(base + left.trailing_zeros());
            left &= left - 1;
        }
    }
}

fn has_bit(words: &[u64], slot: Slot) -> bool {
    words
        .get(slot as usize / 64)
        .is_some_and(|word| word >> (slot % 64) & 1 != 0)
}

/// The nodes that hold every block of a chain so far.
enum Alive {
    List(Vec<Slot>),
    Bits(Vec<u64>),
}

impl Alive {
    /// How many; with bits not fewer than that.
    fn len(&self) -> usize {
        match self {
            Self::List(list) => list.len(),
            Self::Bits(words) => words.len() * 64,
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::List(list) => list.is_empty(),
            Self::Bits(words) => words.iter().all(|word| *word == 0),
        }
    }

    fn each(&self, mut each: impl FnMut(Slot)) {
        match self {
            Self::List(list) => list.iter().copied().for_each(each),
            Self::Bits(words) => each_bit(words, &mut each),
        }
    }

    /// Keeps those in a sorted list; the others leave.
    fn keep_list(&mut self, holders: &[Slot], mut leaves: impl FnMut(Slot)) {
        match self {
            // Most often a chain's next block has the holders of the one before.
            Self::List(list) if list == holders => {}
            Self::List(list) => list.retain(|slot| {
                let stays = holders.binary_search(slot).is_ok();
                if !stays {
                    leaves(*slot);
                }
                stays
            }),
            Self::Bits(words) => {
                let stay: Vec<Slot> = holders.iter().copied().filter(|slot| has_bit(words, *slot)).collect();
                stay.iter()
                    .for_each(|slot| words[*slot as usize / 64] &= !(1 << (slot % 64)));
                each_bit(words, leaves);
                *self = Self::List(stay);
            }
        }
    }

    fn keep_bits(&mut self, holders: &[u64], mut leaves: impl FnMut(Slot)) {
        match self {
            Self::List(list) => list.retain(|slot| {
                let stays = has_bit(holders, *slot);
                if !stays {
                    leaves(*slot);
                }
                stays
            }),
            Self::Bits(words) => {
                for (index, word) in words.iter_mut().enumerate() {
                    let stay = *word & holders.get(index).copied().unwrap_or(0);
                    if stay != *word {
                        let base = u32::try_from(index * 64).unwrap_or(u32::MAX);
                        each_bit(&[*word & !stay], |bit| leaves(base + bit));
                        *word = stay;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn hash(number: u64) -> BlockHash {
        let mut bytes = [0; 16];
        let mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bytes[..8].copy_from_slice(&mixed.to_le_bytes());
        bytes[8..].copy_from_slice(&number.to_le_bytes());
        BlockHash(bytes)
    }

    fn hashes(numbers: impl IntoIterator<Item = u64>) -> Vec<BlockHash> {
        numbers.into_iter().map(hash).collect()
    }

    fn held(index: &BlockIndex, chain: &[BlockHash]) -> Vec<(u64, u32)> {
        let mut out: Vec<_> = index
            .held(chain)
            .0
            .into_iter()
            .map(|(node, blocks)| (node.0, blocks))
            .collect();
        out.sort_unstable();
        out
    }

    #[test]
    fn a_prefix_ends_at_the_first_block_that_is_missing() {
        let mut index = BlockIndex::new(100);
        index.add(Instance(1), &hashes(0..5));
        index.add(Instance(2), &hashes([0, 1, 3, 4]));
        index.add(Instance(3), &hashes(1..5));
        assert_eq!(held(&index, &hashes(0..5)), [(1, 5), (2, 2)]);
        assert_eq!(held(&index, &hashes(0..9)), [(1, 5), (2, 2)]);
        assert_eq!(held(&index, &hashes(0..1)), [(1, 1), (2, 1)]);
        let mut both = index.held(&hashes([3]));
        both.join(index.held(&hashes(0..4)));
        let blocks = [1, 2, 3, 4].map(|node| both.blocks(Instance(node)));
        assert_eq!((blocks, both.nodes()), ([4, 2, 1, 0], 3));
        assert_eq!(held(&index, &hashes(9..12)), []);
        assert_eq!(held(&index, &[]), []);
        index.remove(Instance(1), &hashes([2, 77]));
        assert_eq!(held(&index, &hashes(0..5)), [(1, 2), (2, 2)]);
        index.drop_node(Instance(1));
        index.drop_node(Instance(1));
        index.remove(Instance(1), &hashes([0]));
        assert_eq!(held(&index, &hashes(0..5)), [(2, 2)]);
        assert_eq!(index.locations(), 8);
    }

    #[test]
    fn beyond_its_bound_it_counts_and_does_not_index() {
        let mut index = BlockIndex::new(3);
        index.add(Instance(1), &hashes(0..2));
        index.add(Instance(2), &hashes(0..2));
        index.add(Instance(1), &hashes(0..2));
        assert_eq!((index.locations(), index.refused()), (3, 1));
        assert_eq!(held(&index, &hashes(0..2)), [(1, 2), (2, 1)]);
        index.remove(Instance(2), &hashes(0..2));
        index.add(Instance(3), &hashes(0..1));
        assert_eq!((index.locations(), index.refused()), (3, 1));
        assert_eq!(held(&index, &hashes(0..2)), [(1, 2), (3, 1)]);
    }

    #[test]
    fn a_new_node_in_an_old_ones_slot_holds_nothing_of_it() {
        let mut index = BlockIndex::new(1000);
        (0..70).for_each(|node| index.add(Instance(node), &hashes(0..3)));
        index.drop_node(Instance(7));
        index.add(Instance(700), &hashes(0..1));
        let all = held(&index, &hashes(0..3));
        assert_eq!(
            (all.len(), all.contains(&(700, 1)), all.iter().any(|(n, _)| *n == 7)),
            (70, true, false)
        );
        (0..70).for_each(|node| index.drop_node(Instance(node)));
        index.drop_node(Instance(700));
        assert_eq!(index.locations(), 0);
        assert!(index.blocks.len() == 0 && index.slots.is_empty() && index.free_sets.len() == index.sets.len());
    }

    /// Sizes at which a table has just doubled are the worst.
    #[test]
    fn a_location_takes_less_than_100_bytes() {
        for (nodes, blocks, holders) in [
            (50, 920, 1),
            (50, 460, 2),
            (100, 920, 5),
            (128, 460, 40),
            (300, 920, 300),
        ] {
            let mut index = BlockIndex::new(usize::MAX);
            for node in 0..nodes {
                let group = node / holders;
                index.add(Instance(node), &hashes((0..blocks).map(|block| group * blocks + block)));
            }
            let each = index.bytes() / index.locations();
            assert!(
                each <= 100,
                "{each} bytes with {nodes} nodes, {holders} of which hold each block"
            );
        }
    }

    #[derive(Debug, Clone)]
    enum Change {
        Add(u64, Vec<u64>),
        Remove(u64, Vec<u64>),
        Drop(u64),
    }

    fn change() -> impl Strategy<Value = Change> {
        let (node, blocks) = (0u64..80, || prop::collection::vec(0u64..12, 1..12));
        prop_oneof![
            6 => (node.clone(), blocks()).prop_map(|(node, blocks)| Change::Add(node, blocks)),
            3 => (node.clone(), blocks()).prop_map(|(node, blocks)| Change::Remove(node, blocks)),
            1 => node.prop_map(Change::Drop),
        ]
    }

    proptest! {
        #[test]
        fn it_agrees_with_plain_sets(
            first in 0u64..90, changes in prop::collection::vec(change(), 0..120), chain in prop::collection::vec(0u64..12, 0..12),
        ) {
            let mut index = BlockIndex::new(usize::MAX);
            let mut model: HashMap<u64, BTreeSet<u64>> = HashMap::new();
            let crowd = (0..first).map(|node| Change::Add(node, (0..12).collect()));
            for change in crowd.chain(changes) {
                match change {
                    Change::Add(node, blocks) => {
                        index.add(Instance(node), &hashes(blocks.iter().copied()));
                        model.entry(node).or_default().extend(blocks);
                    }
                    Change::Remove(node, blocks) => {
                        index.remove(Instance(node), &hashes(blocks.iter().copied()));
                        model.entry(node).or_default().retain(|block| !blocks.contains(block));
                    }
                    Change::Drop(node) => {
                        index.drop_node(Instance(node));
                        model.remove(&node);
                    }
                }
                prop_assert_eq!(index.locations(), model.values().map(BTreeSet::len).sum::<usize>());
            }
            let mut expected: Vec<(u64, u32)> = model.iter().map(|(node, blocks)| {
                (*node, chain.iter().take_while(|block| blocks.contains(block)).count() as u32)
            }).filter(|(_, blocks)| *blocks > 0).collect();
            expected.sort_unstable();
            prop_assert_eq!(held(&index, &hashes(chain.iter().copied())), expected);
        }
    }
}
