//! Keys and values of a context tile: as they are stored, or turned into f32 where many rows use them.

#![allow(unsafe_code)]

use super::LANES;
use super::attention::SPAN;
use super::simd::Simd;
use crate::backend::cpu::arena::KvLayer;
use baton_types::{KvDtype, KvGeometry, KvPart};
use half::{bf16, f16};
use std::marker::PhantomData;

/// Groups of sixteen positions in a context tile.
pub(super) const GROUPS: usize = SPAN / LANES;

/// Keys and values of one context tile, in f32 without their scales.
///
/// # Safety
/// As [`Simd`].
pub(super) trait Tile: Copy {
    /// Element `dim` of the keys of sixteen positions.
    unsafe fn key<S: Simd>(&self, dim: usize, group: usize) -> S::V;
    /// Sixteen elements from `dim` on of the value at `position`.
    unsafe fn value<S: Simd>(&self, position: usize, dim: usize) -> S::V;
    /// Called once for each element while scores of `group` are computed: the time to ask for values.
    unsafe fn ahead_of_values<S: Simd>(&self, dim: usize, group: usize);
    /// Called once for each position while values are summed: the time to ask for the next tile's keys.
    unsafe fn ahead_of_keys<S: Simd>(&self, position: usize);
}

/// An element type that has sixteen lanes loaded at once.
pub(super) trait Element: Copy {
    /// Bytes.
    const BYTES: usize;
    unsafe fn load<S: Simd>(from: *const u8) -> S::V;
}

/// f16, and eight bits without their scale.
#[derive(Clone, Copy)]
pub(super) struct Half;
#[derive(Clone, Copy)]
pub(super) struct Eight;

impl Element for Half {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_f16(from) }
    }
}

impl Element for Eight {
    const BYTES: usize = 1;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_i8(from) }
    }
}

/// A tile where it lies in the arena. For whole groups: blocks of a multiple of sixteen tokens, heads of as many elements.
#[derive(Clone, Copy)]
pub(super) struct InPlace<E> {
    /// First key of each group; groups beyond the context repeat the last.
    keys: [*const u8; GROUPS],
    /// First value of each group.
    values: [*const u8; GROUPS],
    /// First key of each group of the next tile, to be asked for.
    next: [*const u8; GROUPS],
    /// Bytes between two elements of a key.
    key_step: usize,
    /// Bytes of a value.
    value_step: usize,
    element: PhantomData<E>,
}

/// Whether attention can read this layout where it lies.
pub(super) fn in_place(geometry: &KvGeometry) -> bool {
    let aligned = [geometry.block_tokens, geometry.head_dim].map(|n| (n as usize).is_multiple_of(LANES));
    aligned == [true, true]
}

impl<E: Element> InPlace<E> {
    /// The tile at that place.
    #[inline(always)]
    pub(super) fn new(kv: &KvLayer<'_>, at: Where) -> Self {
        let geometry = kv.geometry();
        let Where {
            head,
            context,
            positions,
            end,
        } = at;
        let group = |part, group: usize| {
            let last = (positions - 1) / LANES;
            let (lane, slot) = kv.lane(part, head, context + group.min(last) * LANES);
            lane.as_ptr()
                .wrapping_add(geometry.element_at(part, slot, 0))
                .cast_const()
        };
        let next = |group: usize| {
            let position = context + SPAN + group * LANES;
            if position < end {
                let (lane, slot) = kv.lane(KvPart::Key, head, position);
                lane.as_ptr()
                    .wrapping_add(geometry.element_at(KvPart::Key, slot, 0))
                    .cast_const()
            } else {
                std::ptr::null()
            }
        };
        Self {
            keys: std::array::from_fn(|i| group(KvPart::Key, i)),
            values: std::array::from_fn(|i| group(KvPart::Value, i)),
            next: std::array::from_fn(next),
            key_step: geometry.element_at(KvPart::Key, 0, 1),
            value_step: geometry.element_at(KvPart::Value, 1, 0),
            element: PhantomData,
        }
    }
}

/// Bytes that the machine fetches at once.
const LINE: usize = 64;

impl<E: Element> Tile for InPlace<E> {
    #[inline(always)]
    unsafe fn key<S: Simd>(&self, dim: usize, group: usize) -> S::V {
        // SAFETY: sixteen positions lie side by side in a lane; the caller's promise.
        unsafe { E::load::<S>(self.keys[group].add(dim * self.key_step)) }
    }

