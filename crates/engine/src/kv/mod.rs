//! The allocator of one arena's blocks.

use baton_types::{BlockCounts, BlockHash, BlockId};
use std::sync::Arc;

/// Too few blocks are free or cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} blocks wanted, {room} can be had")]
pub struct NoRoom {
    /// Blocks that were asked for.
    pub wanted: usize,
    /// Blocks that are free or cached.
    pub room: usize,
}

/// The pool contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("block pool integrity: {reason}")]
pub struct IntegrityFault {
    /// What is wrong.
    pub reason: String,
}

/// The allocator.
#[derive(Debug)]
pub struct BlockPool {}

/// Blocks of one sequence.
#[derive(Debug)]
pub struct BlockTable {}

/// Blocks for a remote writer.
#[derive(Debug)]
pub struct Reservation {}

/// Blocks that a remote writer may still write.
#[derive(Debug)]
pub struct Quarantined {}

#[allow(missing_docs, unused_variables)]
impl BlockPool {
    pub fn new(blocks: u32) -> Arc<Self> {
        todo!()
    }
    pub fn held(&self, hashes: &[BlockHash]) -> usize {
        todo!()
    }
    pub fn acquire(
        self: &Arc<Self>,
        hashes: &[BlockHash],
        max_held: usize,
        total: usize,
    ) -> Result<BlockTable, NoRoom> {
        todo!()
    }
    pub fn reserve(
        self: &Arc<Self>,
        hashes: &[BlockHash],
        max_held: usize,
        total: usize,
    ) -> Result<Reservation, NoRoom> {
        todo!()
    }
    pub fn counts(&self) -> BlockCounts {
        todo!()
    }
    pub fn check_integrity(&self) -> Result<(), IntegrityFault> {
        todo!()
    }
    pub fn clear_cache(&self) {
        todo!()
    }
    pub fn room(&self) -> usize {
        todo!()
    }
    pub fn generation(&self, block: BlockId) -> u64 {
        todo!()
    }
}

#[allow(missing_docs, unused_variables)]
impl BlockTable {
    pub fn blocks(&self) -> &[BlockId] {
        todo!()
    }
    pub fn held(&self) -> usize {
        todo!()
    }
    pub fn grow(&mut self, blocks: usize) -> Result<(), NoRoom> {
        todo!()
    }
    pub fn publish(&self, ordinal: usize, hash: BlockHash) {
        todo!()
    }
}

#[allow(missing_docs, unused_variables)]
impl Reservation {
    pub fn held(&self) -> &[BlockId] {
        todo!()
    }
    pub fn fresh(&self) -> &[BlockId] {
        todo!()
    }
    pub fn commit(self) -> BlockTable {
        todo!()
    }
    pub fn quarantine(self) -> Quarantined {
        todo!()
    }
    pub fn release(self) {
        todo!()
    }
}

#[allow(missing_docs, unused_variables)]
impl Quarantined {
    pub fn blocks(&self) -> &[BlockId] {
        todo!()
    }
    pub fn release(self) {
        todo!()
    }
}
