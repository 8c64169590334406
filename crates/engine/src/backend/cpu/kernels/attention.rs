//! Causal attention of some consecutive tokens of one sequence, for the query heads of some key/value heads.
//!
//! Few rows read keys and values where they lie; for many rows a context tile is turned into f32 once. Both do the same
//! operations in the same order. Stored scales multiply scores and weights, so that elements are used as they are.
//!
//! The context is cut into segments of [`SEGMENT`] positions, walked in tiles of [`SPAN`] with an online softmax
//! (Milakov and Gimelshein 2018); what segments give is put together in ascending order (as in flash-decoding). Both are
//! aligned at multiples of their lengths. So a row (token, head) sees the same tiles in the same order, whichever rows
//! stand beside it and whichever unit does a segment; keys and values always come from the arena, as stored.

#![allow(unsafe_code)]

use super::LANES;
use super::simd::{Simd, fold};
use super::stored::{
    Eight, Half, InPlace, Tile, Unpacked, Where, in_place, load_keys, load_scales, load_values, times,
};
use crate::backend::cpu::arena::KvLayer;
use baton_types::{KvDtype, KvPart};
use std::ops::Range;

/// Positions of a context tile.
pub(super) const SPAN: usize = 4 * LANES;
/// Positions after which a softmax begins anew: the smallest part of a context that a unit may have for itself.
pub(in crate::backend::cpu) const SEGMENT: usize = 8 * SPAN;
/// Rows of a full tile of queries.
const ROWS: usize = 12;

/// Attention of `tokens` tokens over the positions of `context` up to their own.
pub(in crate::backend::cpu) struct AttentionUnit<'a> {
    /// The sequence's keys and values of one layer; holds `start + tokens` positions.
    pub kv: KvLayer<'a>,
    /// Which key/value heads.
    pub heads: Range<usize>,
    /// Queries, rotated: `(tokens, q_stride)`.
    pub q: &'a [f32],
    /// Distance of two tokens in `q`.
    pub q_stride: usize,
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
    /// Sums that are not divided yet: `(heads, tokens, group, partial_len)`, overwritten.
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
    /// Scaled queries of each head: tiles of rows, each `(head_dim, width)`.
    q: &'a mut [f32],
    /// Keys of one context tile: `(head_dim, SPAN)`.
    keys: &'a mut [f32],
    /// Values of one context tile: `(SPAN, padded head_dim)`.
    values: &'a mut [f32],
    /// Scales of both: `(2, SPAN)`.
    scales: &'a mut [f32],
    /// Scores, then weights: `(rows of a tile, SPAN)`.
    scores: &'a mut [f32],
    /// Partial results of one segment: `(heads, rows, partial_len)`.
    sums: &'a mut [f32],
}