    #[inline(always)]
    unsafe fn value<S: Simd>(&self, position: usize, dim: usize) -> S::V {
        // SAFETY: the positions of a group follow each other in a lane; the caller's promise.
        unsafe {
            let row = self.values[position / LANES].add(position % LANES * self.value_step);
            E::load::<S>(row.add(dim * E::BYTES))
        }
    }

    #[inline(always)]
    unsafe fn ahead_of_values<S: Simd>(&self, dim: usize, group: usize) {
        let each = LINE / (LANES * E::BYTES);
        if dim.is_multiple_of(each) {
            // SAFETY: a hint may name any address.
            unsafe { S::prefetch(self.values[group].wrapping_add(dim / each * LINE)) };
        }
    }

    #[inline(always)]
    unsafe fn ahead_of_keys<S: Simd>(&self, position: usize) {
        // Where blocks have sixteen tokens a group's keys are as long as its values.
        let from = self.next[position / LANES];
        if self.key_step == LANES * E::BYTES && !from.is_null() {
            for at in (0..self.value_step).step_by(LINE) {
                let at = position % LANES * self.value_step + at;
                // SAFETY: a hint may name any address.
                unsafe { S::prefetch(from.wrapping_add(at)) };
            }
        }
    }
}

/// A tile that was turned into f32 once for many rows.
#[derive(Clone, Copy)]
pub(super) struct Unpacked {
    /// `(head_dim, SPAN)`.
    pub keys: *const f32,
    /// `(SPAN, dim)`.
    pub values: *const f32,
    /// Padded length of a head.
    pub dim: usize,
}

impl Tile for Unpacked {
    #[inline(always)]
    unsafe fn key<S: Simd>(&self, dim: usize, group: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load(self.keys.add(dim * SPAN + group * LANES)) }
    }

    #[inline(always)]
    unsafe fn value<S: Simd>(&self, position: usize, dim: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load(self.values.add(position * self.dim + dim)) }
    }

    #[inline(always)]
    unsafe fn ahead_of_values<S: Simd>(&self, _dim: usize, _group: usize) {}

    #[inline(always)]
    unsafe fn ahead_of_keys<S: Simd>(&self, _position: usize) {}
}

/// Which positions of which head.
#[derive(Clone, Copy)]
pub(super) struct Where {
    pub head: usize,
    /// First position of the tile.
    pub context: usize,
    /// How many it has.
    pub positions: usize,
    /// How many the sequence has.
    pub end: usize,
}

impl Where {
    /// Asks for what the next tile has in the place of sixteen positions from `first` on.
    #[inline(always)]
    unsafe fn ahead<S: Simd>(self, kv: &KvLayer<'_>, part: KvPart, first: usize) {
        let position = self.context + SPAN + first;
        if position < self.end {
            let (lane, slot) = kv.lane(part, self.head, position);
            let from = lane.as_ptr().wrapping_add(kv.geometry().element_at(part, slot, 0));
            let bytes = LANES * kv.geometry().head_dim as usize * kv.geometry().dtype.bytes();
            for at in (0..bytes).step_by(LINE) {
                // SAFETY: a hint may name any address.
                unsafe { S::prefetch(from.wrapping_add(at)) };
            }
        }
    }
}

/// Scales of keys or values of one tile, `(SPAN,)`. False where the type has none. What absent positions get is never
/// looked at.
#[inline(always)]
pub(super) unsafe fn load_scales<S: Simd>(kv: &KvLayer<'_>, part: KvPart, at: Where, out: &mut [f32]) -> bool {
    let geometry = kv.geometry();
    if geometry.dtype.scale_bytes() == 0 {
        return false;
    }
    let whole = (geometry.block_tokens as usize).is_multiple_of(LANES);
    for first in (0..at.positions).step_by(if whole { LANES } else { 1 }) {
        let (lane, slot) = kv.lane(part, at.head, at.context + first);
        let from = lane.as_ptr().wrapping_add(geometry.scale_at(slot));
        let out = &mut out[first..];
        // SAFETY: the scales of a slot, or of sixteen, lie within the lane; the caller's promise.
        unsafe {
            if whole {
                assert!(out.len() >= LANES);
                S::store(out.as_mut_ptr(), S::load_f16(from));
            } else {
                out[0] = from.cast::<f16>().read_unaligned().to_f32();
            }
        }
    }
    true
}

