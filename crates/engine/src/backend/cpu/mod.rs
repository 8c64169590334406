//! The CPU backend.

mod isa;

pub use isa::{Isa, UnknownIsa};

/// Runs a model on CPU cores.
pub(crate) struct CpuBackend {}
