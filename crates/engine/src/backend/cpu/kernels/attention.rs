//! Causal attention of some consecutive tokens of one sequence, for the query heads that share one key/value head.
//!
//! The context is cut into segments of [`SEGMENT`] positions, walked in tiles of [`SPAN`] with an online softmax
//! (Milakov and Gimelshein 2018); what segments give is put together in ascending order (as in flash-decoding). Both are
//! aligned at multiples of their lengths. So a row (token, head) sees the same tiles in the same order, whichever rows
//! stand beside it and whichever unit does a segment; keys and values always come from the arena, as stored.

#![allow(unsafe_code)]

use super::LANES;
use super::simd::{Simd, fold};
use super::stored::{load_keys, load_values};
use crate::backend::cpu::arena::KvHead;
use std::ops::Range;

/// Positions of a context tile.
pub(super) const SPAN: usize = 4 * LANES;
/// Positions after which a softmax begins anew: the smallest part of a context that a unit may have for itself.
pub(in crate::backend::cpu) const SEGMENT: usize = 8 * SPAN;
/// Rows of a full tile of queries.
const ROWS: usize = 12;

/// Attention of `tokens` tokens over the positions of `context` up to their own.
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
    /// Which positions; begins at a multiple of [`SEGMENT`], ends at `start + tokens` or before.
    pub context: Range<usize>,
    /// Sums that are not divided yet: `(tokens, group, partial_len)`, overwritten.
    pub out: &'a mut [f32],
    /// Room; grown as needed.
    pub scratch: &'a mut Vec<f32>,
}

/// Length of one row's partial result: weighted sums, padded to whole lanes, then maximum and total.
pub(in crate::backend::cpu) const fn partial_len(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES) + LANES
}

/// The parts of a unit's scratch.
struct Room<'a> {
    /// Scaled queries: tiles of rows, each `(head_dim, width)`.
    q: &'a mut [f32],
    /// Keys of one context tile: `(head_dim, SPAN)`.
    keys: &'a mut [f32],
    /// Values of one context tile: `(SPAN, padded head_dim)`.
    values: &'a mut [f32],
    /// Scores, then weights: `(rows of a tile, SPAN)`.
    scores: &'a mut [f32],
    /// Partial results of one segment: `(rows, partial_len)`.
    sums: &'a mut [f32],
}

impl<'a> Room<'a> {
    fn new(scratch: &'a mut Vec<f32>, rows: usize, head_dim: usize) -> Self {
        let dim = head_dim.next_multiple_of(LANES);
        let lens = [
            rows.next_multiple_of(ROWS) * dim,
            dim * SPAN,
            SPAN * dim,
            ROWS * SPAN,
            rows * partial_len(head_dim),
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
        let (scores, rest) = rest.split_at_mut(lens[3]);
        Self {
            q,
            keys,
            values,
            scores,
            sums: &mut rest[..lens[4]],
        }
    }
}

/// Rows that a tile of `rows` is padded to.
const fn width(rows: usize) -> usize {
    match rows {
        0..=4 => rows,
        5..=6 => 6,
        7..=8 => 8,
        _ => ROWS,
    }
}

/// Runs one unit.
///
/// # Safety
/// As [`Simd`]; and nobody writes the positions that it reads meanwhile.
#[inline(always)]
pub(super) unsafe fn run<S: Simd>(unit: &mut AttentionUnit<'_>) {
    let (head_dim, group) = (unit.head_dim, unit.group);
    let len = partial_len(head_dim);
    let rows = unit.tokens * group;
    assert!(unit.out.len() == rows * len && unit.context.start.is_multiple_of(SEGMENT));
    assert!(unit.context.end <= unit.start + unit.tokens);
    let room = Room::new(unit.scratch, rows, head_dim);
    pack_queries(unit.q, unit.q_stride, unit.q_offset, (rows, group, head_dim), room.q);
    unit.out.chunks_exact_mut(len).for_each(clear);
    // The next unit may be the next segment's.
    let end = unit.start + unit.tokens;
    for segment in unit.context.clone().step_by(SEGMENT) {
        let until = unit.context.end.min(segment + SEGMENT);
        room.sums.chunks_exact_mut(len).for_each(clear);
        for context in (segment..until).step_by(SPAN) {
            let positions = SPAN.min(until - context);
            // SAFETY: the parts of the room have the lengths that are read and written; the caller's promise.
            unsafe {
                load_keys::<S>(&unit.kv, context, positions, end, head_dim, room.keys);
                load_values::<S>(&unit.kv, context, positions, end, head_dim, room.values);
            }
            for first in (0..rows).step_by(ROWS) {
                let count = ROWS.min(rows - first);
                // Positions of this tile that a row may see, by the row's token.
                let visible = |row: usize| (unit.start + row / group + 1).saturating_sub(context).min(positions);
                let seen = visible(first + count - 1);
                if seen > 0 {
                    let x = &room.q[first * head_dim..];
                    let sums = &mut room.sums[first * len..(first + count) * len];
                    // SAFETY: as above; `x` holds a tile of queries.
                    unsafe {
                        score::<S>(room.scores, count, seen, room.keys, x, head_dim);
                        take::<S>(sums, room.scores, room.values, head_dim, |row| visible(first + row));
                    }
                }
            }
        }
        for (out, part) in unit.out.chunks_exact_mut(len).zip(room.sums.chunks_exact(len)) {
            let (sums, state) = out.split_at_mut(len - LANES);
            let mut so_far = (state[0], state[1]);
            // SAFETY: both have `len` elements; the caller's promise.
            unsafe { merge::<S>(sums, &mut so_far, part) };
            (state[0], state[1]) = so_far;
        }
    }
}

/// No position seen yet.
#[inline(always)]
fn clear(partial: &mut [f32]) {
    partial.fill(0.0);
    let state = partial.len() - LANES;
    partial[state] = f32::NEG_INFINITY;
}

/// Puts the partial results of one row together and divides: `out` is `(head_dim,)`. They stand `step` elements apart.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn combine<S: Simd>(partials: &[f32], step: usize, parts: usize, out: &mut [f32]) {
    let len = partial_len(out.len());
    let mut so_far = (f32::NEG_INFINITY, 0.0);
    for part in 0..parts {
        // SAFETY: the caller's promise.
        unsafe { merge::<S>(out, &mut so_far, &partials[part * step..part * step + len]) };
    }
    for out in out {
        *out /= so_far.1;
    }
}

