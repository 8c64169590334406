//! Proofs of ownership: whoever holds one of these may use its blocks; dropping it gives them back.

use super::pool::BlockPool;
use super::state::{NoRoom, Place};
use baton_types::{BlockHash, BlockId};
use std::ops::Range;
use std::sync::Arc;

/// The blocks of one sequence, in order. The first `held` came from the prefix cache and must not be written.
/// Dropping it returns each block: to the cache where it has an identity, else to the free ones.
#[derive(Debug)]
pub struct BlockTable {
    pool: Arc<BlockPool>,
    blocks: Vec<BlockId>,
    held: usize,
}

impl BlockTable {
    pub(super) fn new(pool: Arc<BlockPool>, blocks: Vec<BlockId>, held: usize) -> Self {
        Self { pool, blocks, held }
    }

    /// All blocks, by ordinal.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// How many leading ones were there already when the table was made.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Adds `more` fresh blocks at the end.
    ///
    /// # Errors
    /// [`NoRoom`]; the table is unchanged then.
    pub fn grow(&mut self, more: usize) -> Result<(), NoRoom> {
        let (fresh, _) = self.pool.book().take(&[], 0, more, Place::Referenced(1))?;
        self.blocks.extend(fresh);
        Ok(())
    }

    /// Gives back the blocks behind the first `blocks`. The held ones stay.
    pub fn shrink(&mut self, blocks: usize) {
        let kept = blocks.max(self.held).min(self.blocks.len());
        let given = self.blocks.split_off(kept);
        self.pool.book().unpin(&given);
    }

    /// Another table of some of these blocks, which stay as long as either names them. For reading only: none of them may be
    /// written any more. What of `ordinals` lies outside the table is left out.
    pub fn share(&self, ordinals: Range<usize>) -> Self {
        let end = ordinals.end.min(self.blocks.len());
        let blocks = self.blocks[ordinals.start.min(end)..end].to_vec();
        self.pool.book().pin_again(&blocks);
        let held = blocks.len();
        Self::new(self.pool.clone(), blocks, held)
    }

    /// Gives the block at `ordinal` its identity: it is full and its contents are final. Where another block has that
    /// identity already, that one keeps it. An ordinal outside the table is ignored.
    pub fn publish(&self, ordinal: usize, hash: BlockHash) {
        if let Some(id) = self.blocks.get(ordinal) {
            self.pool.book().publish(*id, hash);
        }
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        self.pool.book().unpin(&self.blocks);
    }
}

/// Blocks that a remote writer may fill, behind a pinned prefix.
#[derive(Debug)]
pub struct Reservation {
    pool: Arc<BlockPool>,
    blocks: Vec<BlockId>,
    held: usize,
}

impl Reservation {
    pub(super) fn new(pool: Arc<BlockPool>, blocks: Vec<BlockId>, held: usize) -> Self {
        Self { pool, blocks, held }
    }

    /// The pinned prefix.
    pub fn held(&self) -> &[BlockId] {
        &self.blocks[..self.held]
    }

    /// The blocks to be written.
    pub fn fresh(&self) -> &[BlockId] {
        &self.blocks[self.held..]
    }

    /// Empties the guard, so that its drop has nothing left to do.
    fn defuse(&mut self) -> (Vec<BlockId>, usize) {
        (std::mem::take(&mut self.blocks), std::mem::take(&mut self.held))
    }

    /// Everything has arrived and nothing more can: the blocks become a sequence's.
    pub fn commit(mut self) -> BlockTable {
        let (blocks, held) = self.defuse();
        self.pool.book().commit(&blocks[held..]);
        BlockTable::new(self.pool.clone(), blocks, held)
    }

    /// The epoch is given up, but its writer may still write: the prefix is let go, the fresh blocks are kept away from
    /// everybody until [`Quarantined::release`].
    pub fn quarantine(mut self) -> Quarantined {
        let (mut blocks, held) = self.defuse();
        let fresh = blocks.split_off(held);
        let mut book = self.pool.book();
        book.unpin(&blocks);
        book.quarantine(&fresh);
        drop(book);
        Quarantined {
            pool: self.pool.clone(),
            blocks: fresh,
        }
    }

    /// Gives everything back at once. Only where no writer was ever told of the blocks.
    pub fn release(mut self) {
        let (blocks, held) = self.defuse();
        let mut book = self.pool.book();
        book.unpin(&blocks[..held]);
        book.release(&blocks[held..]);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.blocks.is_empty() {
            return;
        }
        // Nobody said that no writer knows the blocks, so they may still be written: a leak is better than corruption.
        let (mut blocks, held) = self.defuse();
        let fresh = blocks.split_off(held);
        let mut book = self.pool.book();
        book.unpin(&blocks);
        book.quarantine(&fresh);
        drop(book);
        if !fresh.is_empty() {
            tracing::error!(
                blocks = fresh.len(),
                "reservation dropped without a verdict, its blocks stay quarantined"
            );
        }
    }
}

