//! Causal attention of some consecutive tokens of one sequence, for the query heads that share one key/value head.
//!
//! The context is walked in tiles of [`LANES`] positions aligned at multiples of [`LANES`], with an online softmax
//! (Milakov and Gimelshein 2018). A row (token, head) sees the same tiles in the same order, with the same count of valid
//! positions, whichever rows stand beside it; keys and values always come from the arena, as stored.

#![allow(unsafe_code)]

use super::LANES;
use super::matmul::{tile, width};
use super::simd::{Simd, fold};
use crate::backend::cpu::arena::{KvHead, KvPart};
use baton_types::KvDtype;
use half::{bf16, f16};

/// Attention of `tokens` tokens over all positions up to their own.
pub(in crate::backend::cpu) struct AttentionUnit<'a> {
    /// The sequence's keys and values of one head; holds `start + tokens` positions.
    pub kv: KvHead<'a>,
    /// Queries, rotated: `(tokens, q_stride)`, of which `group * head_dim` elements from `q_offset` are ours.
    pub q: &'a [f32],
    /// Distance of two tokens in `q`.
    pub q_stride: usize,
    /// First element of the group's first head.
    pub q_offset: usize,
    /// Query heads per key/value head.
    pub group: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Tokens.
    pub tokens: usize,
    /// Position of the first.
    pub start: usize,
    /// `(tokens, group, head_dim)`, overwritten.
    pub out: &'a mut [f32],
    /// Room; grown as needed.
    pub scratch: &'a mut Vec<f32>,
}

/// The parts of a unit's scratch.
struct Room<'a> {
    /// Scaled queries: tiles of rows, each `(padded head_dim, width)`.
    q: &'a mut [f32],
    /// Keys of one context tile: `(padded head_dim, LANES)`.
    keys: &'a mut [f32],
    /// Values of one context tile: `(LANES, padded head_dim)`.
    values: &'a mut [f32],
    /// Rows of keys before they are turned.
    rows: &'a mut [f32],
    /// Scores, then weights: `(rows of a tile, LANES)`.
    scores: &'a mut [f32],
    /// Weighted sums: `(rows, padded head_dim)`.
    sums: &'a mut [f32],
    /// Running maximum and running total of each row.
    state: &'a mut [f32],
}

impl<'a> Room<'a> {
    fn new(scratch: &'a mut Vec<f32>, rows: usize, padded_rows: usize, dim: usize) -> Self {
        let lens = [
            padded_rows * dim,
            dim * LANES,
            dim * LANES,
            dim * LANES,
            12 * LANES,
            rows * dim,
            2 * rows,
        ];
        let need = lens.iter().sum::<usize>() + LANES;
        if scratch.len() < need {
            scratch.resize(need, 0.0);
        }
        let skip = scratch.as_ptr().align_offset(64).min(LANES);
        let rest = &mut scratch[skip..];
        let (q, rest) = rest.split_at_mut(lens[0]);
        let (keys, rest) = rest.split_at_mut(lens[1]);
        let (values, rest) = rest.split_at_mut(lens[2]);
        let (row_keys, rest) = rest.split_at_mut(lens[3]);
        let (scores, rest) = rest.split_at_mut(lens[4]);
        let (sums, rest) = rest.split_at_mut(lens[5]);
        Self {
            q,
            keys,
            values,
            rows: row_keys,
            scores,
            sums,
            state: &mut rest[..lens[6]],
        }
    }
}

