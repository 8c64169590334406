//! Reads and writes of K/V rows in the arena. The step checked every block and position before these are used. The layout
//! is [`KvGeometry`]'s.

#![allow(unsafe_code)]

use baton_types::{ArenaView, BlockId, KvDtype, KvGeometry, KvPart};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ptr::NonNull;

const CHECKED: &str = "the step checked the slice's blocks against the arena";

/// One sequence's keys and values of one layer.
#[derive(Clone, Copy)]
pub(super) struct KvLayer<'a> {
    arena: &'a ArenaView,
    blocks: &'a [BlockId],
    layer: usize,
}

impl<'a> KvLayer<'a> {
    /// Names what `blocks` hold of `layer`.
    pub(super) fn new(arena: &'a ArenaView, blocks: &'a [BlockId], layer: usize) -> Self {
        Self { arena, blocks, layer }
    }

    /// The blocks' shape.
    pub(super) fn geometry(&self) -> &KvGeometry {
        self.arena.geometry()
    }

    /// The lane of one head that holds `position`, and the position's slot in it.
    pub(super) fn lane(&self, part: KvPart, head: usize, position: usize) -> (NonNull<u8>, usize) {
        let geometry = self.geometry();
        let block_tokens = geometry.block_tokens as usize;
        let lane = geometry.lane_at(self.layer, part, head);
        let block = self.blocks[position / block_tokens];
        let at = self.arena.block_ptr(block, lane, geometry.head_bytes());
        (at.expect(CHECKED), position % block_tokens)
    }
}

/// Stores one token's rows of all heads of one layer: `(kv_heads, head_dim)` of f32, rounded to the arena's type.
pub(super) fn write_token(arena: &ArenaView, block: BlockId, slot: usize, layer: usize, part: KvPart, rows: &[f32]) {
    let geometry = arena.geometry();
    let head_dim = geometry.head_dim as usize;
    let (first, step) = (geometry.element_at(part, slot, 0), geometry.element_at(part, 0, 1));
    for (head, row) in rows.chunks_exact(head_dim).enumerate() {
        let lane = arena.block_ptr(block, geometry.lane_at(layer, part, head), geometry.head_bytes());
        let lane = lane.expect(CHECKED).as_ptr();
        // SAFETY: the elements and the scale of a slot lie within the lane. The step's caller owns the block for writing
        // from the slice's start on (`Backend::step`), the step refuses a block that is written by two slices, and each slot
        // is written by one unit.
        unsafe {
            let to = lane.add(first);
            match geometry.dtype {
                KvDtype::F16 => {
                    let half = |from: &[f32], to: &mut [f16]| to.convert_from_f32_slice(from);
                    store(to, step, row, f16::ZERO, half);
                }
                KvDtype::Bf16 => {
                    let half = |from: &[f32], to: &mut [bf16]| to.convert_from_f32_slice(from);
                    store(to, step, row, bf16::ZERO, half);
                }
                KvDtype::F32 => store(to, step, row, 0.0, |from, to| to.copy_from_slice(from)),
                KvDtype::Q8 => {
                    let (scale, factor) = scale(row);
                    let at = lane.add(geometry.scale_at(slot)).cast::<f16>();
                    at.write_unaligned(scale);
                    store(to, step, row, 0, |from, to| round(from, factor, to));
                }
            }
        }
    }
}

/// Stores elements, which `convert` makes piece by piece, `step` bytes apart.
///
/// # Safety
/// All of them may be written.
unsafe fn store<T: Copy>(to: *mut u8, step: usize, row: &[f32], zero: T, convert: impl Fn(&[f32], &mut [T])) {
    const PIECE: usize = 64;
    for (i, piece) in row.chunks(PIECE).enumerate() {
        let mut out = [zero; PIECE];
        convert(piece, &mut out[..piece.len()]);
        for (j, x) in out[..piece.len()].iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { to.add((i * PIECE + j) * step).cast::<T>().write_unaligned(*x) };
        }
    }
}

