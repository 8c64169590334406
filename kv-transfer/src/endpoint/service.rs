//! The endpoint: one per process.

use super::{DestinationBlocks, ExpectSpec, Incoming, Outgoing, OutgoingSpec, TransferStats};
use crate::{EndpointOptions, ExpectError, Identity, Peer, StartError};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::ArenaView;
use std::sync::Arc;

/// One process's end of all its hand-overs. Cheap to clone.
#[derive(Clone)]
pub struct Endpoint {
    _private: (),
}

impl Endpoint {
    /// Listens, starts its tasks.
    ///
    /// # Errors
    /// An option out of range, an address that cannot be had, an arena of another shape than the identity says.
    pub async fn start(
        _options: EndpointOptions,
        _identity: Identity,
        _arena: ArenaView,
        _blocks: Arc<dyn DestinationBlocks>,
        _clock: Clock,
        _supervisor: Supervisor,
    ) -> Result<Self, StartError> {
        todo!()
    }

    /// How peers reach this endpoint.
    pub fn peer(&self) -> Peer {
        todo!()
    }

    /// Expects a hand-over. Nothing is set aside before its sender asks.
    ///
    /// # Errors
    /// A ticket in use, a hand-over too large, too many of them.
    pub fn expect(&self, _spec: ExpectSpec) -> Result<Incoming, ExpectError> {
        todo!()
    }

    /// Begins a hand-over to a peer: connects in the background. Failures appear in the handle's calls.
    pub fn open(&self, _spec: OutgoingSpec) -> Outgoing {
        todo!()
    }

    /// Blocks became free: serve the asks that wait.
    pub fn room_changed(&self) {
        todo!()
    }

    /// What it does now and has done.
    pub fn stats(&self) -> TransferStats {
        todo!()
    }

    /// Ends every hand-over with an explicit failure, closes every connection and joins every task.
    pub async fn shutdown(&self) {
        todo!()
    }
}