/// Runs one unit.
///
/// # Safety
/// As [`Simd`]; and nobody writes the positions that it reads meanwhile.
#[inline(always)]
pub(super) unsafe fn run<S: Simd>(unit: &mut AttentionUnit<'_>) {
    let dim = unit.head_dim.next_multiple_of(LANES);
    let rows = unit.tokens * unit.group;
    assert!(unit.out.len() == rows * unit.head_dim);
    let rest = rows % S::TILE;
    let padded_rows = rows - rest + if rest == 0 { 0 } else { width(rest) };
    let room = Room::new(unit.scratch, rows, padded_rows, dim);
    pack_queries::<S>(
        unit.q,
        unit.q_stride,
        unit.q_offset,
        unit.group,
        unit.head_dim,
        rows,
        dim,
        room.q,
    );
    room.sums.fill(0.0);
    let (maxima, totals) = room.state.split_at_mut(rows);
    maxima.fill(f32::NEG_INFINITY);
    totals.fill(0.0);

    let end = unit.start + unit.tokens;
    for context in (0..end).step_by(LANES) {
        let positions = LANES.min(end - context);
        // SAFETY: `room`'s parts have the lengths that the loads need; the caller's promise.
        unsafe {
            prefetch::<S>(&unit.kv, context + LANES, end, unit.head_dim);
            load::<S>(&unit.kv, KvPart::Key, context, positions, unit.head_dim, dim, room.rows);
            turn(room.rows, room.keys, dim);
            load::<S>(
                &unit.kv,
                KvPart::Value,
                context,
                positions,
                unit.head_dim,
                dim,
                room.values,
            );
        }
        let mut first = 0;
        while first < rows {
            let count = S::TILE.min(rows - first);
            let last_position = unit.start + (first + count - 1) / unit.group;
            if last_position >= context {
                let x = room.q[first * dim..].as_ptr();
                // SAFETY: keys hold `(dim, LANES)`, this tile of queries `(dim, width)`, scores twelve rows.
                unsafe { score::<S>(room.scores, count, room.keys.as_ptr(), x, dim) };
                for i in 0..count {
                    let row = first + i;
                    let position = unit.start + row / unit.group;
                    if position < context {
                        continue;
                    }
                    let visible = LANES.min(position + 1 - context);
                    let weights = &mut room.scores[i * LANES..(i + 1) * LANES];
                    let sums = &mut room.sums[row * dim..(row + 1) * dim];
                    // SAFETY: sixteen weights, `dim` sums, `(LANES, dim)` values.
                    unsafe {
                        let scale = soften::<S>(weights, visible, &mut maxima[row], &mut totals[row]);
                        accumulate::<S>(sums, scale, weights, visible, room.values, dim);
                    }
                }
            }
            first += count;
        }
    }
    let outs = unit.out.chunks_exact_mut(unit.head_dim);
    for ((out, sums), total) in outs.zip(room.sums.chunks_exact(dim)).zip(totals) {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = sum / *total;
        }
    }
}

/// Queries times `1 / sqrt(head_dim)`, as tiles of rows.
#[allow(clippy::too_many_arguments)] // The lengths of one layout; a struct would name them a second time.
#[inline(always)]
fn pack_queries<S: Simd>(
    q: &[f32],
    stride: usize,
    offset: usize,
    group: usize,
    head_dim: usize,
    rows: usize,
    dim: usize,
    out: &mut [f32],
) {
    out.fill(0.0);
    let scale = 1.0 / (head_dim as f32).sqrt();
    for row in 0..rows {
        let from = row / group * stride + offset + row % group * head_dim;
        let first = row - row % S::TILE;
        let wide = width(S::TILE.min(rows - first));
        let tile = &mut out[first * dim..];
        for (d, x) in q[from..from + head_dim].iter().enumerate() {
            tile[d * wide + row - first] = x * scale;
        }
    }
}

/// Rows of keys or values of one context tile as f32: `(LANES, dim)`; absent positions and elements are 0.
#[inline(always)]
unsafe fn load<S: Simd>(
    kv: &KvHead<'_>,
    part: KvPart,
    context: usize,
    positions: usize,
    head_dim: usize,
    dim: usize,
    out: &mut [f32],
) {
    out[positions * dim..].fill(0.0);
    let row_bytes = head_dim * kv.dtype().bytes();
    let mut done = 0;
    while done < positions {
        let (from, run) = kv.rows(part, context + done);
        let run = run.min(positions - done);
        for i in 0..run {
            let to = &mut out[(done + i) * dim..(done + i + 1) * dim];
            // SAFETY: `rows` gives the address of `run` whole rows inside the arena.
            unsafe { convert::<S>(from.as_ptr().add(i * row_bytes), kv.dtype(), head_dim, to) };
        }
        done += run;
    }
}

/// One row of `head_dim` stored elements to f32, zeros behind.
#[inline(always)]
unsafe fn convert<S: Simd>(from: *const u8, dtype: KvDtype, head_dim: usize, to: &mut [f32]) {
    let whole = head_dim / LANES * LANES;
    // SAFETY: `from` holds `head_dim` elements of `dtype`; `to` holds as many f32, and more.
    unsafe {
        for d in (0..whole).step_by(LANES) {
            let v = match dtype {
                KvDtype::F16 => S::load_f16(from.add(2 * d)),
                KvDtype::Bf16 => S::load_bf16(from.add(2 * d)),
                KvDtype::F32 => S::load(from.add(4 * d).cast()),
            };
            S::store(to.as_mut_ptr().add(d), v);
        }
        for (d, to) in to.iter_mut().enumerate().skip(whole) {
            *to = match dtype {
                _ if d >= head_dim => 0.0,
                KvDtype::F16 => f16::from_bits(from.add(2 * d).cast::<u16>().read_unaligned()).to_f32(),
                KvDtype::Bf16 => bf16::from_bits(from.add(2 * d).cast::<u16>().read_unaligned()).to_f32(),
                KvDtype::F32 => from.add(4 * d).cast::<f32>().read_unaligned(),
            };
        }
    }
}

