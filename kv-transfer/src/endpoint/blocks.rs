//! What the receiver needs of the block pool. Implemented outside, over the allocator that owns the arena's blocks.

use crate::NoRoom;
use baton_types::{BlockHash, BlockId};
use std::any::Any;

/// The allocator of the arena that hand-overs land in. Calls are quick and never wait.
pub trait DestinationBlocks: Send + Sync + 'static {
    /// Pins the leading blocks of `hashes` that are present and sets enough others aside to make `total`: all or nothing.
    ///
    /// # Errors
    /// Where too few blocks are free or cached; nothing is held then.
    fn reserve(&self, hashes: &[BlockHash], total: usize) -> Result<Box<dyn ReservedBlocks>, NoRoom>;
}

/// Blocks set aside for one epoch. Dropping it is for the holder's last resort only: it must quarantine for ever then.
pub trait ReservedBlocks: Send {
    /// The leading blocks that were present, in order.
    fn held(&self) -> &[BlockId];
    /// The blocks to be written, in order, behind the held ones.
    fn fresh(&self) -> &[BlockId];
    /// All of them hold their KV and nobody else can write them: gives the caller's own form of a block table.
    fn commit(self: Box<Self>) -> Box<dyn Any + Send>;
    /// Given up, while a writer may still write: the held ones are let go, the fresh ones kept from everyone.
    fn quarantine(self: Box<Self>) -> Box<dyn QuarantinedBlocks>;
    /// Given up before any writer was told.
    fn release(self: Box<Self>);
}

/// Blocks that a writer may still write.
pub trait QuarantinedBlocks: Send {
    /// Which.
    fn blocks(&self) -> &[BlockId];
    /// There is proof that nobody writes them any more.
    fn release(self: Box<Self>);
}
