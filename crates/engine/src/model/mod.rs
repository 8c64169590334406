//! What a model is, apart from how it is run: hyperparameters, the names of its weights, rotary angles.

mod config;
mod rope;
mod tensor;

pub use config::{Architecture, ModelConfig, RopeScaling, RopeStyle};
pub(crate) use rope::RopeTable;
pub(crate) use tensor::{ElementType, Naming, Tensor, TensorName};
