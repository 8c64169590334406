//! The receiver's side of hand-overs over the node's block pool.

use baton_engine::{BlockPool, Quarantined, Reservation};
use baton_kv_transfer::{DestinationBlocks, NoRoom, QuarantinedBlocks, ReservedBlocks};
use baton_types::{BlockHash, BlockId};
use std::any::Any;
use std::sync::Arc;

/// Gives hand-overs their blocks. What is committed comes out as a [`baton_engine::BlockTable`].
pub struct PoolBlocks(pub Arc<BlockPool>);

impl DestinationBlocks for PoolBlocks {
    fn reserve(&self, hashes: &[BlockHash], total: usize) -> Result<Box<dyn ReservedBlocks>, NoRoom> {
        match self.0.reserve(hashes, hashes.len(), total) {
            Ok(reservation) => Ok(Box::new(Reserved(reservation))),
            Err(error) => Err(NoRoom {
                wanted: error.wanted,
                room: error.room,
            }),
        }
    }
}

struct Reserved(Reservation);

impl ReservedBlocks for Reserved {
    fn held(&self) -> &[BlockId] {
        self.0.held()
    }

    fn fresh(&self) -> &[BlockId] {
        self.0.fresh()
    }

    fn commit(self: Box<Self>) -> Box<dyn Any + Send> {
        Box::new(self.0.commit())
    }

    fn quarantine(self: Box<Self>) -> Box<dyn QuarantinedBlocks> {
        Box::new(InQuarantine(self.0.quarantine()))
    }

    fn release(self: Box<Self>) {
        self.0.release();
    }
}

struct InQuarantine(Quarantined);

impl QuarantinedBlocks for InQuarantine {
    fn blocks(&self) -> &[BlockId] {
        self.0.blocks()
    }

    fn release(self: Box<Self>) {
        self.0.release();
    }
}
