//! Zeroing what a sequence has not filled of its last block, before that block leaves the node.

#![allow(unsafe_code)]

use super::guards::BlockTable;
use baton_types::{ArenaView, OutOfArena};

impl BlockTable {
    /// Zeroes the slots from token `filled` on in the block that holds that token, in every layer. Does nothing where
    /// `filled` stands at a block's border. The caller computes nothing in this table meanwhile, and the block is one that
    /// this table alone writes: not one of the held ones.
    ///
    /// # Errors
    /// Where the table or the arena has no such block.
    pub fn zero_unfilled(&self, arena: &ArenaView, filled: usize) -> Result<(), OutOfArena> {
        let geometry = arena.geometry();
        let block_tokens = geometry.block_tokens as usize;
        let (ordinal, slots) = (filled / block_tokens, filled % block_tokens);
        let Some(block) = self
            .blocks()
            .get(ordinal)
            .copied()
            .filter(|_| slots > 0 && ordinal >= self.held())
        else {
            return Ok(());
        };
        let slot_bytes = geometry.head_bytes() / block_tokens;
        let zeros = vec![0; (block_tokens - slots) * slot_bytes];
        for lane in 0..2 * geometry.kv_heads as usize * geometry.layers as usize {
            let offset = lane * geometry.head_bytes() + slots * slot_bytes;
            // SAFETY: the table references the block and did not share it (it is beyond the held ones and has no identity
            // while it is partial), so nobody else reads or writes it; the caller computes nothing in it meanwhile.
            unsafe { arena.write(block, offset, &zeros)? };
        }
        Ok(())
    }
}
