//! Integer products of x86-64: VNNI on 512 bits, or AVX2's pairs of bytes.

#![allow(unsafe_code)]
// The trait's contract (the instructions exist, the pointers are valid) is what every block needs.
#![allow(clippy::undocumented_unsafe_blocks)]

use super::int8::Dot;
use super::x86::{Avx2, Avx512, Pair};
use std::arch::x86_64::*;

/// VNNI multiplies unsigned by signed bytes: signed weights are taken plus 128, and sums begin with what that adds.
impl Dot for Avx512 {
    type W = __m512i;
    const INT_TILE: usize = 12;

    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> [__m512i; 8] {
        unsafe {
            let mask = _mm512_set1_epi8(15);
            let load = |i: usize| _mm512_loadu_si512(from.add(64 * i).cast());
            let low = |i: usize| _mm512_and_si512(load(i), mask);
            let high = |i| _mm512_and_si512(_mm512_srli_epi16::<4>(load(i)), mask);
            [low(0), low(1), low(2), low(3), high(0), high(1), high(2), high(3)]
        }
    }
    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> [__m512i; 8] {
        unsafe {
            let flip = _mm512_set1_epi8(-128);
            let load = |i: usize| _mm512_xor_si512(_mm512_loadu_si512(from.add(64 * i).cast()), flip);
            [load(0), load(1), load(2), load(3), load(4), load(5), load(6), load(7)]
        }
    }
    #[inline(always)]
    unsafe fn dot_nibbles(w: &[__m512i; 8], x: *const u32) -> __m512 {
        unsafe { vnni(w, x, _mm512_setzero_si512()) }
    }
    #[inline(always)]
    unsafe fn dot_bytes(w: &[__m512i; 8], x: *const u32, start: i32) -> __m512 {
        unsafe { vnni(w, x, _mm512_set1_epi32(start)) }
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, v: __m512) {
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))) }
    }
}

#[inline(always)]
unsafe fn vnni(w: &[__m512i; 8], x: *const u32, start: __m512i) -> __m512 {
    unsafe {
        let mut sums = start;
        for (i, w) in w.iter().enumerate() {
            sums = _mm512_dpbusd_epi32(sums, *w, _mm512_set1_epi32((*x.add(i)).cast_signed()));
        }
        _mm512_cvtepi32_ps(sums)
    }
}

impl Dot for Avx2 {
    type W = (__m256i, __m256i);
    const INT_TILE: usize = 4;

    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> [Self::W; 8] {
        unsafe {
            let mask = _mm256_set1_epi8(15);
            let load = |i: usize| _mm256_loadu_si256(from.add(32 * i).cast());
            let low = |i: usize| {
                (
                    _mm256_and_si256(load(2 * i), mask),
                    _mm256_and_si256(load(2 * i + 1), mask),
                )
            };
            let shifted = |i| _mm256_and_si256(_mm256_srli_epi16::<4>(load(i)), mask);
            let high = |i: usize| (shifted(2 * i), shifted(2 * i + 1));
            [low(0), low(1), low(2), low(3), high(0), high(1), high(2), high(3)]
        }
    }
    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> [Self::W; 8] {
        unsafe {
            let load = |i: usize| _mm256_loadu_si256(from.add(32 * i).cast());
            let both = |i: usize| (load(2 * i), load(2 * i + 1));
            [both(0), both(1), both(2), both(3), both(4), both(5), both(6), both(7)]
        }
    }
    #[inline(always)]
    unsafe fn dot_nibbles(w: &[Self::W; 8], x: *const u32) -> Pair {
        unsafe {
            // Eight sums of two products of at most 15 * 127 fit 16 bits.
            let mut sums = (_mm256_setzero_si256(), _mm256_setzero_si256());
            for (i, w) in w.iter().enumerate() {
                let x = _mm256_set1_epi32((*x.add(i)).cast_signed());
                sums.0 = _mm256_add_epi16(sums.0, _mm256_maddubs_epi16(w.0, x));
                sums.1 = _mm256_add_epi16(sums.1, _mm256_maddubs_epi16(w.1, x));
            }
            let wide = |sums| _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
            Pair(wide(sums.0), wide(sums.1))
        }
    }
    #[inline(always)]
    unsafe fn dot_bytes(w: &[Self::W; 8], x: *const u32, _start: i32) -> Pair {
        unsafe {
            // The sign goes from the weight to the other factor; two products of at most 128 * 127 fit 16 bits.
            let product = |w, x| {
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
            };
            let mut sums = (_mm256_setzero_si256(), _mm256_setzero_si256());
            for (i, w) in w.iter().enumerate() {
                let x = _mm256_set1_epi32((*x.add(i)).cast_signed());
                sums.0 = _mm256_add_epi32(sums.0, product(w.0, x));
                sums.1 = _mm256_add_epi32(sums.1, product(w.1, x));
            }
            Pair(_mm256_cvtepi32_ps(sums.0), _mm256_cvtepi32_ps(sums.1))
        }
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, v: Pair) {
        unsafe {
            // Packing works within halves of 128 bits: after it, 64-bit parts 0, 2, 1, 3 are in order.
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.0), _mm256_cvtps_epi32(v.1));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(to.cast(), bytes);
        }
    }
}
