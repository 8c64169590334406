//! The blocks of one node: free, in tables, kept for later prompts. Counted, not placed; the book of a live node is the block pool
//! of `baton-engine`. Prefix blocks of a trace are as long as some KV blocks each.

use rustc_hash::FxHashMap;
use std::collections::BTreeMap;

#[derive(Debug)]
struct Kept {
    users: u32,
    /// When it was last given back; its key in the order of eviction while nobody uses it.
    tick: u64,
}

/// A sequence's blocks.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// Leading prefix blocks that stand in the cache, and which others may use too.
    pub shared: Vec<u32>,
    /// KV blocks of its own.
    pub own: u32,
}

impl Table {
    pub fn shared_blocks(&self) -> u32 {
        self.shared.len() as u32
    }
}

#[derive(Debug)]
pub(super) struct Pool {
    total: u32,
    free: u32,
    /// KV blocks of one prefix block.
    per_prefix: u32,
    kept: FxHashMap<u32, Kept>,
    /// Unused ones; the first goes first.
    unused: BTreeMap<u64, u32>,
    tick: u64,
    /// Since the last time that anybody asked.
    pub stored: Vec<u32>,
    pub evicted: Vec<u32>,
}

impl Pool {
    pub fn new(total: u32, per_prefix: u32) -> Self {
        Self {
            total,
            free: total,
            per_prefix,
            kept: FxHashMap::default(),
            unused: BTreeMap::new(),
            tick: 0,
            stored: Vec::new(),
            evicted: Vec::new(),
        }
    }

    pub fn total(&self) -> u32 {
        self.total
    }

    pub fn per_prefix(&self) -> u32 {
        self.per_prefix
    }

    pub fn free(&self) -> u32 {
        self.free
    }

    /// Blocks of the cache that nobody uses.
    pub fn cached(&self) -> u32 {
        self.unused.len() as u32 * self.per_prefix
    }

    pub fn room(&self) -> u32 {
        self.free + self.cached()
    }

    pub fn used(&self) -> u32 {
        self.total - self.room()
    }

    /// Takes blocks that make `blocks` in all with as much of the prefix as is kept; none where `room` less `reserved` is too
    /// little. Nothing changes then.
    pub fn acquire(&mut self, prefix: &[u32], blocks: u32, reserved: u32) -> Option<Table> {
        let held = prefix.iter().take_while(|id| self.kept.contains_key(*id)).count();
        let shared = &prefix[..held];
        let unused = shared.iter().filter(|id| self.kept[*id].users == 0).count() as u32;
        let own = blocks.saturating_sub(held as u32 * self.per_prefix);
        if own + reserved > self.room() - unused * self.per_prefix {
            return None;
        }
        for id in shared {
            if let Some(kept) = self.kept.get_mut(id) {
                if kept.users == 0 {
                    self.unused.remove(&kept.tick);
                }
                kept.users += 1;
            }
        }
        self.take(own);
        Some(Table {
            shared: shared.to_vec(),
            own,
        })
    }

    /// Takes blocks of which there is room.
    pub fn take(&mut self, blocks: u32) {
        while self.free < blocks {
            let Some((_, id)) = self.unused.pop_first() else {
                unreachable!("nobody takes more than there is room for")
            };
            self.kept.remove(&id);
            self.evicted.push(id);
            self.free += self.per_prefix;
        }
        self.free -= blocks;
    }

    /// The table's own blocks that hold the prefix are kept for others from now on, save those that are kept already.
    pub fn publish(&mut self, table: &mut Table, prefix: &[u32]) {
        for id in &prefix[table.shared.len().min(prefix.len())..] {
            if table.own < self.per_prefix {
                return;
            }
            if self.kept.contains_key(id) {
                // Another copy stands for it; this one goes with its sequence, and what is behind it is found through the other.
                continue;
            }
            self.kept.insert(*id, Kept { users: 1, tick: 0 });
            table.shared.push(*id);
            table.own -= self.per_prefix;
            self.stored.push(*id);
        }
    }

    /// Gives a table back. What is kept of it goes the sooner the further it is from the beginning.
    pub fn release(&mut self, table: Table) {
        self.free += table.own;
        for id in table.shared.iter().rev() {
            if let Some(kept) = self.kept.get_mut(id) {
                kept.users -= 1;
                if kept.users == 0 {
                    self.tick += 1;
                    kept.tick = self.tick;
                    self.unused.insert(self.tick, *id);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn prefixes_are_shared_and_the_end_of_the_oldest_goes_first() {
        let mut pool = Pool::new(10, 2);
        let mut first = pool.acquire(&[1, 2], 5, 0).unwrap();
        assert_eq!((first.shared_blocks(), first.own, pool.room()), (0, 5, 5));
        pool.publish(&mut first, &[1, 2]);
        let second = pool.acquire(&[1, 2, 3], 7, 0).unwrap();
        assert_eq!((second.shared_blocks(), second.own, pool.room()), (2, 3, 2));
        assert!(pool.acquire(&[1, 2], 7, 0).is_none());
        assert!(pool.acquire(&[1, 2], 5, 2).is_none(), "what is reserved is not there");
        pool.release(first);
        assert_eq!((pool.free(), pool.cached()), (3, 0));
        pool.release(second);
        assert_eq!((pool.free(), pool.cached(), pool.used()), (6, 4, 0));
        pool.take(7);
        assert_eq!(
            (pool.evicted.as_slice(), pool.stored.as_slice()),
            (&[2][..], &[1, 2][..])
        );
    }

    proptest! {
        #[test]
        fn blocks_are_neither_lost_nor_made(
            actions in prop::collection::vec((0u32..6, 1u32..12, any::<bool>()), 1..80),
        ) {
            let mut pool = Pool::new(40, 2);
            let mut tables: Vec<(Table, Vec<u32>)> = Vec::new();
            for (chain, blocks, take) in actions {
                let prefix: Vec<u32> = (0..blocks / 2).map(|i| chain * 100 + i).collect();
                if take {
                    if let Some(table) = pool.acquire(&prefix, blocks, 0) {
                        tables.push((table, prefix));
                    }
                } else if let Some((mut table, prefix)) = tables.pop() {
                    pool.publish(&mut table, &prefix);
                    pool.release(table);
                }
                let shared: std::collections::BTreeSet<u32> = tables.iter().flat_map(|(t, _)| t.shared.clone()).collect();
                let own: u32 = tables.iter().map(|(t, _)| t.own).sum();
                prop_assert_eq!(pool.used(), own + shared.len() as u32 * 2);
                prop_assert!(pool.room() <= 40);
            }
            while let Some((table, _)) = tables.pop() {
                pool.release(table);
            }
            prop_assert_eq!(pool.room(), 40);
        }
    }
}
