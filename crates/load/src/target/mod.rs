//! What load is put on.

mod baton;
mod events;
mod openai;
mod pick;

pub use baton::BatonTarget;
pub use openai::{Dialect, OpenAiTarget};

/// A model that an endpoint lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedModel {
    /// As the endpoint names it.
    pub id: String,
    /// Tokens of the longest sequence, where it says so.
    pub context_tokens: Option<u32>,
}

/// An endpoint and how it is spoken to. Clones share connections.
#[derive(Debug, Clone)]
pub enum Target {
    /// Baton over gRPC: each frame says how many tokens it has.
    Baton(BatonTarget),
    /// OpenAI's interface over HTTP.
    OpenAi(OpenAiTarget),
}