/// Adds a partial result to `sums`, of which there may be fewer than whole lanes, and to their maximum and total.
#[inline(always)]
unsafe fn merge<S: Simd>(sums: &mut [f32], (maximum, total): &mut (f32, f32), part: &[f32]) {
    let (part, state) = part.split_at(part.len() - LANES);
    let (part_maximum, part_total) = (state[0], state[1]);
    if part_maximum == f32::NEG_INFINITY {
        return;
    }
    if *maximum == f32::NEG_INFINITY {
        sums.copy_from_slice(&part[..sums.len()]);
        (*maximum, *total) = (part_maximum, part_total);
        return;
    }
    let highest = if part_maximum > *maximum {
        part_maximum
    } else {
        *maximum
    };
    // SAFETY: the caller's promise.
    let factors = unsafe { (exp::<S>(*maximum - highest), exp::<S>(part_maximum - highest)) };
    for (sums, part) in sums.chunks_mut(LANES).zip(part.chunks_exact(LANES)) {
        let mut lanes = [0.0; LANES];
        lanes[..sums.len()].copy_from_slice(sums);
        // SAFETY: sixteen elements each; the caller's promise.
        unsafe {
            let ours = S::mul(S::load(lanes.as_ptr()), S::splat(factors.0));
            let sum = S::fma(S::load(part.as_ptr()), S::splat(factors.1), ours);
            S::store(lanes.as_mut_ptr(), sum);
        }
        sums.copy_from_slice(&lanes[..sums.len()]);
    }
    (*maximum, *total) = (highest, *total * factors.0 + part_total * factors.1);
}

#[inline(always)]
unsafe fn exp<S: Simd>(x: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    // SAFETY: sixteen elements; the caller's promise.
    unsafe { S::store(lanes.as_mut_ptr(), S::exp(S::splat(x))) };
    lanes[0]
}

/// Queries times `1 / sqrt(head_dim)`, as tiles of rows.
#[inline(always)]
fn pack_queries(
    q: &[f32],
    stride: usize,
    offset: usize,
    (rows, group, head_dim): (usize, usize, usize),
    out: &mut [f32],
) {
    let scale = 1.0 / (head_dim as f32).sqrt();
    for first in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - first);
        let wide = width(count);
        let tile = &mut out[first * head_dim..(first + wide) * head_dim];
        if count < wide {
            tile.fill(0.0);
        }
        for row in 0..count {
            let from = (first + row) / group * stride + offset + (first + row) % group * head_dim;
            for (x, out) in q[from..from + head_dim]
                .iter()
                .zip(tile[row..].iter_mut().step_by(wide))
            {
                *out = x * scale;
            }
        }
    }
}