/// Multiplies SPAN elements by as many scales.
#[inline(always)]
pub(super) unsafe fn times<S: Simd>(elements: &mut [f32], scales: &[f32]) {
    for (elements, scales) in elements.chunks_exact_mut(LANES).zip(scales.chunks_exact(LANES)) {
        // SAFETY: sixteen elements each; the caller's promise.
        unsafe {
            let product = S::mul(S::load(elements.as_ptr()), S::load(scales.as_ptr()));
            S::store(elements.as_mut_ptr(), product);
        }
    }
}

/// Keys of one tile as f32: `(head_dim, SPAN)`. What absent positions get is never looked at.
#[inline(always)]
pub(super) unsafe fn load_keys<S: Simd>(kv: &KvLayer<'_>, at: Where, out: &mut [f32]) {
    let (geometry, head_dim) = (*kv.geometry(), kv.geometry().head_dim as usize);
    let whole = (geometry.block_tokens as usize).is_multiple_of(LANES);
    for first in (0..at.positions).step_by(if whole { LANES } else { 1 }) {
        let (lane, slot) = kv.lane(KvPart::Key, at.head, at.context + first);
        if whole {
            // SAFETY: the caller's promise.
            unsafe { at.ahead::<S>(kv, KvPart::Key, first) };
        }
        for dim in 0..head_dim {
            let from = lane.as_ptr().wrapping_add(geometry.element_at(KvPart::Key, slot, dim));
            let out = &mut out[dim * SPAN + first..];
            // SAFETY: the elements lie within the lane; the caller's promise.
            unsafe {
                if whole {
                    assert!(out.len() >= LANES);
                    S::store(out.as_mut_ptr(), sixteen::<S>(from, geometry.dtype));
                } else {
                    out[0] = element(from, geometry.dtype);
                }
            }
        }
    }
}

/// Values of one tile as f32: `(SPAN, padded head_dim)`. What absent positions get is never looked at.
#[inline(always)]
pub(super) unsafe fn load_values<S: Simd>(kv: &KvLayer<'_>, at: Where, out: &mut [f32]) {
    let (geometry, head_dim) = (*kv.geometry(), kv.geometry().head_dim as usize);
    let dim = head_dim.next_multiple_of(LANES);
    for (position, out) in out.chunks_exact_mut(dim).enumerate().take(at.positions) {
        let (lane, slot) = kv.lane(KvPart::Value, at.head, at.context + position);
        if position.is_multiple_of(LANES) {
            // SAFETY: the caller's promise.
            unsafe { at.ahead::<S>(kv, KvPart::Value, position) };
        }
        let from = |dim| {
            lane.as_ptr()
                .wrapping_add(geometry.element_at(KvPart::Value, slot, dim))
        };
        let whole = head_dim / LANES * LANES;
        for d in (0..whole).step_by(LANES) {
            // SAFETY: the elements lie within the lane; `out` has as many, and more; the caller's promise.
            unsafe { S::store(out.as_mut_ptr().add(d), sixteen::<S>(from(d), geometry.dtype)) };
        }
        for (d, out) in out.iter_mut().enumerate().skip(whole) {
            // SAFETY: as above.
            *out = if d < head_dim {
                unsafe { element(from(d), geometry.dtype) }
            } else {
                0.0
            };
        }
    }
}

/// Sixteen stored elements, without their scale.
#[inline(always)]
unsafe fn sixteen<S: Simd>(from: *const u8, dtype: KvDtype) -> S::V {
    // SAFETY: the caller gives sixteen elements of `dtype`.
    unsafe {
        match dtype {
            KvDtype::F16 => S::load_f16(from),
            KvDtype::Bf16 => S::load_bf16(from),
            KvDtype::F32 => S::load(from.cast()),
            KvDtype::Q8 => S::load_i8(from),
        }
    }
}

/// One stored element, without its scale.
#[inline(always)]
unsafe fn element(from: *const u8, dtype: KvDtype) -> f32 {
    // SAFETY: the caller gives an element of `dtype`.
    unsafe {
        match dtype {
            KvDtype::F16 => from.cast::<f16>().read_unaligned().to_f32(),
            KvDtype::Bf16 => from.cast::<bf16>().read_unaligned().to_f32(),
            KvDtype::F32 => from.cast::<f32>().read_unaligned(),
            KvDtype::Q8 => f32::from(from.cast::<i8>().read()),
        }
    }
}
