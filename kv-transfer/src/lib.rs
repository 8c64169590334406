//! Moves KV blocks from the node that makes them to the node that runs on with them.
//!
//! Purpose: one hand-over is opened by the receiver ([`Endpoint::expect`]), answered by the sender ([`Endpoint::open`]),
//! and ends in exactly one of committed or failed, with every block accounted for on both sides.
//! Knows nothing of models, tokens, scheduling, HTTP or etcd. See docs/kv-transfer.md.

#![warn(missing_docs)]

mod arena;
mod control;
mod endpoint;
mod error;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod identity;
mod options;
mod session;
pub mod transport;

/// The nodes of the integration tests, for those unit tests that need whole endpoints too.
#[cfg(test)]
#[path = "../tests/nodes/mod.rs"]
mod nodes;
#[cfg(test)]
extern crate self as baton_kv_transfer;

pub use arena::{Arena, ArenaError};
pub use endpoint::{
    DestinationBlocks, Endpoint, ExpectSpec, Granted, HandoverReport, Incoming, IncomingEvent, Outgoing, OutgoingSpec,
    PathStats, QuarantinedBlocks, ReservedBlocks, TransferStats,
};
pub use error::{ExpectError, NoRoom, StartError, TransferError};
pub use identity::{Fallback, Identity, PathKind, Peer, WIRE_MAJOR};
pub use options::{EndpointOptions, default_connections};
