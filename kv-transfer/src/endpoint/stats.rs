//! Figures for heartbeats and status pages.

use crate::PathKind;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What an endpoint does now and has done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferStats {
    /// Hand-overs expected now.
    pub handovers_in: usize,
    /// Hand-overs being made now.
    pub handovers_out: usize,
    /// Asks that wait for room.
    pub queued_asks: usize,
    /// Blocks granted to writers now.
    pub reserved_blocks: usize,
    /// Blocks that a past writer may still write.
    pub quarantined_blocks: usize,
    /// Since start, by kind of path.
    pub paths: BTreeMap<PathKind, PathStats>,
}

/// One kind of path, since start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStats {
    /// Committed hand-overs sent.
    pub sent: u64,
    /// Committed hand-overs received.
    pub received: u64,
    /// Bytes of committed hand-overs sent.
    pub sent_bytes: u64,
    /// Bytes of committed hand-overs received.
    pub received_bytes: u64,
    /// Attempts that failed, either direction.
    pub failed: u64,
}
