//! What every transport of a process is given, and the comparison that every handshake makes.

use super::{ConnectError, Landing};
use crate::{Identity, WIRE_MAJOR};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::{ArenaView, KvGeometry, ModelFingerprint};
use std::sync::Arc;

/// This process, as its transports need it.
#[derive(Clone)]
pub struct Local {
    /// Who it is.
    pub identity: Identity,
    /// What is sent from and received into.
    pub arena: ArenaView,
    /// Who knows the grants.
    pub landing: Arc<dyn Landing>,
    /// Its time.
    pub clock: Clock,
    /// What runs its tasks. Transports end by their own `shutdown`, so that a draining process can still hand over.
    pub supervisor: Supervisor,
}

/// Compares what must be equal between writer and receiver.
///
/// # Errors
/// [`ConnectError::Refused`] naming the first differing field.
pub(super) fn check_same(
    ours: &Identity,
    major: u32,
    fingerprint: &ModelFingerprint,
    geometry: &KvGeometry,
) -> Result<(), ConnectError> {
    let refused = |field, ours: String, theirs: String| Err(ConnectError::Refused { field, ours, theirs });
    if major != WIRE_MAJOR {
        return refused("wire_major", WIRE_MAJOR.to_string(), major.to_string());
    }
    if *fingerprint != ours.fingerprint {
        return refused("fingerprint", ours.fingerprint.to_string(), fingerprint.to_string());
    }
    match ours.geometry.check_same(geometry) {
        Ok(()) => Ok(()),
        Err(mismatch) => refused(mismatch.field, mismatch.ours, mismatch.theirs),
    }
}
