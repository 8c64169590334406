//! How weights lie in a packed panel, and how sixteen of them become f32.
//!
//! A panel holds [`LANES`] rows of a weight matrix, lane by lane, along the inner dimension: what one FMA needs lies
//! together. Elements keep the file's type; nothing is rounded in packing.
//!
//! | format | one block of a panel |
//! |---|---|
//! | f32, f16, bf16 | 16 elements: one inner index of 16 rows |
//! | Q8_0 | 16 f16 scales, then 8 times 16 rows of 4 i8 |
//! | Q4_0 | 16 f16 scales, then 4 times 16 rows of 4 bytes: low nibbles are inner 0..16, high ones 16..32 |
//! | Q4_1 | 16 f16 scales, 16 f16 minima, then as Q4_0 |
//!
//! Four bytes of a row lie together because integer products are summed by fours (see `int8`).

#![allow(unsafe_code)]

use super::LANES;
use super::simd::Simd;

/// Element type of a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend::cpu) enum Format {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Blocks of 32: f16 scale, 32 i8.
    Q8_0,
    /// Blocks of 32: f16 scale, 32 nibbles less 8.
    Q4_0,
    /// Blocks of 32: f16 scale, f16 minimum, 32 nibbles.
    Q4_1,
}

impl Format {
    /// Inner elements of one block.
    pub(in crate::backend::cpu) const fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
        }
    }

    /// Bytes of one block of one row, as files have it.
    pub(in crate::backend::cpu) const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
        }
    }
}

/// Decodes one format. Calls have the contract of [`Simd`], with `block` at a whole block of a panel.
pub(super) trait Decode {
    /// Inner elements that `low` gives.
    const LOW: usize;
    /// Inner elements that `high` gives after them.
    const HIGH: usize;
    /// Bytes of one block of a panel.
    const BYTES: usize;

    /// What all of a block's elements share: scales and offsets.
    unsafe fn shared<S: Simd>(block: *const u8) -> (S::V, S::V);
    unsafe fn low<S: Simd>(block: *const u8, shared: (S::V, S::V), i: usize) -> S::V;
    #[inline(always)]
    unsafe fn high<S: Simd>(block: *const u8, shared: (S::V, S::V), i: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { Self::low::<S>(block, shared, i) }
    }
}

/// First byte of the group of four that holds byte `i` of each row.
#[inline(always)]
const fn group(i: usize) -> usize {
    i / 4 * 4 * LANES
}

/// First bit of byte `i` within its row's four.
#[inline(always)]
const fn bit(i: usize) -> u32 {
    (i % 4 * 8) as u32
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct Q80;
pub(super) struct Q40;
pub(super) struct Q41;

macro_rules! plain {
    ($name:ident, $bytes:literal, $load:expr) => {
        impl Decode for $name {
            const LOW: usize = 1;
            const HIGH: usize = 0;
            const BYTES: usize = $bytes * LANES;

            #[inline(always)]
            unsafe fn shared<S: Simd>(_block: *const u8) -> (S::V, S::V) {
                // SAFETY: the caller's promise.
                unsafe { (S::splat(0.0), S::splat(0.0)) }
            }
            #[inline(always)]
            unsafe fn low<S: Simd>(block: *const u8, _shared: (S::V, S::V), _i: usize) -> S::V {
                // SAFETY: the caller's promise.
                unsafe { $load(block) }
            }
        }
    };
}

plain!(F32, 4, |block: *const u8| S::load(block.cast()));
plain!(F16, 2, S::load_f16);
plain!(Bf16, 2, S::load_bf16);

impl Decode for Q80 {
    const LOW: usize = 32;
    const HIGH: usize = 0;
    const BYTES: usize = 34 * LANES;

    #[inline(always)]
    unsafe fn shared<S: Simd>(block: *const u8) -> (S::V, S::V) {
        // SAFETY: the caller's promise.
        unsafe { (S::load_f16(block), S::splat(0.0)) }
    }
    #[inline(always)]
    unsafe fn low<S: Simd>(block: *const u8, shared: (S::V, S::V), i: usize) -> S::V {
        // SAFETY: the caller's promise; 8 groups of 64 bytes follow the scales.
        unsafe { S::mul(S::load_bytes(block.add(2 * LANES + group(i)), bit(i)), shared.0) }
    }
}

impl Decode for Q40 {
    const LOW: usize = 16;
    const HIGH: usize = 16;
    const BYTES: usize = 18 * LANES;

    #[inline(always)]
    unsafe fn shared<S: Simd>(block: *const u8) -> (S::V, S::V) {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = S::load_f16(block);
            (scale, S::mul(scale, S::splat(-8.0)))
        }
    }
    #[inline(always)]
    unsafe fn low<S: Simd>(block: *const u8, shared: (S::V, S::V), i: usize) -> S::V {
        // SAFETY: the caller's promise; 4 groups of 64 bytes follow the scales.
        unsafe {
            S::fma(
                S::load_nibbles(block.add(2 * LANES + group(i)), bit(i)),
                shared.0,
                shared.1,
            )
        }
    }
    #[inline(always)]
    unsafe fn high<S: Simd>(block: *const u8, shared: (S::V, S::V), i: usize) -> S::V {
        // SAFETY: as `low`.
        unsafe {
            S::fma(
                S::load_nibbles(block.add(2 * LANES + group(i)), bit(i) + 4),
                shared.0,
                shared.1,
            )
        }
    }
}

