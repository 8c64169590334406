//! The allocator of one arena: a mutex around the book, and guards that hand their blocks back when dropped.

use super::guards::{BlockTable, Reservation};
use super::integrity::{self, IntegrityFault};
use super::state::{Book, NoRoom, Place};
use baton_types::{BlockChanges, BlockCounts, BlockHash, BlockId};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// All blocks of one arena. Each operation takes one short lock; none blocks for long.
#[derive(Debug)]
pub struct BlockPool {
    book: Mutex<Book>,
}

impl BlockPool {
    /// A pool of `blocks` free blocks, ids from 0.
    pub fn new(blocks: u32) -> Arc<Self> {
        Arc::new(Self {
            book: Mutex::new(Book::new(blocks)),
        })
    }

    pub(super) fn book(&self) -> MutexGuard<'_, Book> {
        // The book's operations finish their changes before anything can panic, so a poisoned lock hides no half-done
        // change; and a guard's drop must not panic.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many leading blocks of `hashes` are present now. A hint: nothing is pinned.
    pub fn held(&self, hashes: &[BlockHash]) -> usize {
        self.book().held(hashes)
    }

    /// Pins the cached prefix of `hashes` (at most `max_held` blocks of it) and takes fresh blocks up to `total`,
    /// evicting the least recently used cached blocks.
    ///
    /// # Errors
    /// [`NoRoom`] where the fresh ones cannot be had; nothing is pinned or evicted then.
    pub fn acquire(
        self: &Arc<Self>,
        hashes: &[BlockHash],
        max_held: usize,
        total: usize,
    ) -> Result<BlockTable, NoRoom> {
        let (blocks, held) = self.book().take(hashes, max_held, total, Place::Referenced(1))?;
        Ok(BlockTable::new(self.clone(), blocks, held))
    }

    /// As [`Self::acquire`], but the fresh blocks are *reserved* for a remote writer.
    ///
    /// # Errors
    /// As [`Self::acquire`].
    pub fn reserve(
        self: &Arc<Self>,
        hashes: &[BlockHash],
        max_held: usize,
        total: usize,
    ) -> Result<Reservation, NoRoom> {
        let (blocks, held) = self.book().take(hashes, max_held, total, Place::Reserved)?;
        Ok(Reservation::new(self.clone(), blocks, held))
    }

    /// How many blocks are in each state.
    pub fn counts(&self) -> BlockCounts {
        self.book().counts()
    }

    /// Free and cached blocks: what could be given out now.
    pub fn room(&self) -> usize {
        self.book().room()
    }

    /// How often this block was given out for new contents; 0 for an id outside the arena.
    pub fn generation(&self, block: BlockId) -> u64 {
        self.book().blocks.get(block.index()).map_or(0, |b| b.generation)
    }

    /// What came into the prefix cache and what left it since the last call; from the start with the first one. Blocks in use
    /// by sequences count as cached. Costs time in proportion to the blocks that changed, under the pool's lock.
    pub fn take_changes(&self) -> BlockChanges {
        let book = &mut *self.book();
        book.journal.take(|id| book.blocks[id.index()].identity)
    }

    /// Forgets every identity, so that no later request hits the cache; cached blocks become free.
    pub fn clear_cache(&self) {
        self.book().clear_cache();
    }

    /// Checks that every block is in exactly one state and that all indexes agree.
    ///
    /// # Errors
    /// The first disagreement found; any is a bug.
    pub fn check_integrity(&self) -> Result<(), IntegrityFault> {
        integrity::check(&self.book())
    }
}
