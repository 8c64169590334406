//! The CPU backend: packed weights, a pool of threads, one step function for prefill and decode.
//!
//! Batch-invariant by construction: every output element is one chain in a fixed order (see `kernels`), everything
//! between the products works token by token, and attention reads keys and values as the arena stores them.

mod activations;
mod arena;
mod check;
mod form;
mod isa;
mod kernels;
mod packed;
mod pages;
mod pool;
mod step;
mod weights;

pub use form::Activations;
pub use isa::{Isa, UnknownIsa};
pub(crate) use step::CpuBackend;
