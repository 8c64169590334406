//! What a node is before it has a role: options, bring-up, model card, engine thread, the gRPC service that dispatches to a
//! [`Role`], drain. The role crates add what they do with requests. See ARCHITECTURE.md.

#![warn(missing_docs)]

mod blocks;
mod cpus;
pub mod engine;
mod error;
mod errors;
mod grammar;
mod host;
mod model;
mod options;
mod phase;
mod process;
mod request;
mod roles;
mod run;
mod self_test;
mod service;
pub mod work;

pub use blocks::PoolBlocks;
pub use cpus::CpuList;
pub use error::BringUpError;
pub use errors::LastErrors;
pub use grammar::Compiling;
pub use host::{Host, ModelFacts, NodeIdentity, NodeLimits, NodeParts, RequestGuard};
pub use options::{KvDtypeFlag, NodeOptions};
pub use phase::{Goal, Phase, RoleRefused};
pub use process::run_to_exit;
pub use request::{CancelOnDrop, LastWord, Outcome};
pub use roles::{EventStream, Role, Roles};
pub use run::{BUILD, run, run_beside_others};
pub use service::{NodeService, load};
