//! The prefill role: takes requests from its queue, computes their prompts in chunks, pushes finished blocks to the decode
//! node while computing, draws the first token. It knows the decode node only as a peer of the hand-over endpoint.

#![warn(missing_docs)]

mod handover;
mod request;
mod role;

use baton_node_host::{BringUpError, NodeOptions};
use baton_node_runtime::Supervisor;
use baton_types::NodeRole;
use std::sync::Arc;

pub use role::PrefillRole;

/// Runs a prefill node until `supervisor` begins its shutdown, or the node is drained.
///
/// # Errors
/// Whatever kept it from coming up, or broke it.
pub async fn run(options: NodeOptions, supervisor: Supervisor) -> Result<(), BringUpError> {
    let role = |host| Arc::new(PrefillRole::new(host)) as Arc<dyn baton_node_host::Role>;
    baton_node_host::run(options, NodeRole::Prefill, role, supervisor).await
}
