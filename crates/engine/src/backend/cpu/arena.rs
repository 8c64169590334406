//! Reads and writes of K/V rows in the arena. The step checked every block and position before these are used.
//!
//! Layout: `[block][layer][k|v][kv_head][token][head_dim]`.

#![allow(unsafe_code)]

use baton_types::{ArenaView, BlockId, KvDtype, KvGeometry};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ptr::NonNull;

const CHECKED: &str = "the step checked the slice's blocks against the arena";

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KvPart {
    /// Keys, rotated.
    Key,
    /// Values.
    Value,
}

/// First byte of a head's rows of one layer within a block.
fn head_offset(geometry: &KvGeometry, layer: usize, part: KvPart, head: usize) -> usize {
    let part = match part {
        KvPart::Key => 0,
        KvPart::Value => geometry.kv_heads as usize,
    };
    layer * geometry.layer_bytes() + (part + head) * geometry.head_bytes()
}

/// One sequence's rows of one layer and head.
#[derive(Clone, Copy)]
pub(super) struct KvHead<'a> {
    arena: &'a ArenaView,
    blocks: &'a [BlockId],
    keys: usize,
    values: usize,
}

impl<'a> KvHead<'a> {
    /// Names the rows of `head` in `layer`.
    pub(super) fn new(arena: &'a ArenaView, blocks: &'a [BlockId], layer: usize, head: usize) -> Self {
        let geometry = arena.geometry();
        let keys = head_offset(geometry, layer, KvPart::Key, head);
        let values = head_offset(geometry, layer, KvPart::Value, head);
        Self {
            arena,
            blocks,
            keys,
            values,
        }
    }

    /// Element type.
    pub(super) fn dtype(&self) -> KvDtype {
        self.arena.geometry().dtype
    }

    /// The row at `position`, and how many rows lie there one after another up to the block's end.
    pub(super) fn rows(&self, part: KvPart, position: usize) -> (NonNull<u8>, usize) {
        let geometry = self.arena.geometry();
        let block_tokens = geometry.block_tokens as usize;
        let row_bytes = geometry.head_dim as usize * geometry.dtype.bytes();
        let slot = position % block_tokens;
        let run = block_tokens - slot;
        let base = match part {
            KvPart::Key => self.keys,
            KvPart::Value => self.values,
        };
        let block = self.blocks[position / block_tokens];
        let at = self
            .arena
            .block_ptr(block, base + slot * row_bytes, run * row_bytes)
            .expect(CHECKED);
        (at, run)
    }
}

/// Stores one token's rows of all heads of one layer: `(kv_heads, head_dim)` of f32, rounded to the arena's type.
pub(super) fn write_token(arena: &ArenaView, block: BlockId, slot: usize, layer: usize, part: KvPart, rows: &[f32]) {
    let geometry = arena.geometry();
    let head_dim = geometry.head_dim as usize;
    let width = geometry.dtype.bytes();
    for (head, row) in rows.chunks_exact(head_dim).enumerate() {
        let base = head_offset(geometry, layer, part, head) + slot * head_dim * width;
        for (i, piece) in row.chunks(64).enumerate() {
            let at = base + i * 64 * width;
            // SAFETY: the step's caller owns the block for writing from the slice's start on (`Backend::step`), the step
            // refuses a block that is written by two slices, and each slot is written by one unit.
            let wrote = unsafe {
                match geometry.dtype {
                    KvDtype::F16 => {
                        let mut out = [f16::ZERO; 64];
                        out[..piece.len()].convert_from_f32_slice(piece);
                        arena.write(block, at, bytemuck::cast_slice(&out[..piece.len()]))
                    }
                    KvDtype::Bf16 => {
                        let mut out = [bf16::ZERO; 64];
                        out[..piece.len()].convert_from_f32_slice(piece);
                        arena.write(block, at, bytemuck::cast_slice(&out[..piece.len()]))
                    }
                    KvDtype::F32 => arena.write(block, at, bytemuck::cast_slice(piece)),
                }
            };
            wrote.expect(CHECKED);
        }
    }
}