/// Scores of a tile of `count` rows at the first `seen` positions, rounded up.
#[inline(always)]
unsafe fn score<S: Simd>(scores: &mut [f32], count: usize, seen: usize, keys: &[f32], x: &[f32], head_dim: usize) {
    assert!(x.len() >= width(count) * head_dim && keys.len() >= head_dim * SPAN && scores.len() >= ROWS * SPAN);
    // SAFETY: the lengths above.
    unsafe {
        match width(count) {
            1 => score_rows::<S, 1>(scores, seen, keys, x, head_dim),
            2 => score_rows::<S, 2>(scores, seen, keys, x, head_dim),
            3 => score_rows::<S, 3>(scores, seen, keys, x, head_dim),
            4 => score_rows::<S, 4>(scores, seen, keys, x, head_dim),
            6 => score_rows::<S, 6>(scores, seen, keys, x, head_dim),
            8 => score_rows::<S, 8>(scores, seen, keys, x, head_dim),
            _ => score_rows::<S, ROWS>(scores, seen, keys, x, head_dim),
        }
    }
}

#[inline(always)]
unsafe fn score_rows<S: Simd, const M: usize>(
    scores: &mut [f32],
    seen: usize,
    keys: &[f32],
    x: &[f32],
    head_dim: usize,
) {
    let mut at = 0;
    while at < seen {
        let (scores, keys) = (scores[at..].as_mut_ptr(), keys[at..].as_ptr());
        // SAFETY: `at` is below SPAN, as a multiple of what is done at once; the caller's lengths.
        unsafe {
            if S::TILE == 12 && M <= 4 {
                score_block::<S, M, 4>(scores, keys, x.as_ptr(), head_dim);
                at += 4 * LANES;
            } else if S::TILE == 12 {
                score_block::<S, M, 2>(scores, keys, x.as_ptr(), head_dim);
                at += 2 * LANES;
            } else {
                score_block::<S, M, 1>(scores, keys, x.as_ptr(), head_dim);
                at += LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn score_block<S: Simd, const M: usize, const N: usize>(
    scores: *mut f32,
    mut keys: *const f32,
    mut x: *const f32,
    head_dim: usize,
) {
    // SAFETY: keys hold `(head_dim, SPAN)`, `x` holds `(head_dim, M)`, scores `(M, SPAN)`, from N vectors before the end on.
    unsafe {
        let mut acc = [[S::splat(0.0); N]; M];
        for _ in 0..head_dim {
            let mut key = [S::splat(0.0); N];
            for (n, key) in key.iter_mut().enumerate() {
                *key = S::load(keys.add(n * LANES));
            }
            for (m, acc) in acc.iter_mut().enumerate() {
                let x = S::splat(*x.add(m));
                for (acc, key) in acc.iter_mut().zip(key) {
                    *acc = S::fma(key, x, *acc);
                }
            }
            keys = keys.add(SPAN);
            x = x.add(M);
        }
        for (m, acc) in acc.iter().enumerate() {
            for (n, acc) in acc.iter().enumerate() {
                S::store(scores.add(m * SPAN + n * LANES), *acc);
            }
        }
    }
}

/// Turns scores of some rows into weights and adds the weighted values to the rows' partial results.
#[inline(always)]
unsafe fn take<S: Simd>(
    sums: &mut [f32],
    scores: &mut [f32],
    values: &[f32],
    head_dim: usize,
    visible: impl Fn(usize) -> usize,
) {
    let len = partial_len(head_dim);
    let count = sums.len() / len;
    let mut factors = [1.0; ROWS];
    for ((row, sums), scores) in sums
        .chunks_exact_mut(len)
        .enumerate()
        .zip(scores.chunks_exact_mut(SPAN))
    {
        let state = &mut sums[len - LANES..];
        let (mut maximum, mut total) = (state[0], state[1]);
        if visible(row) > 0 {
            // SAFETY: the caller's promise.
            factors[row] = unsafe { soften::<S>(scores, visible(row), &mut maximum, &mut total) };
        }
        (state[0], state[1]) = (maximum, total);
    }
    let most = if S::TILE == 12 { 6 } else { 3 };
    let mut row = 0;
    while row < count {
        let sums = sums[row * len..].as_mut_ptr();
        let (weights, factors) = (scores[row * SPAN..].as_ptr(), factors[row..].as_ptr());
        let rest = most.min(count - row);
        // Positions that all of these rows see, then what the later ones see beyond: the order stays each row's own.
        let all = visible(row);
        // SAFETY: each has `rest` rows; `visible` is at most SPAN.
        unsafe {
            let mut done = 3;
            match rest {
                6 => {
                    weigh::<S, 6>(sums, factors, weights, 0..all, values, head_dim);
                    done = 6;
                }
                3..=5 => weigh::<S, 3>(sums, factors, weights, 0..all, values, head_dim),
                _ => {
                    weigh::<S, 1>(sums, factors, weights, 0..all, values, head_dim);
                    done = 1;
                }
            }
            for i in 1..done {
                if visible(row + i) > all {
                    let (sums, weights) = (sums.add(i * len), weights.add(i * SPAN));
                    weigh::<S, 1>(sums, [1.0].as_ptr(), weights, all..visible(row + i), values, head_dim);
                }
            }
            row += done;
        }
    }
}

/// Turns a row's scores into weights against the new running maximum; gives the factor for what was summed before.
#[inline(always)]
unsafe fn soften<S: Simd>(scores: &mut [f32], visible: usize, maximum: &mut f32, total: &mut f32) -> f32 {
    scores[visible..].fill(f32::NEG_INFINITY);
    // SAFETY: the caller gives SPAN scores.
    unsafe {
        let at = |i: usize| S::load(scores.as_ptr().add(i * LANES));
        let mut lanes = [0.0; LANES];
        S::store(lanes.as_mut_ptr(), S::max(S::max(at(0), at(1)), S::max(at(2), at(3))));
        let highest = fold(&lanes, |a, b| if a > b { a } else { b });
        let new = if highest > *maximum { highest } else { *maximum };
        let factor = if *maximum == f32::NEG_INFINITY {
            0.0
        } else {
            exp::<S>(*maximum - new)
        };
        for i in 0..SPAN / LANES {
            let shifted = S::sub(S::load(scores.as_ptr().add(i * LANES)), S::splat(new));
            S::store(scores.as_mut_ptr().add(i * LANES), S::exp(shifted));
        }
        scores[visible..].fill(0.0);
        let at = |i: usize| S::load(scores.as_ptr().add(i * LANES));
        S::store(lanes.as_mut_ptr(), S::add(S::add(at(0), at(1)), S::add(at(2), at(3))));
        *total = *total * factor + fold(&lanes, |a, b| a + b);
        *maximum = new;
        factor
    }
}

/// `sums * factor + weights * values` of M rows, position by position.
#[inline(always)]
unsafe fn weigh<S: Simd, const M: usize>(
    sums: *mut f32,
    factors: *const f32,
    weights: *const f32,
    positions: Range<usize>,
    values: &[f32],
    head_dim: usize,
) {
    let dim = head_dim.next_multiple_of(LANES);
    assert!(positions.end <= SPAN && values.len() >= SPAN * dim);
    let mut d = 0;
    // SAFETY: the caller gives M rows of partial results, factors and weights.
    unsafe {
        while d < dim {
            let (sums, values) = (sums.add(d), values.as_ptr().add(d));
            let positions = positions.clone();
            if d + 4 * LANES <= dim && S::TILE == 12 {
                columns::<S, M, 4>(sums, factors, weights, positions, values, dim);
                d += 4 * LANES;
            } else if d + 2 * LANES <= dim {
                columns::<S, M, 2>(sums, factors, weights, positions, values, dim);
                d += 2 * LANES;
            } else {
                columns::<S, M, 1>(sums, factors, weights, positions, values, dim);
                d += LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn columns<S: Simd, const M: usize, const N: usize>(
    sums: *mut f32,
    factors: *const f32,
    weights: *const f32,
    positions: Range<usize>,
    values: *const f32,
    dim: usize,
) {
    let len = dim + LANES;
    // SAFETY: as `weigh`.
    unsafe {
        let mut acc = [[S::splat(0.0); N]; M];
        for (m, acc) in acc.iter_mut().enumerate() {
            let factor = S::splat(*factors.add(m));
            for (n, acc) in acc.iter_mut().enumerate() {
                *acc = S::mul(S::load(sums.add(m * len + n * LANES)), factor);
            }
        }
        for t in positions {
            let mut value = [S::splat(0.0); N];
            for (n, value) in value.iter_mut().enumerate() {
                *value = S::load(values.add(t * dim + n * LANES));
            }
            for (m, acc) in acc.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(m * SPAN + t));
                for (acc, value) in acc.iter_mut().zip(value) {
                    *acc = S::fma(weight, value, *acc);
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            for (n, acc) in acc.iter().enumerate() {
                S::store(sums.add(m * len + n * LANES), *acc);
            }
        }
    }
}
