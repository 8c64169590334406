//! The engine: weights, KV blocks, one step over token ids, sampling. It knows neither text nor network.
//!
//! [`load`] maps a model file and gives a [`Backend`]; the owner of the arena keeps a [`BlockPool`] beside it and hands
//! [`Slice`]s of sequences to [`Backend::step`]. See ARCHITECTURE.md.

#![warn(missing_docs)]

mod backend;
mod error;
mod kv;
mod load;
mod model;
mod sampling;

pub use backend::{
    Activations, Backend, InvalidStub, Isa, Slice, StepObserver, StepOutput, StubSpec, UnknownIsa, Unobserved,
    WantedLogits, stub,
};
pub use error::{LoadError, StepError};
pub use kv::{BlockPool, BlockTable, IntegrityFault, NoRoom, Quarantined, Reservation};
pub use load::{LoadOptions, load};
pub use model::{Architecture, ModelConfig, RopeScaling, RopeStyle};
pub use sampling::{Sampled, sample, sample_of};
