//! Everything that touches vector registers and raw panels of weights. The rest of the backend calls [`Kernels`], whose
//! methods are safe: they check lengths, and a value of it exists only for a path that this machine runs.
//!
//! Invariant: each output element is one chain of operations in a fixed order (along the inner dimension, or along the
//! context by tiles and segments of positions). Lanes hold *different* elements, never parts of one sum, so neither the
//! number of tokens nor their grouping into tiles can change a bit.

mod attention;
mod dispatch;
mod format;
mod int8;
mod matmul;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod simd;
mod stored;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_int8;

pub(super) use attention::{AttentionUnit, SEGMENT, partial_len};
pub(super) use dispatch::Kernels;
pub(super) use format::Format;
pub(super) use int8::Int8Unit;
pub(super) use matmul::MatmulUnit;

/// Rows of a weight panel.
pub(super) const LANES: usize = 16;
