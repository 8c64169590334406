//! Figures for heartbeats, status pages and metrics.

use crate::PathKind;
use crate::session::Receiver;
use metrics::{counter, gauge, histogram};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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

/// The figures as they grow. Metrics and [`TransferStats`] come from the same calls.
#[derive(Debug, Default)]
pub(super) struct Counters(Mutex<TransferStats>);

impl Counters {
    fn lock(&self) -> MutexGuard<'_, TransferStats> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn snapshot(&self) -> TransferStats {
        self.lock().clone()
    }

    /// What the receiving machine holds now.
    pub(super) fn received_state(&self, machine: &Receiver) {
        let (reserved, quarantined) = machine.blocks_out();
        let (expected, asking) = (machine.expected(), machine.asking());
        gauge!("baton_transfer_expected_handovers").set(expected as f64);
        gauge!("baton_transfer_queued_asks").set(asking as f64);
        gauge!("baton_transfer_reserved_blocks").set(reserved as f64);
        gauge!("baton_transfer_quarantined_blocks").set(quarantined as f64);
        let mut stats = self.lock();
        stats.handovers_in = expected;
        stats.queued_asks = asking;
        stats.reserved_blocks = reserved;
        stats.quarantined_blocks = quarantined;
    }

    pub(super) fn received(&self, path: PathKind, bytes: u64) {
        counter!("baton_transfer_handovers_total", "direction" => "in", "path" => path.name(), "outcome" => "committed")
            .increment(1);
        counter!("baton_transfer_handover_bytes_total", "direction" => "in", "path" => path.name()).increment(bytes);
        let mut stats = self.lock();
        let stats = stats.paths.entry(path).or_default();
        stats.received += 1;
        stats.received_bytes += bytes;
    }

    pub(super) fn sent(&self, path: PathKind, bytes: u64, exposed: Duration, reserve_wait: Duration) {
        counter!("baton_transfer_handovers_total", "direction" => "out", "path" => path.name(), "outcome" => "committed")
            .increment(1);
        counter!("baton_transfer_handover_bytes_total", "direction" => "out", "path" => path.name()).increment(bytes);
        histogram!("baton_transfer_exposed_seconds", "path" => path.name()).record(exposed.as_secs_f64());
        histogram!("baton_transfer_reserve_wait_seconds", "path" => path.name()).record(reserve_wait.as_secs_f64());
        let mut stats = self.lock();
        let stats = stats.paths.entry(path).or_default();
        stats.sent += 1;
        stats.sent_bytes += bytes;
    }

    /// `direction`: "in" or "out". Without a path the attempt had none yet.
    pub(super) fn failed(&self, path: Option<PathKind>, direction: &'static str) {
        let name = path.map_or("none", PathKind::name);
        counter!("baton_transfer_handovers_total", "direction" => direction, "path" => name, "outcome" => "failed")
            .increment(1);
        if let Some(path) = path {
            self.lock().paths.entry(path).or_default().failed += 1;
        }
    }

    /// A hand-over begins to be made; gives how many there were.
    pub(super) fn sending_begins(&self) -> usize {
        let mut stats = self.lock();
        stats.handovers_out += 1;
        gauge!("baton_transfer_sending_handovers").set(stats.handovers_out as f64);
        stats.handovers_out - 1
    }

    pub(super) fn sending_ends(&self) {
        let mut stats = self.lock();
        stats.handovers_out -= 1;
        gauge!("baton_transfer_sending_handovers").set(stats.handovers_out as f64);
    }
}
