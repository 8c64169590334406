//! Sixteen f32 lanes, whatever the registers are: the operations that the kernels are written in.

#![allow(unsafe_code)]

use super::LANES;

/// Sixteen lanes of f32.
///
/// # Safety
/// Every function may be called only where the implementing path's instructions exist (see `Isa::is_available`), from
/// code compiled with them enabled; pointers must be valid for the sixteen elements that are read or written.
pub(super) trait Simd: Copy + 'static {
    /// The lanes.
    type V: Copy;
    /// Tokens of a full tile: as many accumulators as the registers hold.
    const TILE: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    /// `a * b + c`; fused where the path has it, and then always.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Adds the low bits of `n` to the exponents of `v`: multiplies by `2^n`, where `n` is an integer plus 1.5 * 2^23.
    unsafe fn add_exponent(v: Self::V, n: Self::V) -> Self::V;
    unsafe fn load_f16(from: *const u8) -> Self::V;
    unsafe fn load_bf16(from: *const u8) -> Self::V;
    /// Sixteen signed bytes.
    unsafe fn load_i8(from: *const u8) -> Self::V;
    /// Of each of sixteen words of 32 bits, the signed byte from bit `shift` on.
    unsafe fn load_bytes(from: *const u8, shift: u32) -> Self::V;
    /// Of each of sixteen words of 32 bits, the four bits from bit `shift` on.
    unsafe fn load_nibbles(from: *const u8, shift: u32) -> Self::V;

    /// Asks for the cache line at `at`, which may be any address.
    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}

    /// `e^x`, within 2 ulp for -87..=88, clamped outside. Polynomial: Cephes `expf`.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        // SAFETY: the caller's promise covers every operation.
        unsafe {
            let magic = Self::splat(12_582_912.0);
            let x = Self::min(Self::max(x, Self::splat(-87.0)), Self::splat(88.0));
            let shifted = Self::fma(x, Self::splat(std::f32::consts::LOG2_E), magic);
            let n = Self::sub(shifted, magic);
            let r = Self::fma(n, Self::splat(-0.693_359_4), x);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.987_569_1e-4);
            for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = Self::fma(p, r, Self::splat(c));
            }
            let p = Self::fma(p, Self::mul(r, r), r);
            Self::add_exponent(Self::add(p, Self::splat(1.0)), shifted)
        }
    }
}

/// Sixteen lanes to one, by halves.
#[inline(always)]
pub(super) fn fold(lanes: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = [0.0; LANES / 2];
    for (i, out) in half.iter_mut().enumerate() {
        *out = f(lanes[i], lanes[i + LANES / 2]);
    }
    for width in [4, 2, 1] {
        for i in 0..width {
            half[i] = f(half[i], half[i + width]);
        }
    }
    half[0]
}
