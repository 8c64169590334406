//! Zeroing what a sequence has not filled of its last block, before that block leaves the node.

#![allow(unsafe_code)]

use super::guards::BlockTable;
use baton_types::{ArenaView, KvPart, OutOfArena};

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
        let lane_bytes = geometry.head_bytes();
        let zeros = vec![0; lane_bytes];
        let (width, scale_width) = (geometry.dtype.bytes(), geometry.dtype.scale_bytes());
        let empty = block_tokens - slots;
        for lane in 0..2 * (geometry.kv_heads * geometry.layers) as usize {
            let keys = (lane / geometry.kv_heads as usize).is_multiple_of(2);
            // A lane of keys has the empty slots at the end of each of its rows.
            let (rows, part, row_bytes) = match keys {
                true => (geometry.head_dim as usize, KvPart::Key, empty * width),
                false => (1, KvPart::Value, empty * geometry.head_dim as usize * width),
            };
            let elements = (0..rows).map(|dim| (geometry.element_at(part, slots, dim), row_bytes));
            for (at, len) in elements.chain([(geometry.scale_at(slots), empty * scale_width)]) {
                // SAFETY: the table references the block and did not share it (it is beyond the held ones and has no
                // identity while it is partial), so nobody else reads or writes it; the caller computes nothing in it.
                unsafe { arena.write(block, lane * lane_bytes + at, &zeros[..len])? };
            }
        }
        Ok(())
    }
}
