//! What changed in the prefix cache since somebody last asked, for whoever tells others of it.
//!
//! A block whose identity comes or goes is noted, once until it is asked for; what it was then told as and what it is now
//! make the change. So changes that undo each other cost nothing to tell, the journal never outgrows the arena however
//! seldom it is asked for, and noting allocates nothing: it happens within engine steps.

use baton_types::{BlockChanges, BlockHash, BlockId};
use std::collections::HashSet;

#[derive(Debug)]
pub(super) struct Journal {
    /// The identity that each block was told with.
    told: Vec<Option<BlockHash>>,
    is_noted: Vec<bool>,
    /// Blocks whose identity may differ from what was told. Has room for all.
    noted: Vec<BlockId>,
}

impl Journal {
    pub fn new(blocks: usize) -> Self {
        Self {
            told: vec![None; blocks],
            is_noted: vec![false; blocks],
            noted: Vec::with_capacity(blocks),
        }
    }

    /// A block's identity came or went.
    pub fn note(&mut self, id: BlockId) {
        if !std::mem::replace(&mut self.is_noted[id.index()], true) {
            self.noted.push(id);
        }
    }

    pub fn take(&mut self, identity: impl Fn(BlockId) -> Option<BlockHash>) -> BlockChanges {
        let mut changes = BlockChanges::default();
        for id in self.noted.drain(..) {
            self.is_noted[id.index()] = false;
            let now = identity(id);
            let before = std::mem::replace(&mut self.told[id.index()], now);
            if before != now {
                changes.evicted.extend(before);
                changes.stored.extend(now);
            }
        }
        // What left one block may have come into another one.
        if !changes.stored.is_empty() && !changes.evicted.is_empty() {
            let stored: HashSet<BlockHash> = changes.stored.iter().copied().collect();
            let evicted: HashSet<BlockHash> = changes.evicted.iter().copied().collect();
            changes.stored.retain(|hash| !evicted.contains(hash));
            changes.evicted.retain(|hash| !stored.contains(hash));
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use crate::BlockPool;
    use baton_types::BlockHash;

    fn hash(n: u8) -> BlockHash {
        BlockHash([n; 16])
    }

    #[test]
    fn only_what_is_different_is_told() {
        let pool = BlockPool::new(2);
        assert!(pool.take_changes().is_empty());
        let table = pool.acquire(&[], 0, 2).unwrap();
        table.publish(0, hash(1));
        table.publish(1, hash(2));
        let changes = pool.take_changes();
        assert_eq!((changes.stored, changes.evicted), (vec![hash(1), hash(2)], vec![]));
        drop(table);
        assert!(pool.take_changes().is_empty(), "blocks in use were told already");
        // Evicted and stored again, one of them in another block; a third came and went.
        let one = pool.acquire(&[], 0, 1).unwrap();
        one.publish(0, hash(3));
        drop(one);
        drop(pool.acquire(&[], 0, 2).unwrap());
        let table = pool.acquire(&[], 0, 2).unwrap();
        table.publish(1, hash(1));
        let changes = pool.take_changes();
        assert_eq!((changes.stored, changes.evicted), (vec![], vec![hash(2)]));
        pool.clear_cache();
        assert_eq!(pool.take_changes().evicted, [hash(1)]);
    }
}