/// A row's scale, as it is stored, and what elements are multiplied by. The largest becomes 127. Where one is infinite or no
/// number, the scale is no number, and so is whatever is made of the row.
fn scale(row: &[f32]) -> (f16, f32) {
    let mut largest = [0.0f32; 16];
    let mut doubt = [0.0f32; 16];
    for piece in row.chunks(16) {
        for ((largest, doubt), x) in largest.iter_mut().zip(&mut doubt).zip(piece) {
            let size = x.abs();
            *largest = if size > *largest { size } else { *largest };
            *doubt += x * 0.0;
        }
    }
    let largest = largest.into_iter().fold(0.0, f32::max);
    let scale = f16::from_f32(largest / 127.0 + doubt.into_iter().sum::<f32>());
    let factor = if scale.to_f32() > 0.0 {
        scale.to_f32().recip()
    } else {
        0.0
    };
    (scale, factor)
}

/// The nearest integers, to even where two are as near: they stand in the low bits after this number was added.
fn round(from: &[f32], factor: f32, to: &mut [u8]) {
    for (x, to) in from.iter().zip(to) {
        let x = x * factor;
        let x = if x > 127.0 { 127.0 } else { x };
        let x = if x < -127.0 { -127.0 } else { x };
        *to = (x + 12_582_912.0).to_bits() as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geometry(dtype: KvDtype) -> KvGeometry {
        KvGeometry {
            layers: 2,
            kv_heads: 2,
            head_dim: 8,
            block_tokens: 4,
            dtype,
        }
    }

    /// What stands in the arena for one token, scales applied.
    fn stored(arena: &ArenaView, slot: usize, part: KvPart) -> Vec<f32> {
        let geometry = arena.geometry();
        let mut out = Vec::new();
        for head in 0..2 {
            let lane = geometry.lane_at(1, part, head);
            let scale: u16 = read(arena, lane + geometry.scale_at(slot));
            for dim in 0..8 {
                let at = lane + geometry.element_at(part, slot, dim);
                out.push(match geometry.dtype {
                    KvDtype::F16 => f16::from_bits(read(arena, at)).to_f32(),
                    KvDtype::Bf16 => bf16::from_bits(read(arena, at)).to_f32(),
                    KvDtype::F32 => read(arena, at),
                    KvDtype::Q8 => f32::from(read::<i8>(arena, at)) * f16::from_bits(scale).to_f32(),
                });
            }
        }
        out
    }

    fn read<T: bytemuck::AnyBitPattern>(arena: &ArenaView, at: usize) -> T {
        let mut bytes = vec![0; size_of::<T>()];
        let inside = at.min(arena.geometry().block_bytes() - bytes.len());
        // SAFETY: the test alone uses its arena.
        unsafe { arena.read(BlockId(0), inside, &mut bytes).unwrap() };
        bytemuck::pod_read_unaligned(&bytes)
    }

    proptest! {
        #[test]
        fn what_is_written_is_near_what_was_given(rows in prop::collection::vec(-30.0f32..30.0, 16), slot in 0usize..4) {
            for (dtype, error) in [(KvDtype::F32, 0.0), (KvDtype::F16, 1e-3), (KvDtype::Bf16, 5e-3), (KvDtype::Q8, 4.1e-3)] {
                let arena = ArenaView::on_heap(geometry(dtype), 1);
                for part in [KvPart::Key, KvPart::Value] {
                    write_token(&arena, BlockId(0), slot, 1, part, &rows);
                    for (head, got) in rows.chunks(8).zip(stored(&arena, slot, part).chunks(8)) {
                        let largest = head.iter().fold(0.0f32, |a, x| a.max(x.abs()));
                        for (x, got) in head.iter().zip(got) {
                            prop_assert!((x - got).abs() <= largest * error, "{dtype:?} {x} {got}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_makes_a_row_of_none() {
        let arena = ArenaView::on_heap(geometry(KvDtype::Q8), 1);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut rows = [1.0; 16];
            rows[9] = bad;
            write_token(&arena, BlockId(0), 2, 1, KvPart::Value, &rows);
            let got = stored(&arena, 2, KvPart::Value);
            assert!(got[..8].iter().all(|x| (x - 1.0).abs() < 1e-3) && got[8..].iter().all(|x| x.is_nan()));
        }
    }
}
