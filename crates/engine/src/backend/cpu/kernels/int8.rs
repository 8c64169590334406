//! The product of quantised weights by activations in 8 bits.
//!
//! A token's activations are cut into blocks of 32; each is 32 i8 and a scale of its own (the largest is 127). Within a
//! block sums are integers, so exact in any order; output `(token, row)` is one chain of fused multiply-adds over the
//! blocks in ascending order, two for each block: `sum * (weight scale * scale)`, then `offset * (scale * sum of i8)`.

#![allow(unsafe_code)]

use super::LANES;
use super::format::{Decode, Format, Q40, Q41, Q80};
use super::matmul::width;
use super::simd::{Simd, fold};

/// Elements of a block, of weights as of activations.
const BLOCK: usize = 32;
/// Words of a block of one token: 32 i8, then scale (f32), scale times sum (f32), sum times -128 (i32).
const WORDS: usize = BLOCK / 4 + 3;

/// Sixteen rows of four bytes at a time.
///
/// # Safety
/// As [`Simd`].
pub(super) trait Dot: Simd {
    /// Sixteen rows of four bytes.
    type W: Copy;
    /// Tokens of a full tile.
    const INT_TILE: usize;

    /// A block's nibbles, of 256 bytes, in ascending order of the inner dimension.
    unsafe fn nibbles(from: *const u8) -> [Self::W; 8];
    /// A block's signed bytes, of 512, in ascending order of the inner dimension, as [`Self::dot_bytes`] wants them.
    unsafe fn bytes(from: *const u8) -> [Self::W; 8];
    /// Sixteen sums of 32 products of a nibble and an i8. `x`: eight words of four i8.
    unsafe fn dot_nibbles(w: &[Self::W; 8], x: *const u32) -> Self::V;
    /// As [`Self::dot_nibbles`] for signed bytes; `start` is the sum of the i8 times -128.
    unsafe fn dot_bytes(w: &[Self::W; 8], x: *const u32, start: i32) -> Self::V;
    /// Rounds sixteen values to the nearest integers, to even where two are as near. They lie within -127..=127.
    unsafe fn store_i8(to: *mut i8, v: Self::V);
}

/// Which product a format has.
pub(super) trait IntBlocks: Decode {
    unsafe fn weights<S: Dot>(block: *const u8) -> [S::W; 8];
    unsafe fn dot<S: Dot>(w: &[S::W; 8], x: *const u32, start: i32) -> S::V;
    /// Whether the offset (of [`Decode::shared`]) counts.
    const OFFSET: bool;
}

macro_rules! int_blocks {
    ($name:ident, $shared:literal, $offset:literal, $weights:ident, |$w:ident, $x:ident, $start:ident| $dot:expr) => {
        impl IntBlocks for $name {
            const OFFSET: bool = $offset;

            #[inline(always)]
            unsafe fn weights<S: Dot>(block: *const u8) -> [S::W; 8] {
                // SAFETY: the caller gives a whole block of a panel.
                unsafe { S::$weights(block.add($shared * LANES)) }
            }
            #[inline(always)]
            unsafe fn dot<S: Dot>($w: &[S::W; 8], $x: *const u32, $start: i32) -> S::V {
                // SAFETY: the caller's promise.
                unsafe { $dot }
            }
        }
    };
}

int_blocks!(Q80, 2, false, bytes, |w, x, start| S::dot_bytes(w, x, start));
int_blocks!(Q40, 2, true, nibbles, |w, x, _start| S::dot_nibbles(w, x));
int_blocks!(Q41, 4, true, nibbles, |w, x, _start| S::dot_nibbles(w, x));

/// Some panels of one matrix by all tokens.
pub(in crate::backend::cpu) struct Int8Unit<'a> {
    /// How the panels are encoded: one of the quantised formats.
    pub format: Format,
    /// Length of the inner dimension.
    pub inner: usize,
    /// Whole panels, one after another.
    pub panels: &'a [u8],
    /// Tokens.
    pub tokens: usize,
    /// Activations: tiles of tokens (the last one narrower, see [`width`]), each `(inner / 32, record)`, where a record is
    /// the tile's i8 `(width, 8 words)`, its scales, its scaled sums and its sums, `(width,)` each.
    pub x: &'a [u32],
    /// `(panels, tokens, LANES)`, overwritten.
    pub out: &'a mut [f32],
}

/// Words of `x` for that many tokens.
pub(super) const fn packed_words(tile: usize, tokens: usize, inner: usize) -> usize {
    let rest = tokens % tile;
    let padded = if rest == 0 { 0 } else { width(rest) };
    (tokens / tile * tile + padded) * (inner / BLOCK) * WORDS
}

