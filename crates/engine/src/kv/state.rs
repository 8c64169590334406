//! The book of one arena's blocks: what each is, the free list, the prefix index and the order of eviction.
//!
//! Everything here runs under the pool's mutex and touches no IO. Owner of the state: [`super::BlockPool`].

use super::journal::Journal;
use baton_types::{BlockCounts, BlockHash, BlockId};
use std::collections::{BTreeMap, HashMap};

/// The arena cannot hold what was asked for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room for {wanted} more blocks: {room} of {total} could be freed")]
pub struct NoRoom {
    /// Fresh blocks that were needed.
    pub wanted: usize,
    /// Fresh blocks that there are, counting what may be evicted.
    pub room: usize,
    /// The arena's size in blocks.
    pub total: usize,
}

impl NoRoom {
    /// Another try may succeed once others have ended; never where the arena is too small altogether.
    pub fn is_retryable(&self) -> bool {
        self.wanted <= self.total
    }
}

/// What a block is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Free,
    /// Its key in the eviction order.
    Cached(u64),
    /// How many tables name it; at least one.
    Referenced(u32),
    Reserved,
    Quarantined,
}

#[derive(Debug, Clone)]
pub(super) struct Block {
    pub place: Place,
    pub identity: Option<BlockHash>,
    /// Counts the times that this block was given out for new contents.
    pub generation: u64,
}

#[derive(Debug)]
pub(super) struct Book {
    pub blocks: Vec<Block>,
    pub free: Vec<BlockId>,
    /// Eviction order, the first goes first.
    pub lru: BTreeMap<u64, BlockId>,
    pub index: HashMap<BlockHash, BlockId>,
    pub next_tick: u64,
    pub reserved: usize,
    pub quarantined: usize,
    /// Sum of all tables' lengths; equals the sum of all reference counts.
    pub pins: usize,
    pub journal: Journal,
}

impl Book {
    pub fn new(blocks: u32) -> Self {
        Self {
            blocks: vec![
                Block {
                    place: Place::Free,
                    identity: None,
                    generation: 0
                };
                blocks as usize
            ],
            free: (0..blocks).rev().map(BlockId).collect(),
            lru: BTreeMap::new(),
            index: HashMap::new(),
            next_tick: 0,
            reserved: 0,
            quarantined: 0,
            pins: 0,
            journal: Journal::new(blocks as usize),
        }
    }

    pub fn room(&self) -> usize {
        self.free.len() + self.lru.len()
    }

    pub fn counts(&self) -> BlockCounts {
        // The sum of the parts is at most the number of blocks, which came as u32.
        let n = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let total = n(self.blocks.len());
        let (free, cached) = (n(self.free.len()), n(self.lru.len()));
        let (reserved, quarantined) = (n(self.reserved), n(self.quarantined));
        let referenced = total.saturating_sub(free + cached + reserved + quarantined);
        BlockCounts {
            total,
            free,
            cached,
            referenced,
            reserved,
            quarantined,
        }
    }

    /// Leading blocks of `hashes` that are present.
    pub fn held(&self, hashes: &[BlockHash]) -> usize {
        hashes.iter().take_while(|hash| self.index.contains_key(*hash)).count()
    }

    /// Pins the present prefix and takes fresh blocks for the rest as `fresh_place`, or changes nothing.
    pub fn take(
        &mut self,
        hashes: &[BlockHash],
        max_held: usize,
        total: usize,
        fresh_place: Place,
    ) -> Result<(Vec<BlockId>, usize), NoRoom> {
        let prefix = &hashes[..hashes.len().min(max_held).min(total)];
        let mut taken: Vec<BlockId> = prefix.iter().map_while(|hash| self.index.get(hash).copied()).collect();
        let held = taken.len();
        let evictable_held = taken
            .iter()
            .filter(|id| matches!(self.blocks[id.index()].place, Place::Cached(_)))
            .count();
        let wanted = total - held;
        let room = self.room() - evictable_held;
        if wanted > room {
            return Err(NoRoom {
                wanted,
                room,
                total: self.blocks.len(),
            });
        }
        for id in &taken {
            self.pin(*id);
        }
        for _ in 0..wanted {
            let id = self.fresh(fresh_place);
            taken.push(id);
        }
        Ok((taken, held))
    }