/// Asks for the keys and values of the next context tile: blocks lie far apart, so the machine does not foresee them.
#[inline(always)]
unsafe fn prefetch<S: Simd>(kv: &KvHead<'_>, context: usize, end: usize, head_dim: usize) {
    if context >= end {
        return;
    }
    for part in [KvPart::Key, KvPart::Value] {
        let (from, run) = kv.rows(part, context);
        let bytes = run.min(LANES).min(end - context) * head_dim * kv.dtype().bytes();
        for at in (0..bytes).step_by(64) {
            // SAFETY: the instructions exist by the caller's promise; the address is inside the arena.
            unsafe { S::prefetch(from.as_ptr().add(at)) };
        }
    }
}

/// `(LANES, dim)` to `(dim, LANES)`.
#[inline(always)]
fn turn(rows: &[f32], out: &mut [f32], dim: usize) {
    for (d, out) in out.chunks_exact_mut(LANES).enumerate() {
        for (t, out) in out.iter_mut().enumerate() {
            *out = rows[t * dim + d];
        }
    }
}

#[inline(always)]
unsafe fn score<S: Simd>(scores: &mut [f32], count: usize, keys: *const f32, x: *const f32, dim: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match width(count) {
            1 => tile::<S, 1>(scores, 0, count, keys, x, dim),
            2 => tile::<S, 2>(scores, 0, count, keys, x, dim),
            4 => tile::<S, 4>(scores, 0, count, keys, x, dim),
            6 => tile::<S, 6>(scores, 0, count, keys, x, dim),
            8 => tile::<S, 8>(scores, 0, count, keys, x, dim),
            _ => tile::<S, 12>(scores, 0, count, keys, x, dim),
        }
    }
}

/// Turns sixteen scores into weights against the new running maximum; gives the factor for what was summed before.
#[inline(always)]
unsafe fn soften<S: Simd>(scores: &mut [f32], visible: usize, maximum: &mut f32, total: &mut f32) -> f32 {
    scores[visible..].fill(f32::NEG_INFINITY);
    let highest = fold(scores, |a, b| if a > b { a } else { b });
    let new = if highest > *maximum { highest } else { *maximum };
    // SAFETY: the caller gives sixteen scores.
    let factor = unsafe {
        let shifted = S::sub(S::load(scores.as_ptr()), S::splat(new));
        S::store(scores.as_mut_ptr(), S::exp(shifted));
        let mut factors = [0.0; LANES];
        S::store(factors.as_mut_ptr(), S::exp(S::splat(*maximum - new)));
        if *maximum == f32::NEG_INFINITY { 0.0 } else { factors[0] }
    };
    scores[visible..].fill(0.0);
    *total = *total * factor + fold(scores, |a, b| a + b);
    *maximum = new;
    factor
}

/// `sums * factor + weights * values`, position by position.
#[inline(always)]
unsafe fn accumulate<S: Simd>(
    sums: &mut [f32],
    factor: f32,
    weights: &[f32],
    visible: usize,
    values: &[f32],
    dim: usize,
) {
    let mut d = 0;
    // SAFETY: `sums` holds `dim` elements, `values` holds `(LANES, dim)`, `visible <= LANES`, `dim` is whole lanes.
    unsafe {
        while d + 4 * LANES <= dim {
            columns::<S, 4>(
                sums.as_mut_ptr().add(d),
                factor,
                weights,
                visible,
                values.as_ptr().add(d),
                dim,
            );
            d += 4 * LANES;
        }
        while d < dim {
            columns::<S, 1>(
                sums.as_mut_ptr().add(d),
                factor,
                weights,
                visible,
                values.as_ptr().add(d),
                dim,
            );
            d += LANES;
        }
    }
}

#[inline(always)]
unsafe fn columns<S: Simd, const N: usize>(
    sums: *mut f32,
    factor: f32,
    weights: &[f32],
    visible: usize,
    values: *const f32,
    dim: usize,
) {
    // SAFETY: as `accumulate`.
    unsafe {
        let factor = S::splat(factor);
        let mut acc = [factor; N];
        for (n, acc) in acc.iter_mut().enumerate() {
            *acc = S::mul(S::load(sums.add(n * LANES)), factor);
        }
        for (t, weight) in weights[..visible].iter().enumerate() {
            let weight = S::splat(*weight);
            for (n, acc) in acc.iter_mut().enumerate() {
                *acc = S::fma(weight, S::load(values.add(t * dim + n * LANES)), *acc);
            }
        }
        for (n, acc) in acc.into_iter().enumerate() {
            S::store(sums.add(n * LANES), acc);
        }
    }
}
