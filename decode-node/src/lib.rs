//! The decode role: expects hand-overs, goes on from their first token in a continuous batch, streams tokens; computes
//! prompts itself where no prefill node does. It knows the prefill node only as a peer of the hand-over endpoint.

#![warn(missing_docs)]

mod commands;
mod frames;
mod handing_on;
mod request;
mod role;
mod tokens;

use baton_node_host::{BringUpError, NodeOptions};
use baton_node_runtime::Supervisor;
use baton_types::NodeRole;
use std::sync::Arc;

pub use role::DecodeRole;

/// Runs a decode node until `supervisor` begins its shutdown, or the node is drained.
///
/// # Errors
/// Whatever kept it from coming up, or broke it.
pub async fn run(options: NodeOptions, supervisor: Supervisor) -> Result<(), BringUpError> {
    let role = |host| Arc::new(DecodeRole::new(host)) as Arc<dyn baton_node_host::Role>;
    baton_node_host::run(options, NodeRole::Decode, role, supervisor).await
}