impl Decode for Q41 {
    const LOW: usize = 16;
    const HIGH: usize = 16;
    const BYTES: usize = 20 * LANES;

    #[inline(always)]
    unsafe fn shared<S: Simd>(block: *const u8) -> (S::V, S::V) {
        // SAFETY: the caller's promise.
        unsafe { (S::load_f16(block), S::load_f16(block.add(2 * LANES))) }
    }
    #[inline(always)]
    unsafe fn low<S: Simd>(block: *const u8, shared: (S::V, S::V), i: usize) -> S::V {
        // SAFETY: the caller's promise; 4 groups of 64 bytes follow scales and minima.
        unsafe {
            S::fma(
                S::load_nibbles(block.add(4 * LANES + group(i)), bit(i)),
                shared.0,
                shared.1,
            )
        }
    }
    #[inline(always)]
    unsafe fn high<S: Simd>(block: *const u8, shared: (S::V, S::V), i: usize) -> S::V {
        // SAFETY: as `low`.
        unsafe {
            S::fma(
                S::load_nibbles(block.add(4 * LANES + group(i)), bit(i) + 4),
                shared.0,
                shared.1,
            )
        }
    }
}

/// One lane of a panel as f32: `(inner,)`.
pub(super) fn decode_lane(format: Format, panel: &[u8], lane: usize, out: &mut [f32]) {
    use half::{bf16, f16};
    assert!(lane < LANES && out.len().is_multiple_of(format.block_elements()));
    assert!(panel.len() == out.len() / format.block_elements() * format.block_bytes() * LANES);
    let two = |at: usize| [panel[at], panel[at + 1]];
    let half_at = |at: usize| f16::from_le_bytes(two(at + 2 * lane)).to_f32();
    let elements = format.block_elements();
    for (block, out) in out.chunks_exact_mut(elements).enumerate() {
        let at = block * format.block_bytes() * LANES;
        let byte_at = |from: usize, i: usize| panel[from + group(i) + 4 * lane + i % 4];
        let nibble = |from: usize, i: usize| {
            let byte = byte_at(from, i % 16);
            f32::from(if i < 16 { byte & 15 } else { byte >> 4 })
        };
        for (i, out) in out.iter_mut().enumerate() {
            *out = match format {
                Format::F32 => {
                    let from = at + 4 * lane;
                    f32::from_le_bytes([panel[from], panel[from + 1], panel[from + 2], panel[from + 3]])
                }
                Format::F16 => half_at(at),
                Format::Bf16 => bf16::from_le_bytes(two(at + 2 * lane)).to_f32(),
                Format::Q8_0 => f32::from(byte_at(at + 2 * LANES, i).cast_signed()) * half_at(at),
                Format::Q4_0 => (nibble(at + 2 * LANES, i) - 8.0) * half_at(at),
                Format::Q4_1 => nibble(at + 4 * LANES, i) * half_at(at) + half_at(at + 2 * LANES),
            };
        }
    }
}
