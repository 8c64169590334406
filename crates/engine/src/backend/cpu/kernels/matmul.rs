//! The matrix product: panels of packed weights by tiles of packed activations.
//!
//! Output `(token, row)` is one chain of fused multiply-adds over the inner dimension in ascending order, starting at 0.
//! Few tokens: weights are decoded in registers. Many: a group of panels is decoded once into `scratch`, then used for
//! every tile. Both give the same weights to the same chain.

#![allow(unsafe_code)]

use super::LANES;
use super::format::{Bf16, Decode, F16, F32, Format, Q40, Q41, Q80};
use super::simd::Simd;

/// Some panels of one matrix by all tokens.
pub(in crate::backend::cpu) struct MatmulUnit<'a> {
    /// How the panels are encoded.
    pub format: Format,
    /// Length of the inner dimension.
    pub inner: usize,
    /// Whole panels, one after another.
    pub panels: &'a [u8],
    /// Tokens.
    pub tokens: usize,
    /// Activations: tiles of `tile` tokens (the last one narrower, see [`width`]), each `(inner, width)`.
    pub x: &'a [f32],
    /// `(panels, tokens, LANES)`, overwritten.
    pub out: &'a mut [f32],
    /// Room for the decoded panels; grown as needed.
    pub scratch: &'a mut Vec<f32>,
}

/// Tokens that a tile of `tokens` is padded to.
pub(super) const fn width(tokens: usize) -> usize {
    match tokens {
        0..=1 => 1,
        2 => 2,
        3..=4 => 4,
        5..=6 => 6,
        7..=8 => 8,
        _ => 12,
    }
}

/// Length of `x` for that many tokens.
pub(super) const fn packed_len(tile: usize, tokens: usize, inner: usize) -> usize {
    let rest = tokens % tile;
    let padded = if rest == 0 { 0 } else { width(rest) };
    (tokens / tile * tile + padded) * inner
}

/// Runs one unit.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn run<S: Simd>(unit: &mut MatmulUnit<'_>) {
    // SAFETY: the caller's promise; each checks its lengths.
    unsafe {
        match unit.format {
            Format::F32 => run_as::<S, F32>(unit),
            Format::F16 => run_as::<S, F16>(unit),
            Format::Bf16 => run_as::<S, Bf16>(unit),
            Format::Q8_0 => run_as::<S, Q80>(unit),
            Format::Q4_0 => run_as::<S, Q40>(unit),
            Format::Q4_1 => run_as::<S, Q41>(unit),
        }
    }
}

#[inline(always)]
unsafe fn run_as<S: Simd, D: Decode>(unit: &mut MatmulUnit<'_>) {
    let step = D::LOW + D::HIGH;
    assert!(unit.inner.is_multiple_of(step) && unit.tokens > 0);
    let panel_bytes = unit.inner / step * D::BYTES;
    let panels = unit.panels.len() / panel_bytes.max(1);
    assert!(unit.panels.len() == panels * panel_bytes);
    assert!(unit.x.len() == packed_len(S::TILE, unit.tokens, unit.inner));
    assert!(unit.out.len() == panels * unit.tokens * LANES);
    // SAFETY: the lengths above are what the functions below index by.
    unsafe {
        if unit.tokens > S::TILE {
            decoded::<S, D>(unit, panels, panel_bytes);
            return;
        }
        match width(unit.tokens) {
            1 => fused::<S, D, 4, 1>(unit, panels, panel_bytes),
            2 => fused::<S, D, 2, 2>(unit, panels, panel_bytes),
            4 => fused::<S, D, 1, 4>(unit, panels, panel_bytes),
            6 => fused::<S, D, 1, 6>(unit, panels, panel_bytes),
            8 => fused::<S, D, 1, 8>(unit, panels, panel_bytes),
            _ => fused::<S, D, 1, 12>(unit, panels, panel_bytes),
        }
    }
}

/// One tile of tokens: weights decoded in registers, `P` panels side by side to have enough independent chains.
#[inline(always)]
unsafe fn fused<S: Simd, D: Decode, const P: usize, const M: usize>(
    unit: &mut MatmulUnit<'_>,
    panels: usize,
    panel_bytes: usize,
) {
    let mut panel = 0;
    // SAFETY: `panel` counts whole panels of `unit.panels`; `chains` and `put` stay within theirs.
    unsafe {
        while panel + P <= panels {
            let from = unit.panels.as_ptr().add(panel * panel_bytes);
            let acc = chains::<S, D, P, M>(from, panel_bytes, unit.inner, unit.x.as_ptr());
            for (p, rows) in acc.iter().enumerate() {
                put::<S, M>(unit.out, (panel + p) * unit.tokens, unit.tokens, rows);
            }
            panel += P;
        }
        while panel < panels {
            let from = unit.panels.as_ptr().add(panel * panel_bytes);
            let acc = chains::<S, D, 1, M>(from, panel_bytes, unit.inner, unit.x.as_ptr());
            put::<S, M>(unit.out, panel * unit.tokens, unit.tokens, &acc[0]);
            panel += 1;
        }
    }
}

