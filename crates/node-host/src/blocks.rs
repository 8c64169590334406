//! The receiver's side of hand-overs over the node's block pool.

use baton_engine::{BlockPool, Quarantined, Reservation};
use baton_kv_transfer::{DestinationBlocks, NoRoom, QuarantinedBlocks, ReservedBlocks};
use baton_types::{BlockHash, BlockId};
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Gives hand-overs their blocks. What is committed comes out as a [`baton_engine::BlockTable`].
///
/// Running sequences come first, then those that gave way, then hand-overs that ask: what is owed to the second is kept
/// from the third.
pub struct PoolBlocks {
    pool: Arc<BlockPool>,
    owed: AtomicUsize,
}

impl PoolBlocks {
    /// Over this pool.
    pub fn new(pool: Arc<BlockPool>) -> Arc<Self> {
        Arc::new(Self {
            pool,
            owed: AtomicUsize::new(0),
        })
    }

    /// The pool.
    pub fn pool(&self) -> &Arc<BlockPool> {
        &self.pool
    }

    /// Blocks that sequences which gave way wait for; gives how many it were before.
    pub(crate) fn set_owed(&self, blocks: usize) -> usize {
        self.owed.swap(blocks, Ordering::AcqRel)
    }
}

impl DestinationBlocks for PoolBlocks {
    fn reserve(&self, hashes: &[BlockHash], total: usize) -> Result<Box<dyn ReservedBlocks>, NoRoom> {
        let owed = self.owed.load(Ordering::Acquire);
        if owed > 0 {
            let room = self.pool.room().saturating_sub(owed);
            let wanted = total - self.pool.held(hashes).min(total);
            if wanted > room {
                return Err(NoRoom { wanted, room });
            }
        }
        match self.pool.reserve(hashes, hashes.len(), total) {
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
