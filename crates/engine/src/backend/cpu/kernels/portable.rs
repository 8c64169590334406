//! Plain Rust lanes: the path for machines without any of the others, and the tests' witness.

#![allow(unsafe_code)]

use super::LANES;
use super::int8::Dot;
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
        // SAFETY: the caller gives 16 readable bytes.
        let raw: [u8; LANES] = unsafe { bytes(from) };
        lanes(|i| f32::from(raw[i].cast_signed()))
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8, shift: u32) -> Self::V {
        // SAFETY: the caller gives 64 readable bytes.
        let raw: [u8; 4 * LANES] = unsafe { bytes(from) };
        lanes(|i| f32::from(raw[4 * i + shift as usize / 8].cast_signed()))
    }
    #[inline(always)]
    unsafe fn load_nibbles(from: *const u8, shift: u32) -> Self::V {
        // SAFETY: the caller gives 64 readable bytes.
        let raw: [u8; 4 * LANES] = unsafe { bytes(from) };
        lanes(|i| f32::from(raw[4 * i + shift as usize / 8] >> (shift % 8) & 15))
    }
}

impl Dot for Portable {
    type W = [u8; 4 * LANES];
    const INT_TILE: usize = 4;

    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> [Self::W; 8] {
        let mut out = [[0; 4 * LANES]; 8];
        for i in 0..4 {
            // SAFETY: the caller gives 256 readable bytes.
            let raw: Self::W = unsafe { bytes(from.add(i * 4 * LANES)) };
            out[i] = raw.map(|byte| byte & 15);
            out[i + 4] = raw.map(|byte| byte >> 4);
        }
        out
    }
    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> [Self::W; 8] {
        let mut out = [[0; 4 * LANES]; 8];
        for (i, out) in out.iter_mut().enumerate() {
            // SAFETY: the caller gives 512 readable bytes.
            *out = unsafe { bytes(from.add(i * 4 * LANES)) };
        }
        out
    }
    #[inline(always)]
    unsafe fn dot_nibbles(w: &[Self::W; 8], x: *const u32) -> Self::V {
        // SAFETY: the caller's promise; a nibble is the same as a signed byte.
        unsafe { Self::dot_bytes(w, x, 0) }
    }
    #[inline(always)]
    unsafe fn dot_bytes(w: &[Self::W; 8], x: *const u32, _start: i32) -> Self::V {
        let mut sums = [0i32; LANES];
        for (i, w) in w.iter().enumerate() {
            // SAFETY: the caller gives eight readable words.
            let x = unsafe { *x.add(i) }.to_le_bytes().map(|x| i32::from(x.cast_signed()));
            for (sum, w) in sums.iter_mut().zip(w.as_chunks::<4>().0) {
                for (w, x) in w.iter().zip(x) {
                    *sum += i32::from(w.cast_signed()) * x;
                }
            }
        }
        sums.map(|sum| sum as f32)
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, v: Self::V) {
        let rounded = v.map(|x| x.round_ties_even() as i8);
        // SAFETY: the caller gives sixteen writable bytes.
        unsafe { to.cast::<[i8; LANES]>().write(rounded) }
    }
}