#[inline(always)]
unsafe fn chains<S: Simd, D: Decode, const P: usize, const M: usize>(
    panel: *const u8,
    panel_bytes: usize,
    inner: usize,
    mut x: *const f32,
) -> [[S::V; M]; P] {
    // SAFETY: `inner` is a whole number of blocks; `x` holds `inner` rows of `M`; panels lie `panel_bytes` apart.
    unsafe {
        let mut acc = [[S::splat(0.0); M]; P];
        for block in 0..inner / (D::LOW + D::HIGH) {
            let mut at = [panel; P];
            let mut shared = [(S::splat(0.0), S::splat(0.0)); P];
            for p in 0..P {
                at[p] = panel.add(p * panel_bytes + block * D::BYTES);
                shared[p] = D::shared::<S>(at[p]);
            }
            for i in 0..D::LOW {
                for p in 0..P {
                    let w = D::low::<S>(at[p], shared[p], i);
                    for (m, acc) in acc[p].iter_mut().enumerate() {
                        *acc = S::fma(w, S::splat(*x.add(m)), *acc);
                    }
                }
                x = x.add(M);
            }
            for i in 0..D::HIGH {
                for p in 0..P {
                    let w = D::high::<S>(at[p], shared[p], i);
                    for (m, acc) in acc[p].iter_mut().enumerate() {
                        *acc = S::fma(w, S::splat(*x.add(m)), *acc);
                    }
                }
                x = x.add(M);
            }
        }
        acc
    }
}

/// Stores the first `tokens` rows of accumulators at `out[(row..row + tokens) * LANES]`.
#[inline(always)]
unsafe fn put<S: Simd, const M: usize>(out: &mut [f32], row: usize, tokens: usize, acc: &[S::V; M]) {
    debug_assert!(tokens <= M);
    for (m, v) in acc.iter().enumerate().take(tokens) {
        let to = &mut out[(row + m) * LANES..(row + m + 1) * LANES];
        // SAFETY: the slice has LANES elements.
        unsafe { S::store(to.as_mut_ptr(), *v) };
    }
}

/// Many tiles of tokens: decode every panel of the unit once, then go tile by tile.
#[inline(always)]
unsafe fn decoded<S: Simd, D: Decode>(unit: &mut MatmulUnit<'_>, panels: usize, panel_bytes: usize) {
    let panel_len = unit.inner * LANES;
    let need = panels * panel_len + LANES;
    if unit.scratch.len() < need {
        unit.scratch.resize(need, 0.0);
    }
    let skip = unit.scratch.as_ptr().align_offset(64).min(LANES);
    let scratch = &mut unit.scratch[skip..skip + panels * panel_len];
    // SAFETY: `scratch` has a decoded panel's length for each panel; tiles are cut as `packed_len` says.
    unsafe {
        for panel in 0..panels {
            let to = scratch.as_mut_ptr().add(panel * panel_len);
            decode_panel::<S, D>(unit.panels.as_ptr().add(panel * panel_bytes), unit.inner, to);
        }
        let mut first = 0;
        while first < unit.tokens {
            let tokens = S::TILE.min(unit.tokens - first);
            let x = unit.x.as_ptr().add(first * unit.inner);
            for panel in 0..panels {
                let w = scratch.as_ptr().add(panel * panel_len);
                let row = panel * unit.tokens + first;
                match width(tokens) {
                    1 => tile::<S, 1>(unit.out, row, tokens, w, x, unit.inner),
                    2 => tile::<S, 2>(unit.out, row, tokens, w, x, unit.inner),
                    4 => tile::<S, 4>(unit.out, row, tokens, w, x, unit.inner),
                    6 => tile::<S, 6>(unit.out, row, tokens, w, x, unit.inner),
                    8 => tile::<S, 8>(unit.out, row, tokens, w, x, unit.inner),
                    _ => tile::<S, 12>(unit.out, row, tokens, w, x, unit.inner),
                }
            }
            first += tokens;
        }
    }
}

#[inline(always)]
unsafe fn decode_panel<S: Simd, D: Decode>(panel: *const u8, inner: usize, mut to: *mut f32) {
    // SAFETY: `inner` is a whole number of blocks; `to` has room for `inner * LANES` elements.
    unsafe {
        for block in 0..inner / (D::LOW + D::HIGH) {
            let at = panel.add(block * D::BYTES);
            let shared = D::shared::<S>(at);
            for i in 0..D::LOW {
                S::store(to, D::low::<S>(at, shared, i));
                to = to.add(LANES);
            }
            for i in 0..D::HIGH {
                S::store(to, D::high::<S>(at, shared, i));
                to = to.add(LANES);
            }
        }
    }
}

/// One decoded panel by one tile: stores `(tokens, LANES)` at row `row` of `out`.
#[inline(always)]
unsafe fn tile<S: Simd, const M: usize>(
    out: &mut [f32],
    row: usize,
    tokens: usize,
    w: *const f32,
    x: *const f32,
    inner: usize,
) {
    // SAFETY: `w` holds `(inner, LANES)`, `x` holds `(inner, M)`.
    unsafe {
        let mut acc = [S::splat(0.0); M];
        for k in 0..inner {
            let w = S::load(w.add(k * LANES));
            for (m, acc) in acc.iter_mut().enumerate() {
                *acc = S::fma(w, S::splat(*x.add(k * M + m)), *acc);
            }
        }
        put::<S, M>(out, row, tokens, &acc);
    }
}
