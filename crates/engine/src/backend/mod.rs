//! What runs a model: the one narrow trait, and who implements it.

mod cpu;
mod interface;
mod stub;

pub(crate) use cpu::CpuBackend;
pub use cpu::{Activations, Isa, UnknownIsa};
pub use interface::{Backend, Slice, StepObserver, StepOutput, Unobserved, WantedLogits};
pub use stub::{InvalidStub, StubSpec, stub};
