//! The words that every part of Baton shares: identities, units, sampling parameters, KV geometry, block identity and the
//! view of the arena. Nothing here does IO, knows a wire form or reads a clock.

#![warn(missing_docs)]

mod arena;
mod block_hash;
mod budget;
mod grammar;
mod id;
mod kv;
mod request;
mod sampling;

pub use arena::{ArenaView, OutOfArena};
pub use block_hash::{BlockChanges, BlockHash, BlockHashChain, CacheScope, NumericsId};
pub use budget::Budget;
pub use grammar::{GRAMMAR_BYTES_MAX, Grammar, TokenSet};
pub use id::{
    Attempt, BlockId, Epoch, Instance, ModelFingerprint, NodeId, ParseIdError, RequestId, Ticket, fill_random,
};
pub use kv::{BlockCounts, GeometryMismatch, KvDtype, KvGeometry, KvPart};
pub use request::{FinishReason, NodeRole, NodeState, TokenLogprobs, Work};
pub use sampling::{InvalidSampling, SamplingParams};
