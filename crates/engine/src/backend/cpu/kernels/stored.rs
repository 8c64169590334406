//! Keys and values of a context tile as they are stored, turned into f32 for attention.

#![allow(unsafe_code)]

use super::LANES;
use super::attention::SPAN;
use super::simd::Simd;
use crate::backend::cpu::arena::{KvHead, KvPart};
use baton_types::KvDtype;
use half::{bf16, f16};

/// Addresses of the rows of sixteen positions from `context` on, of which `count` exist; the others repeat the last.
#[inline(always)]
fn sixteen(kv: &KvHead<'_>, part: KvPart, context: usize, count: usize, row_bytes: usize) -> [*const u8; LANES] {
    let mut rows = [std::ptr::null(); LANES];
    let mut done = 0;
    while done < count {
        let (from, run) = kv.rows(part, context + done);
        let run = run.min(count - done);
        for (i, row) in rows[done..done + run].iter_mut().enumerate() {
            *row = from.as_ptr().wrapping_add(i * row_bytes).cast_const();
        }
        done += run;
    }
    let last = rows[count - 1];
    rows[count..].fill(last);
    rows
}

/// Keys of one context tile as f32, turned: `(head_dim, SPAN)`. What absent positions get is never looked at.
#[inline(always)]
pub(super) unsafe fn load_keys<S: Simd>(
    kv: &KvHead<'_>,
    context: usize,
    positions: usize,
    end: usize,
    head_dim: usize,
    out: &mut [f32],
) {
    let row_bytes = head_dim * kv.dtype().bytes();
    let whole = head_dim - head_dim % (2 * LANES);
    for at in (0..positions).step_by(LANES) {
        let count = LANES.min(positions - at);
        let rows = sixteen(kv, KvPart::Key, context + at, count, row_bytes);
        // SAFETY: the caller's promise.
        unsafe { prefetch::<S>(kv, KvPart::Key, context + SPAN + at, end, row_bytes) };
        // SAFETY: `sixteen` gives addresses of whole rows inside the arena; `out` holds `(head_dim, SPAN)`.
        unsafe {
            let mut done = 0;
            if kv.dtype() == KvDtype::F16 {
                for d in (0..whole).step_by(2 * LANES) {
                    S::turn_f16(
                        rows.map(|row| row.add(2 * d)),
                        out.as_mut_ptr().add(d * SPAN + at),
                        SPAN,
                    );
                }
                done = whole;
            }
            for (t, row) in rows.iter().enumerate().take(count) {
                for d in done..head_dim {
                    out[d * SPAN + at + t] = element(*row, kv.dtype(), d);
                }
            }
        }
    }
}

/// Values of one context tile as f32: `(SPAN, padded head_dim)`. What absent positions get is never looked at.
#[inline(always)]
pub(super) unsafe fn load_values<S: Simd>(
    kv: &KvHead<'_>,
    context: usize,
    positions: usize,
    end: usize,
    head_dim: usize,
    out: &mut [f32],
) {
    let row_bytes = head_dim * kv.dtype().bytes();
    let dim = head_dim.next_multiple_of(LANES);
    for at in (0..positions).step_by(LANES) {
        let count = LANES.min(positions - at);
        let rows = sixteen(kv, KvPart::Value, context + at, count, row_bytes);
        // SAFETY: the caller's promise.
        unsafe { prefetch::<S>(kv, KvPart::Value, context + SPAN + at, end, row_bytes) };
        // SAFETY: `sixteen` gives addresses of whole rows inside the arena.
        unsafe {
            for (row, out) in rows.iter().zip(out[at * dim..].chunks_exact_mut(dim)).take(count) {
                convert::<S>(*row, kv.dtype(), head_dim, out);
            }
        }
    }
}

/// Asks for rows of the next context tile: blocks lie far apart, so the machine does not foresee them.
#[inline(always)]
unsafe fn prefetch<S: Simd>(kv: &KvHead<'_>, part: KvPart, context: usize, end: usize, row_bytes: usize) {
    if context < end {
        let (from, run) = kv.rows(part, context);
        let bytes = run.min(LANES).min(end - context) * row_bytes;
        for at in (0..bytes).step_by(64) {
            // SAFETY: the instructions exist by the caller's promise; the address is inside the arena.
            unsafe { S::prefetch(from.as_ptr().add(at)) };
        }
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
            *to = if d < head_dim { element(from, dtype, d) } else { 0.0 };
        }
    }
}

/// One stored element.
#[inline(always)]
unsafe fn element(row: *const u8, dtype: KvDtype, d: usize) -> f32 {
    // SAFETY: the caller gives a row of more than `d` elements.
    unsafe {
        match dtype {
            KvDtype::F16 => f16::from_bits(row.add(2 * d).cast::<u16>().read_unaligned()).to_f32(),
            KvDtype::Bf16 => bf16::from_bits(row.add(2 * d).cast::<u16>().read_unaligned()).to_f32(),
            KvDtype::F32 => row.add(4 * d).cast::<f32>().read_unaligned(),
        }
    }
}
