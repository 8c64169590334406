//! Chooses the instruction-set path at run time; the safe face of the kernels.

#![allow(unsafe_code)]

use super::attention::{self, AttentionUnit};
use super::int8::{self, Dot, Int8Unit};
use super::matmul::{self, MatmulUnit};
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
use super::portable::Portable;
use super::simd::Simd;
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};
use super::{Format, LANES};
use crate::backend::cpu::isa::Isa;

/// The kernels of one path. Exists only for a path that this machine runs.
#[derive(Debug, Clone, Copy)]
pub(in crate::backend::cpu) struct Kernels {
    isa: Isa,
}

/// `gate = silu(gate) * up`, where `silu(x) = x / (1 + e^-x)`. Lengths are whole lanes.
#[inline(always)]
unsafe fn silu_mul<S: Simd>(gate: &mut [f32], up: &[f32]) {
    assert!(gate.len() == up.len() && gate.len().is_multiple_of(LANES));
    for (gate, up) in gate.chunks_exact_mut(LANES).zip(up.chunks_exact(LANES)) {
        // SAFETY: both have sixteen elements; the caller's promise.
        unsafe {
            let x = S::load(gate.as_ptr());
            let e = S::exp(S::sub(S::splat(0.0), x));
            let silu = S::div(x, S::add(S::splat(1.0), e));
            S::store(gate.as_mut_ptr(), S::mul(silu, S::load(up.as_ptr())));
        }
    }
}

/// The entry points of one path, compiled with its instructions enabled.
macro_rules! path {
    ($name:ident, $simd:ty $(, $features:literal)?) => {
        mod $name {
            use super::*;

            $(#[target_feature(enable = $features)])?
            pub(super) unsafe fn matmul(unit: &mut MatmulUnit<'_>) {
                // SAFETY: the instructions are enabled here and, by the caller's promise, exist.
                unsafe { matmul::run::<$simd>(unit) }
            }

            $(#[target_feature(enable = $features)])?
            pub(super) unsafe fn int8(unit: &mut Int8Unit<'_>) {
                // SAFETY: as above.
                unsafe { int8::run::<$simd>(unit) }
            }

            $(#[target_feature(enable = $features)])?
            pub(super) unsafe fn quantise(row: &[f32], m: usize, width: usize, tile: &mut [u32]) {
                // SAFETY: as above.
                unsafe { int8::quantise::<$simd>(row, m, width, tile) }
            }

            $(#[target_feature(enable = $features)])?
            pub(super) unsafe fn attend(unit: &mut AttentionUnit<'_>) {
                // SAFETY: as above.
                unsafe { attention::run::<$simd>(unit) }
            }

            $(#[target_feature(enable = $features)])?
            pub(super) unsafe fn combine(partials: &[f32], step: usize, parts: usize, out: &mut [f32]) {
                // SAFETY: as above.
                unsafe { attention::combine::<$simd>(partials, step, parts, out) }
            }

            $(#[target_feature(enable = $features)])?
            pub(super) unsafe fn silu(gate: &mut [f32], up: &[f32]) {
                // SAFETY: as above.
                unsafe { silu_mul::<$simd>(gate, up) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
path!(avx512, Avx512, "avx512f,avx512bw,avx512vnni,avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
path!(avx2, Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "aarch64")]
path!(neon, Neon, "neon");
path!(portable, Portable);

macro_rules! dispatch {
    ($self:ident, $call:ident($($argument:expr),*)) => {
        match $self.isa {
            // SAFETY (all arms): `new` gave this value only because the machine has the instructions.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::$call($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::$call($($argument),*) },
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => unsafe { neon::$call($($argument),*) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512 | Isa::Avx2 => unreachable!("a path of another machine is never available"),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => unreachable!("a path of another machine is never available"),
            Isa::Portable => unsafe { portable::$call($($argument),*) },
        }
    };
}

impl Kernels {
    /// The kernels of `isa`, where this machine runs them.
    pub(in crate::backend::cpu) fn new(isa: Isa) -> Option<Self> {
        isa.is_available().then_some(Self { isa })
    }

    /// Tokens of a full tile of packed activations.
    pub(in crate::backend::cpu) fn tile(self) -> usize {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::TILE,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::TILE,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Neon::TILE,
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512 | Isa::Avx2 => Portable::TILE,
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => Portable::TILE,
            Isa::Portable => Portable::TILE,
        }
    }

    /// Tokens of a full tile of activations in 8 bits.
    pub(in crate::backend::cpu) fn int8_tile(self) -> usize {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::INT_TILE,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::INT_TILE,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Neon::INT_TILE,
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512 | Isa::Avx2 => Portable::INT_TILE,
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => Portable::INT_TILE,
            Isa::Portable => Portable::INT_TILE,
        }
    }

    /// Tokens that a tile of `tokens` tokens is padded to.
    pub(in crate::backend::cpu) fn width(self, tokens: usize) -> usize {
        matmul::width(tokens)
    }

    /// Length of packed activations.
    pub(in crate::backend::cpu) fn packed_len(self, tokens: usize, inner: usize) -> usize {
        matmul::packed_len(self.tile(), tokens, inner)
    }

    /// Words of packed activations in 8 bits.
    pub(in crate::backend::cpu) fn packed_words(self, tokens: usize, inner: usize) -> usize {
        int8::packed_words(self.int8_tile(), tokens, inner)
    }

    /// Writes one row in 8 bits as token `m` of a tile of `width`.
    pub(in crate::backend::cpu) fn quantise(self, row: &[f32], m: usize, width: usize, tile: &mut [u32]) {
        dispatch!(self, quantise(row, m, width, tile));
    }

    /// Some panels of quantised weights by all tokens, whose activations are in 8 bits.
    pub(in crate::backend::cpu) fn int8(self, unit: &mut Int8Unit<'_>) {
        dispatch!(self, int8(unit));
    }

    /// Some panels by all tokens.
    pub(in crate::backend::cpu) fn matmul(self, unit: &mut MatmulUnit<'_>) {
        dispatch!(self, matmul(unit));
    }

    /// Attention of some tokens. The caller owns the blocks for reading.
    pub(in crate::backend::cpu) fn attend(self, unit: &mut AttentionUnit<'_>) {
        dispatch!(self, attend(unit));
    }

    /// One row of attention's output from `parts` partial results that stand `step` elements apart.
    pub(in crate::backend::cpu) fn combine(self, partials: &[f32], step: usize, parts: usize, out: &mut [f32]) {
        dispatch!(self, combine(partials, step, parts, out));
    }

    /// `gate = silu(gate) * up`; lengths are whole lanes.
    pub(in crate::backend::cpu) fn silu(self, gate: &mut [f32], up: &[f32]) {
        dispatch!(self, silu(gate, up));
    }

    /// One row of a panel as f32: `(inner,)`. By the portable lanes: decoding is exact on every path.
    pub(in crate::backend::cpu) fn decode_row(format: Format, panel: &[u8], lane: usize, out: &mut [f32]) {
        super::format::decode_lane(format, panel, lane, out);
    }
}