    fn pin(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.index()];
        match block.place {
            Place::Cached(tick) => {
                self.lru.remove(&tick);
                block.place = Place::Referenced(1);
            }
            Place::Referenced(count) => block.place = Place::Referenced(count + 1),
            Place::Free | Place::Reserved | Place::Quarantined => {
                unreachable!("only cached and referenced blocks stand in the prefix index or in a table")
            }
        }
        self.pins += 1;
    }

    /// One table more names each of these, which some table names already.
    pub fn pin_again(&mut self, ids: &[BlockId]) {
        for id in ids {
            self.pin(*id);
        }
    }

    /// A block for new contents. The caller has checked that there is one.
    fn fresh(&mut self, place: Place) -> BlockId {
        let id = match self.free.pop() {
            Some(id) => id,
            None => self.evict(),
        };
        let block = &mut self.blocks[id.index()];
        debug_assert!(block.identity.is_none(), "a block for new contents has no identity");
        block.generation += 1;
        block.place = place;
        match place {
            Place::Referenced(_) => self.pins += 1,
            Place::Reserved => self.reserved += 1,
            Place::Free | Place::Cached(_) | Place::Quarantined => unreachable!("no such kind of fresh block"),
        }
        id
    }

    fn evict(&mut self) -> BlockId {
        let (_, id) = self
            .lru
            .pop_first()
            .expect("the caller has checked that a block is free or cached");
        let block = &mut self.blocks[id.index()];
        block.place = Place::Free;
        if let Some(hash) = block.identity.take() {
            self.index.remove(&hash);
            self.journal.note(id);
        }
        metrics::counter!("baton_engine_cache_evicted_blocks_total").increment(1);
        id
    }

    /// One table less names each of these. The last block goes first, so that a chain is evicted from its end.
    pub fn unpin(&mut self, ids: &[BlockId]) {
        for id in ids.iter().rev() {
            self.pins -= 1;
            let tick = self.next_tick;
            let block = &mut self.blocks[id.index()];
            match block.place {
                Place::Referenced(1) if block.identity.is_some() => {
                    self.next_tick += 1;
                    block.place = Place::Cached(tick);
                    self.lru.insert(tick, *id);
                }
                Place::Referenced(1) => {
                    block.place = Place::Free;
                    self.free.push(*id);
                }
                Place::Referenced(count) => block.place = Place::Referenced(count - 1),
                Place::Free | Place::Cached(_) | Place::Reserved | Place::Quarantined => {
                    // A guard's block that is in another state would be given out twice: leave it where it is.
                    tracing::error!(block = id.0, place = ?block.place, "a table named a block that is not referenced");
                }
            }
        }
    }

    /// Reserved blocks become a table's.
    pub fn commit(&mut self, ids: &[BlockId]) {
        for id in ids {
            self.blocks[id.index()].place = Place::Referenced(1);
        }
        self.reserved -= ids.len();
        self.pins += ids.len();
    }

    /// Reserved blocks go into quarantine.
    pub fn quarantine(&mut self, ids: &[BlockId]) {
        for id in ids {
            self.blocks[id.index()].place = Place::Quarantined;
        }
        self.reserved -= ids.len();
        self.quarantined += ids.len();
    }

    /// Reserved or quarantined blocks are nobody's any more.
    pub fn release(&mut self, ids: &[BlockId]) {
        for id in ids {
            match std::mem::replace(&mut self.blocks[id.index()].place, Place::Free) {
                Place::Reserved => self.reserved -= 1,
                Place::Quarantined => self.quarantined -= 1,
                Place::Free | Place::Cached(_) | Place::Referenced(_) => {
                    unreachable!("only guards of reserved and quarantined blocks release them")
                }
            }
            self.free.push(*id);
        }
    }

    /// Gives a referenced block its identity, unless another block has it already.
    pub fn publish(&mut self, id: BlockId, hash: BlockHash) {
        let block = &mut self.blocks[id.index()];
        if block.identity.is_none() && !self.index.contains_key(&hash) {
            block.identity = Some(hash);
            self.index.insert(hash, id);
            self.journal.note(id);
        }
    }

    /// Forgets every identity; cached blocks become free.
    pub fn clear_cache(&mut self) {
        for (_, id) in self.index.drain() {
            self.blocks[id.index()].identity = None;
            self.journal.note(id);
        }
        while let Some((_, id)) = self.lru.pop_first() {
            self.blocks[id.index()].place = Place::Free;
            self.free.push(id);
        }
    }
}