/// Writes one row `(inner,)` as token `m` of a tile of `width` tokens.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn quantise<S: Dot>(row: &[f32], m: usize, width: usize, tile: &mut [u32]) {
    assert!(m < width && row.len().is_multiple_of(BLOCK) && tile.len() == row.len() / BLOCK * width * WORDS);
    for (block, record) in row.chunks_exact(BLOCK).zip(tile.chunks_exact_mut(width * WORDS)) {
        let mut q = [0i8; BLOCK];
        // SAFETY: 32 elements in `block`, `q` and its halves; the caller's promise.
        let scale = unsafe {
            let [a, b] = [0, LANES].map(|at| S::load(block.as_ptr().add(at)));
            let zero = S::splat(0.0);
            let [a_size, b_size] = [a, b].map(|v| S::max(v, S::sub(zero, v)));
            let mut lanes = [0.0; LANES];
            S::store(lanes.as_mut_ptr(), S::max(a_size, b_size));
            let largest = fold(&lanes, |a, b| if a > b { a } else { b });
            let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            S::store_i8(q.as_mut_ptr(), S::mul(a, S::splat(factor)));
            S::store_i8(q.as_mut_ptr().add(LANES), S::mul(b, S::splat(factor)));
            // 0, or no number where one of the values is infinite or none: then no product may be a number.
            S::store(
                lanes.as_mut_ptr(),
                S::mul(S::add(S::mul(a, zero), S::mul(b, zero)), zero),
            );
            largest / 127.0 + fold(&lanes, |a, b| a + b)
        };
        let sum: i32 = q.iter().map(|q| i32::from(*q)).sum();
        for (word, q) in record[m * 8..].iter_mut().zip(q.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(q.map(i8::cast_unsigned));
        }
        let rest = &mut record[width * 8..];
        rest[m] = scale.to_bits();
        rest[width + m] = (scale * sum as f32).to_bits();
        rest[2 * width + m] = (sum * -128).cast_unsigned();
    }
}

/// Runs one unit.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn run<S: Dot>(unit: &mut Int8Unit<'_>) {
    // SAFETY: the caller's promise; each checks its lengths.
    unsafe {
        match unit.format {
            Format::Q8_0 => run_as::<S, Q80>(unit),
            Format::Q4_0 => run_as::<S, Q40>(unit),
            Format::Q4_1 => run_as::<S, Q41>(unit),
            Format::F32 | Format::F16 | Format::Bf16 => unreachable!("only quantised weights have an integer product"),
        }
    }
}

#[inline(always)]
unsafe fn run_as<S: Dot, D: IntBlocks>(unit: &mut Int8Unit<'_>) {
    assert!(unit.inner.is_multiple_of(BLOCK) && unit.tokens > 0);
    let panel_bytes = unit.inner / BLOCK * D::BYTES;
    let panels = unit.panels.len() / panel_bytes.max(1);
    assert!(unit.panels.len() == panels * panel_bytes);
    assert!(unit.x.len() == packed_words(S::INT_TILE, unit.tokens, unit.inner));
    assert!(unit.out.len() == panels * unit.tokens * LANES);
    let mut first = 0;
    while first < unit.tokens {
        let count = S::INT_TILE.min(unit.tokens - first);
        let x = unit.x[first * (unit.inner / BLOCK) * WORDS..].as_ptr();
        // SAFETY: the lengths above are what `tile` indexes by.
        unsafe {
            match width(count) {
                1 => tile::<S, D, 1>(unit, panels, first, count, x),
                2 => tile::<S, D, 2>(unit, panels, first, count, x),
                4 => tile::<S, D, 4>(unit, panels, first, count, x),
                6 => tile::<S, D, 6>(unit, panels, first, count, x),
                8 => tile::<S, D, 8>(unit, panels, first, count, x),
                _ => tile::<S, D, 12>(unit, panels, first, count, x),
            }
        }
        first += count;
    }
}

/// Every panel by one tile of tokens.
#[inline(always)]
unsafe fn tile<S: Dot, D: IntBlocks, const M: usize>(
    unit: &mut Int8Unit<'_>,
    panels: usize,
    first: usize,
    count: usize,
    x: *const u32,
) {
    let blocks = unit.inner / BLOCK;
    for panel in 0..panels {
        // SAFETY: `panel` counts whole panels, `x` holds `blocks` records of `M` tokens.
        let acc = unsafe { chains::<S, D, M>(unit.panels.as_ptr().add(panel * blocks * D::BYTES), blocks, x) };
        let row = panel * unit.tokens + first;
        let out = &mut unit.out[row * LANES..(row + count) * LANES];
        for (v, out) in acc.iter().zip(out.chunks_exact_mut(LANES)) {
            // SAFETY: sixteen elements.
            unsafe { S::store(out.as_mut_ptr(), *v) };
        }
    }
}

#[inline(always)]
unsafe fn chains<S: Dot, D: IntBlocks, const M: usize>(
    mut panel: *const u8,
    blocks: usize,
    mut x: *const u32,
) -> [S::V; M] {
    // SAFETY: the caller gives `blocks` blocks and records; f32 and u32 have one size and alignment.
    unsafe {
        let mut acc = [S::splat(0.0); M];
        for _ in 0..blocks {
            let w = D::weights::<S>(panel);
            let (scale, offset) = D::shared::<S>(panel);
            let scales = x.add(8 * M).cast::<f32>();
            let (sums, starts) = (scales.add(M), scales.add(2 * M).cast::<i32>());
            for (m, acc) in acc.iter_mut().enumerate() {
                let dot = D::dot::<S>(&w, x.add(8 * m), *starts.add(m));
                *acc = S::fma(dot, S::mul(scale, S::splat(*scales.add(m))), *acc);
                if D::OFFSET {
                    *acc = S::fma(offset, S::splat(*sums.add(m)), *acc);
                }
            }
            panel = panel.add(D::BYTES);
            x = x.add(WORDS * M);
        }
        acc
    }
}