impl<'a> Room<'a> {
    fn new(scratch: &'a mut Vec<f32>, heads: usize, rows: usize, head_dim: usize) -> Self {
        let dim = head_dim.next_multiple_of(LANES);
        let lens = [
            heads * rows.next_multiple_of(ROWS) * head_dim,
            dim * SPAN,
            SPAN * dim,
            2 * SPAN,
            ROWS * SPAN,
            heads * rows * partial_len(head_dim),
        ];
        let lens = lens.map(|len| len.next_multiple_of(LANES));
        let need = lens.iter().sum::<usize>() + LANES;
        if scratch.len() < need {
            scratch.resize(need, 0.0);
        }
        let skip = scratch.as_ptr().align_offset(64).min(LANES);
        let rest = &mut scratch[skip..];
        let (q, rest) = rest.split_at_mut(lens[0]);
        let (keys, rest) = rest.split_at_mut(lens[1]);
        let (values, rest) = rest.split_at_mut(lens[2]);
        let (scales, rest) = rest.split_at_mut(lens[3]);
        let (scores, rest) = rest.split_at_mut(lens[4]);
        Self {
            q,
            keys,
            values,
            scales,
            scores,
            sums: &mut rest[..heads * rows * partial_len(head_dim)],
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

/// What stays the same throughout a unit.
#[derive(Clone, Copy)]
struct Shape {
    start: usize,
    group: usize,
    head_dim: usize,
    /// Of one head.
    rows: usize,
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
    let shape = Shape {
        start: unit.start,
        group,
        head_dim,
        rows,
    };
    let heads = unit.heads.len();
    assert!(unit.out.len() == heads * rows * len && unit.context.start.is_multiple_of(SEGMENT));
    assert!(unit.context.end <= unit.start + unit.tokens);
    assert!(head_dim == unit.kv.geometry().head_dim as usize);
    let mut room = Room::new(unit.scratch, heads, rows, head_dim);
    let of_head = rows.next_multiple_of(ROWS) * head_dim;
    for (head, q) in unit.heads.clone().zip(room.q.chunks_exact_mut(of_head)) {
        pack_queries(
            unit.q,
            unit.q_stride,
            head * group * head_dim,
            (rows, group, head_dim),
            q,
        );
    }
    unit.out.chunks_exact_mut(len).for_each(clear);
    // The next unit may be the next segment's.
    let end = unit.start + unit.tokens;
    for segment in unit.context.clone().step_by(SEGMENT) {
        let until = unit.context.end.min(segment + SEGMENT);
        room.sums.chunks_exact_mut(len).for_each(clear);
        for context in (segment..until).step_by(SPAN) {
            let positions = SPAN.min(until - context);
            // Heads within positions: what they have of a block lies side by side.
            for (i, head) in unit.heads.clone().enumerate() {
                let at = Where {
                    head,
                    context,
                    positions,
                    end,
                };
                // SAFETY: the parts of the room have the lengths that are read and written; the caller's promise.
                unsafe { context_tile::<S>(&unit.kv, at, shape, i, &mut room) };
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

/// One context tile of one head, the unit's `index`th.
#[inline(always)]
unsafe fn context_tile<S: Simd>(kv: &KvLayer<'_>, at: Where, shape: Shape, index: usize, room: &mut Room<'_>) {
    let (keys, values) = room.scales.split_at_mut(SPAN);
    // SAFETY: the caller's promise.
    let scaled =
        unsafe { load_scales::<S>(kv, KvPart::Key, at, keys) && load_scales::<S>(kv, KvPart::Value, at, values) };
    let few = shape.rows <= ROWS && in_place(kv.geometry());
    // SAFETY: each tile stands for the positions of `at`; the caller's promise.
    unsafe {
        match kv.geometry().dtype {
            KvDtype::F16 if few => rows::<S, _>(InPlace::<Half>::new(kv, at), at, shape, index, (room, scaled)),
            KvDtype::Q8 if few => rows::<S, _>(InPlace::<Eight>::new(kv, at), at, shape, index, (room, scaled)),
            KvDtype::F16 | KvDtype::Q8 | KvDtype::Bf16 | KvDtype::F32 => {
                load_keys::<S>(kv, at, room.keys);
                load_values::<S>(kv, at, room.values);
                let tile = Unpacked {
                    keys: room.keys.as_ptr(),
                    values: room.values.as_ptr(),
                    dim: shape.head_dim.next_multiple_of(LANES),
                };
                rows::<S, _>(tile, at, shape, index, (room, scaled));
            }
        }
    }
}

/// All rows of one head against one context tile.
#[inline(always)]
unsafe fn rows<S: Simd, T: Tile>(
    tile: T,
    at: Where,
    shape: Shape,
    index: usize,
    (room, scaled): (&mut Room<'_>, bool),
) {
    let len = partial_len(shape.head_dim);
    let q = &room.q[index * shape.rows.next_multiple_of(ROWS) * shape.head_dim..];
    let sums = &mut room.sums[index * shape.rows * len..][..shape.rows * len];
    let scales = scaled.then(|| room.scales.split_at(SPAN));
    for first in (0..shape.rows).step_by(ROWS) {
        let count = ROWS.min(shape.rows - first);
        // Positions of this tile that a row may see, by the row's token.
        let visible = |row: usize| {
            let until = shape.start + row / shape.group + 1;
            until.saturating_sub(at.context).min(at.positions)
        };
        let seen = visible(first + count - 1);
        if seen > 0 {
            let x = &q[first * shape.head_dim..];
            let sums = &mut sums[first * len..(first + count) * len];
            // SAFETY: `x` holds a tile of queries; the caller's promise.
            unsafe {
                score::<S, T>(room.scores, count, seen, tile, x, shape.head_dim);
                take::<S, T>(sums, room.scores, scales, tile, shape.head_dim, |row| {
                    visible(first + row)
                });
            }
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
unsafe fn score<S: Simd, T: Tile>(scores: &mut [f32], count: usize, seen: usize, tile: T, x: &[f32], head_dim: usize) {
    assert!(x.len() >= width(count) * head_dim && scores.len() >= ROWS * SPAN && seen <= SPAN);
    let (scores, x) = (scores.as_mut_ptr(), x.as_ptr());
    // SAFETY: the lengths above.
    unsafe {
        match width(count) {
            1 => score_rows::<S, T, 1>(scores, seen, tile, x, head_dim),
            2 => score_rows::<S, T, 2>(scores, seen, tile, x, head_dim),
            3 => score_rows::<S, T, 3>(scores, seen, tile, x, head_dim),
            4 => score_rows::<S, T, 4>(scores, seen, tile, x, head_dim),
            6 => score_rows::<S, T, 6>(scores, seen, tile, x, head_dim),
            8 => score_rows::<S, T, 8>(scores, seen, tile, x, head_dim),
            _ => score_rows::<S, T, ROWS>(scores, seen, tile, x, head_dim),
        }
    }
}

#[inline(always)]
unsafe fn score_rows<S: Simd, T: Tile, const M: usize>(
    scores: *mut f32,
    seen: usize,
    tile: T,
    x: *const f32,
    head_dim: usize,
) {
    let groups = seen.div_ceil(LANES);
    let mut group = 0;
    while group < groups {
        // SAFETY: what is done at once ends at SPAN; the caller's lengths.
        unsafe {
            if S::TILE == 12 && M <= 4 && group + 2 < groups {
                score_block::<S, T, M, 4>(scores, group, tile, x, head_dim);
                group += 4;
            } else if S::TILE == 12 && group + 1 < groups {
                score_block::<S, T, M, 2>(scores, group, tile, x, head_dim);
                group += 2;
            } else {
                score_block::<S, T, M, 1>(scores, group, tile, x, head_dim);
                group += 1;
            }
        }
    }
}

#[inline(always)]
unsafe fn score_block<S: Simd, T: Tile, const M: usize, const N: usize>(
    scores: *mut f32,
    group: usize,
    tile: T,
    mut x: *const f32,
    head_dim: usize,
) {
    // SAFETY: the tile has `head_dim` elements of each position, `x` holds `(head_dim, M)`, scores `(M, SPAN)`.
    unsafe {
        let mut acc = [[S::splat(0.0); N]; M];
        for dim in 0..head_dim {
            let mut key = [S::splat(0.0); N];
            for (n, key) in key.iter_mut().enumerate() {
                *key = tile.key::<S>(dim, group + n);
                tile.ahead_of_values::<S>(dim, group + n);
            }
            for (m, acc) in acc.iter_mut().enumerate() {
                let x = S::splat(*x.add(m));
                for (acc, key) in acc.iter_mut().zip(key) {
                    *acc = S::fma(key, x, *acc);
                }
            }
            x = x.add(M);
        }
        for (m, acc) in acc.iter().enumerate() {
            for (n, acc) in acc.iter().enumerate() {
                S::store(scores.add(m * SPAN + (group + n) * LANES), *acc);
            }
        }
    }
}

/// Turns scores of some rows into weights and adds the weighted values to the rows' partial results.
#[inline(always)]
unsafe fn take<S: Simd, T: Tile>(
    sums: &mut [f32],
    scores: &mut [f32],
    scales: Option<(&[f32], &[f32])>,
    tile: T,
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
            factors[row] = unsafe { soften::<S>(scores, visible(row), scales, (&mut maximum, &mut total)) };
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
                    weigh::<S, T, 6>(sums, factors, weights, 0..all, tile, head_dim);
                    done = 6;
                }
                3..=5 => weigh::<S, T, 3>(sums, factors, weights, 0..all, tile, head_dim),
                _ => {
                    weigh::<S, T, 1>(sums, factors, weights, 0..all, tile, head_dim);
                    done = 1;
                }
            }
            for i in 1..done {
                if visible(row + i) > all {
                    let (sums, weights) = (sums.add(i * len), weights.add(i * SPAN));
                    weigh::<S, T, 1>(sums, [1.0].as_ptr(), weights, all..visible(row + i), tile, head_dim);
                }
            }
            row += done;
        }
    }
}

/// Turns a row's scores into weights against the new running maximum; gives the factor for what was summed before.
#[inline(always)]
unsafe fn soften<S: Simd>(
    scores: &mut [f32],
    visible: usize,
    scales: Option<(&[f32], &[f32])>,
    (maximum, total): (&mut f32, &mut f32),
) -> f32 {
    // SAFETY: the caller gives SPAN scores, and as many scales.
    unsafe {
        if let Some((keys, _)) = scales {
            times::<S>(scores, keys);
        }
        scores[visible..].fill(f32::NEG_INFINITY);
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
        if let Some((_, values)) = scales {
            times::<S>(scores, values);
        }
        factor
    }
}

/// `sums * factor + weights * values` of M rows, position by position.
#[inline(always)]
unsafe fn weigh<S: Simd, T: Tile, const M: usize>(
    sums: *mut f32,
    factors: *const f32,
    weights: *const f32,
    positions: Range<usize>,
    tile: T,
    head_dim: usize,
) {
    let dim = head_dim.next_multiple_of(LANES);
    assert!(positions.end <= SPAN);
    let mut d = 0;
    // SAFETY: the caller gives M rows of partial results, factors and weights.
    unsafe {
        while d < dim {
            let positions = positions.clone();
            if d + 4 * LANES <= dim && S::TILE == 12 {
                columns::<S, T, M, 4>(sums, factors, weights, positions, tile, (d, dim));
                d += 4 * LANES;
            } else if d + 2 * LANES <= dim {
                columns::<S, T, M, 2>(sums, factors, weights, positions, tile, (d, dim));
                d += 2 * LANES;
            } else {
                columns::<S, T, M, 1>(sums, factors, weights, positions, tile, (d, dim));
                d += LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn columns<S: Simd, T: Tile, const M: usize, const N: usize>(
    sums: *mut f32,
    factors: *const f32,
    weights: *const f32,
    positions: Range<usize>,
    tile: T,
    (d, dim): (usize, usize),
) {
    let len = dim + LANES;
    // SAFETY: as `weigh`.
    unsafe {
        let sums = sums.add(d);
        let mut acc = [[S::splat(0.0); N]; M];
        for (m, acc) in acc.iter_mut().enumerate() {
            let factor = S::splat(*factors.add(m));
            for (n, acc) in acc.iter_mut().enumerate() {
                *acc = S::mul(S::load(sums.add(m * len + n * LANES)), factor);
            }
        }
        for t in positions {
            if d == 0 {
                tile.ahead_of_keys::<S>(t);
            }
            let mut value = [S::splat(0.0); N];
            for (n, value) in value.iter_mut().enumerate() {
                *value = tile.value::<S>(t, d + n * LANES);
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
