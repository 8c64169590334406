//! The arena's bytes: what they are at the initiator, and whether they are that at the target.

#![allow(unsafe_code)]

use crate::layout::{Layout, mix};
use baton_types::{ArenaView, BlockId};
use crc_fast::{CrcAlgorithm, checksum};

/// An arena that only this program's main thread looks into, and only while no write is on its way.
pub struct Pool(pub ArenaView);

impl Pool {
    /// Fills all of it with bytes that can be told apart.
    pub fn fill(&self, seed: u64) {
        let mut bytes = vec![0; self.0.geometry().block_bytes()];
        for block in 0..self.0.blocks() as u32 {
            content(seed, block, &mut bytes);
            // SAFETY: no transport has been started yet, or none writes: nobody else uses the arena now.
            unsafe { self.0.write(BlockId(block), 0, &bytes) }.expect("the block is one of the arena's");
        }
    }

    /// Whether each destination holds what the source held.
    pub fn holds(&self, seed: u64, layout: &Layout) -> bool {
        let mut wanted = vec![0; self.0.geometry().block_bytes()];
        let mut found = wanted.clone();
        layout.source.iter().zip(&layout.destination).all(|(from, to)| {
            content(seed, from.0, &mut wanted);
            // SAFETY: every write has ended, so nobody writes the arena now.
            unsafe { self.0.read(*to, 0, &mut found) }.expect("the block is one of the arena's");
            wanted == found
        })
    }

    /// A digest over all bytes of some blocks: the sum over their layers of a mix of place and CRC-64/NVME.
    pub fn digest(&self, blocks: &[BlockId]) -> u64 {
        let geometry = *self.0.geometry();
        let bytes = geometry.layer_bytes();
        let mut sum = 0_u64;
        for (block, ordinal) in blocks.iter().zip(0_u64..) {
            for layer in 0..geometry.layers {
                let start = self.0.block_ptr(*block, layer as usize * bytes, bytes);
                let start = start.expect("the layer is one of the block's");
                // SAFETY: valid and initialised for `bytes` bytes; nobody writes the arena between two rounds.
                let layer_bytes = unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) };
                let crc = checksum(CrcAlgorithm::Crc64Nvme, layer_bytes);
                sum = sum.wrapping_add(mix(crc ^ mix(ordinal << 32 | u64::from(layer))));
            }
        }
        sum
    }
}

/// The bytes of one block of the initiator's arena.
fn content(seed: u64, block: u32, bytes: &mut [u8]) {
    let start = mix(seed ^ (u64::from(block) << 32));
    for (word, i) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(0_u64..) {
        *word = start
            .wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .rotate_left(i as u32 % 64)
            .to_le_bytes();
    }
}
