//! Plain Rust lanes: the path for machines without any of the others, and the tests' witness.

#![allow(unsafe_code)]

use super::LANES;
use super::simd::Simd;
use half::{bf16, f16};

/// The path's name.
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[inline(always)]
fn lanes(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for (i, lane) in out.iter_mut().enumerate() {
        *lane = f(i);
    }
    out
}

#[inline(always)]
unsafe fn bytes<const N: usize>(from: *const u8) -> [u8; N] {
    // SAFETY: the caller gives N readable bytes; a byte array has no alignment.
    unsafe { from.cast::<[u8; N]>().read() }
}

impl Simd for Portable {
    type V = [f32; LANES];
    const TILE: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the caller gives sixteen readable elements.
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        // SAFETY: the caller gives sixteen writable elements.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn add_exponent(v: Self::V, n: Self::V) -> Self::V {
        lanes(|i| f32::from_bits(v[i].to_bits().wrapping_add(n[i].to_bits() << 23)))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::V {
        // SAFETY: the caller gives 32 readable bytes.
        let raw: [u8; 32] = unsafe { bytes(from) };
        lanes(|i| f16::from_le_bytes([raw[2 * i], raw[2 * i + 1]]).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self::V {
        // SAFETY: the caller gives 32 readable bytes.
        let raw: [u8; 32] = unsafe { bytes(from) };
        lanes(|i| bf16::from_le_bytes([raw[2 * i], raw[2 * i + 1]]).to_f32())
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::V {
        // SAFETY: the caller gives sixteen readable bytes.
        let raw: [u8; LANES] = unsafe { bytes(from) };
        lanes(|i| f32::from(raw[i].cast_signed()))
    }
    #[inline(always)]
    unsafe fn load_low_nibbles(from: *const u8) -> Self::V {
        // SAFETY: the caller gives sixteen readable bytes.
        let raw: [u8; LANES] = unsafe { bytes(from) };
        lanes(|i| f32::from(raw[i] & 15))
    }
    #[inline(always)]
    unsafe fn load_high_nibbles(from: *const u8) -> Self::V {
        // SAFETY: the caller gives sixteen readable bytes.
        let raw: [u8; LANES] = unsafe { bytes(from) };
        lanes(|i| f32::from(raw[i] >> 4))
    }
}
