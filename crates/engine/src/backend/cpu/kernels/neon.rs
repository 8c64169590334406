//! Lanes of AArch64: four 128-bit registers.

#![allow(unsafe_code)]
// The trait's contract (the instructions exist, the pointers are valid for sixteen elements) is what every block needs.
#![allow(clippy::undocumented_unsafe_blocks)]

use super::LANES;
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

#[inline(always)]
unsafe fn widen(bytes: uint8x16_t) -> Quad {
    unsafe {
        let low = vmovl_u8(vget_low_u8(bytes));
        let high = vmovl_u8(vget_high_u8(bytes));
        [
            vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
            vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
            vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
            vcvtq_f32_u32(vmovl_u16(vget_high_u16(high))),
        ]
    }
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
        unsafe { from_array(Portable::load_i8(from)) }
    }
    #[inline(always)]
    unsafe fn load_low_nibbles(from: *const u8) -> Self::V {
        unsafe { widen(vandq_u8(vld1q_u8(from), vdupq_n_u8(15))) }
    }
    #[inline(always)]
    unsafe fn load_high_nibbles(from: *const u8) -> Self::V {
        unsafe { widen(vshrq_n_u8::<4>(vld1q_u8(from))) }
    }
}
