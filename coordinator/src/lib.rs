//! The coordinator: lets requests in, picks the nodes that serve each, and merges what they say into one stream.
//! `api/` converts, `core/` decides (pure), `driver/` performs. See ARCHITECTURE.md for the life of a request.

#![warn(missing_docs)]

pub mod api;
mod control;
mod core;
mod driver;
mod error;
mod frontend;
mod membership;
mod options;
mod service;
#[cfg(test)]
mod simulation_test;
mod tenants;

pub use control::{ControlFlags, ControlMode};
pub use error::StartError;
pub use frontend::{
    ApiCode, ApiError, ApiKey, Chunk, Finished, Frontend, GenerateInput, Generation, GenerationEvent, ModelInfo,
    PathFallback, PromptInput, Timeline, Usage,
};
pub use options::{Options, StoreChoice};
pub use service::{Service, run};
pub use tenants::TenantsError;
