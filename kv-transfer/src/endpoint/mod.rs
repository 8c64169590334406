//! The driver: owns sockets, tasks and timers, performs the effects of the pure state machines in `session`.

mod accept;
mod blocks;
mod busy;
mod digest;
#[cfg(test)]
mod fallback_tests;
mod gate;
mod incoming;
mod landing;
mod link;
mod outgoing;
mod paths;
mod peer_paths;
#[cfg(test)]
mod peer_paths_tests;
mod receiving;
#[cfg(test)]
mod resume_tests;
mod sending;
mod service;
#[cfg(test)]
mod silent_tests;
mod stats;
mod transports;

pub use blocks::{DestinationBlocks, QuarantinedBlocks, ReservedBlocks};
pub use incoming::{ExpectSpec, Incoming, IncomingEvent};
pub use outgoing::{Granted, HandoverReport, Outgoing, OutgoingSpec};
pub use service::Endpoint;
pub use stats::{PathStats, TransferStats};
