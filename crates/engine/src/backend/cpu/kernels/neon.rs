//! Lanes of AArch64: four 128-bit registers.

#![allow(unsafe_code)]
// The trait's contract (the instructions exist, the pointers are valid for sixteen elements) is what every block needs.
#![allow(clippy::undocumented_unsafe_blocks)]

use super::LANES;
use super::int8::Dot;
use super::portable::Portable;
use super::simd::Simd;
use std::arch::aarch64::*;

/// NEON: every AArch64 machine has it.
#[derive(Clone, Copy)]
pub(super) struct Neon;

/// Sixteen lanes in four registers.
type Quad = [float32x4_t; 4];

#[inline(always)]
fn each(f: impl Fn(usize) -> float32x4_t) -> Quad {
    [f(0), f(1), f(2), f(3)]
}

#[inline(always)]
unsafe fn from_array(lanes: [f32; LANES]) -> Quad {
    each(|i| unsafe { vld1q_f32(lanes.as_ptr().add(4 * i)) })
}

impl Simd for Neon {
    type V = Quad;
    const TILE: usize = 6;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        each(|_| unsafe { vdupq_n_f32(x) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        each(|i| unsafe { vld1q_f32(from.add(4 * i)) })
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        for (i, part) in v.into_iter().enumerate() {
            unsafe { vst1q_f32(to.add(4 * i), part) };
        }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each(|i| unsafe { vfmaq_f32(c[i], a[i], b[i]) })
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        each(|i| unsafe { vaddq_f32(a[i], b[i]) })
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        each(|i| unsafe { vsubq_f32(a[i], b[i]) })
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        each(|i| unsafe { vmulq_f32(a[i], b[i]) })
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        each(|i| unsafe { vdivq_f32(a[i], b[i]) })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        each(|i| unsafe { vminq_f32(a[i], b[i]) })
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        each(|i| unsafe { vmaxq_f32(a[i], b[i]) })
    }
    #[inline(always)]
    unsafe fn add_exponent(v: Self::V, n: Self::V) -> Self::V {
        each(|i| unsafe {
            let shift = vshlq_n_u32::<23>(vreinterpretq_u32_f32(n[i]));
            vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(v[i]), shift))
        })
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::V {
        unsafe { from_array(Portable::load_f16(from)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self::V {
        unsafe { from_array(Portable::load_bf16(from)) }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::V {
        unsafe {
            let raw = vld1q_s8(from.cast());
            let (low, high) = (vmovl_s8(vget_low_s8(raw)), vmovl_high_s8(raw));
            let words = [
                vmovl_s16(vget_low_s16(low)),
                vmovl_high_s16(low),
                vmovl_s16(vget_low_s16(high)),
                vmovl_high_s16(high),
            ];
            each(|i| vcvtq_f32_s32(words[i]))
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8, shift: u32) -> Self::V {
        unsafe { from_array(Portable::load_bytes(from, shift)) }
    }
    #[inline(always)]
    unsafe fn load_nibbles(from: *const u8, shift: u32) -> Self::V {
        unsafe { from_array(Portable::load_nibbles(from, shift)) }
    }
}

/// Four rows of four bytes in each register.
impl Dot for Neon {
    type W = [int8x16_t; 4];
    const INT_TILE: usize = 4;

    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> [Self::W; 8] {
        let load = |i: usize| unsafe { vld1q_u8(from.add(16 * i)) };
        let low = |i| unsafe { vreinterpretq_s8_u8(vandq_u8(load(i), vdupq_n_u8(15))) };
        let high = |i| unsafe { vreinterpretq_s8_u8(vshrq_n_u8::<4>(load(i))) };
        let mut out = [[unsafe { vdupq_n_s8(0) }; 4]; 8];
        for i in 0..16 {
            out[i / 4][i % 4] = low(i);
            out[4 + i / 4][i % 4] = high(i);
        }
        out
    }
    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> [Self::W; 8] {
        let mut out = [[unsafe { vdupq_n_s8(0) }; 4]; 8];
        for i in 0..32 {
            out[i / 4][i % 4] = unsafe { vld1q_s8(from.add(16 * i).cast()) };
        }
        out
    }
    #[inline(always)]
    unsafe fn dot_nibbles(w: &[Self::W; 8], x: *const u32) -> Quad {
        unsafe { Self::dot_bytes(w, x, 0) }
    }
    #[inline(always)]
    unsafe fn dot_bytes(w: &[Self::W; 8], x: *const u32, _start: i32) -> Quad {
        unsafe {
            let mut sums = [vdupq_n_s32(0); 4];
            for (i, w) in w.iter().enumerate() {
                let x = vreinterpretq_s8_u32(vdupq_n_u32(*x.add(i)));
                for (sum, w) in sums.iter_mut().zip(w) {
                    // Two products of at most 128 * 127 fit 16 bits.
                    let low = vmull_s8(vget_low_s8(*w), vget_low_s8(x));
                    let high = vmull_high_s8(*w, x);
                    *sum = vpadalq_s16(*sum, vpaddq_s16(low, high));
                }
            }
            each(|i| vcvtq_f32_s32(sums[i]))
        }
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, v: Quad) {
        let mut lanes = [0.0f32; LANES];
        unsafe {
            Self::store(lanes.as_mut_ptr(), v);
            to.cast::<[i8; LANES]>().write(lanes.map(|x| x.round_ties_even() as i8));
        }
    }
}