/// Blocks of an abandoned epoch that could still be written.
#[derive(Debug)]
pub struct Quarantined {
    pool: Arc<BlockPool>,
    blocks: Vec<BlockId>,
}

impl Quarantined {
    /// Which.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// There is proof that nothing more can be written: the blocks are free again.
    pub fn release(mut self) {
        let blocks = std::mem::take(&mut self.blocks);
        self.pool.book().release(&blocks);
    }
}

impl Drop for Quarantined {
    fn drop(&mut self) {
        if !self.blocks.is_empty() {
            tracing::error!(
                blocks = self.blocks.len(),
                "quarantine dropped without proof, its blocks stay away"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u8) -> BlockHash {
        BlockHash([n; 16])
    }

    fn tally(pool: &BlockPool) -> (u32, u32, u32, u32, u32) {
        pool.check_integrity().unwrap();
        let c = pool.counts();
        (c.free, c.cached, c.referenced, c.reserved, c.quarantined)
    }

    #[test]
    fn a_published_prefix_is_shared_and_survives_its_users() {
        let pool = BlockPool::new(6);
        let first = pool.acquire(&[hash(1), hash(2)], 9, 3).unwrap();
        assert_eq!(first.held(), 0);
        first.publish(0, hash(1));
        first.publish(1, hash(2));
        let second = pool.acquire(&[hash(1), hash(2), hash(3)], 9, 4).unwrap();
        assert_eq!((second.held(), &second.blocks()[..2]), (2, &first.blocks()[..2]));
        assert_eq!(tally(&pool), (1, 0, 5, 0, 0));
        drop(first);
        drop(second);
        assert_eq!(tally(&pool), (4, 2, 0, 0, 0));
        assert_eq!(pool.held(&[hash(1), hash(2)]), 2);
        assert_eq!(pool.acquire(&[hash(1), hash(2)], 1, 2).unwrap().held(), 1);
    }

    #[test]
    fn eviction_takes_the_end_of_the_oldest_chain_and_never_a_block_in_use() {
        let pool = BlockPool::new(3);
        let table = pool.acquire(&[], 0, 3).unwrap();
        for n in 0..3 {
            table.publish(usize::from(n), hash(n));
        }
        drop(table);
        let user = pool.acquire(&[hash(0)], 1, 1).unwrap();
        let other = pool.acquire(&[], 0, 1).unwrap();
        assert_eq!(pool.held(&[hash(0), hash(1), hash(2)]), 2);
        assert_ne!(user.blocks(), other.blocks());
        let refused = pool.acquire(&[hash(1)], 1, 2).unwrap_err();
        assert_eq!((refused.wanted, refused.room), (1, 0));
        assert_eq!(pool.held(&[hash(0), hash(1)]), 2, "a refusal evicts nothing");
    }

    #[test]
    fn quarantine_keeps_blocks_until_proof() {
        let pool = BlockPool::new(4);
        let reservation = pool.reserve(&[], 0, 3).unwrap();
        assert_eq!(tally(&pool), (1, 0, 0, 3, 0));
        let quarantined = reservation.quarantine();
        assert_eq!(tally(&pool), (1, 0, 0, 0, 3));
        assert!(pool.acquire(&[], 0, 2).is_err());
        quarantined.release();
        assert_eq!(tally(&pool), (4, 0, 0, 0, 0));
        drop(pool.reserve(&[], 0, 2).unwrap());
        assert_eq!(tally(&pool), (2, 0, 0, 0, 2), "no verdict: kept away");
    }

    #[test]
    fn shared_blocks_outlive_the_table_that_they_came_from() {
        let pool = BlockPool::new(5);
        let table = pool.acquire(&[], 0, 4).unwrap();
        table.publish(1, hash(1));
        let shared = table.share(1..3);
        assert_eq!((shared.blocks(), shared.held()), (&table.blocks()[1..3], 2));
        assert_eq!(table.share(3..9).blocks(), &table.blocks()[3..]);
        assert!(table.share(7..9).blocks().is_empty());
        assert_eq!(tally(&pool), (1, 0, 4, 0, 0));
        let named = shared.blocks().to_vec();
        drop(table);
        assert_eq!(tally(&pool), (3, 0, 2, 0, 0));
        let other = pool.acquire(&[], 0, 3).unwrap();
        assert!(named.iter().all(|block| !other.blocks().contains(block)));
        drop(shared);
        drop(other);
        assert_eq!(tally(&pool), (4, 1, 0, 0, 0));
    }

    #[test]
    fn growth_and_generations() {
        let pool = BlockPool::new(2);
        let mut table = pool.acquire(&[], 0, 1).unwrap();
        table.grow(1).unwrap();
        assert!(table.grow(1).is_err());
        let id = table.blocks()[0];
        let before = pool.generation(id);
        drop(table);
        let again = pool.acquire(&[], 0, 2).unwrap();
        assert!(again.blocks().contains(&id));
        assert_eq!(pool.generation(id), before + 1);
        assert!(
            !NoRoom {
                wanted: 9,
                room: 2,
                total: 2
            }
            .is_retryable()
        );
    }
}
