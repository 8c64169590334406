//! Figures for heartbeats, status pages and metrics.

use super::HandoverReport;
use super::paths::Report;
use crate::session::Receiver;
use crate::{Fallback, PathKind};
use baton_types::Ticket;
use metrics::{counter, gauge, histogram};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

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
    /// Peers to which such a path is open now, for sending.
    pub open: usize,
    /// Peers to which it failed, and is tried again later.
    pub down: usize,
    /// Measured on large writes lately, to the peer written to last; 0 while nothing was measured.
    pub bytes_per_second: u64,
    /// Hand-overs that went on over another path because this one failed under them.
    pub fallbacks: u64,
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

    pub(super) fn sent(&self, report: &HandoverReport) {
        let HandoverReport {
            path,
            bytes,
            exposed,
            reserve_wait,
            ..
        } = *report;
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

    /// What arrived was not what was sent.
    pub(super) fn digest_mismatch(&self) {
        counter!("baton_transfer_digest_mismatch_total").increment(1);
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

    /// How a path to one peer stood, and stands.
    pub(super) fn path_stands(&self, before: Report, now: Report) {
        if before == now {
            return;
        }
        let kind = now.kind;
        let mut stats = self.lock();
        let stats = stats.paths.entry(kind).or_default();
        stats.open = stats.open + usize::from(now.up) - usize::from(before.up);
        stats.down = stats.down + usize::from(now.down) - usize::from(before.down);
        gauge!("baton_transfer_path_up", "path" => kind.name()).set(stats.open as f64);
        gauge!("baton_transfer_path_down", "path" => kind.name()).set(stats.down as f64);
    }

    /// A large write was applied over a path that did so much lately.
    pub(super) fn path_measured(&self, kind: PathKind, bytes_per_second: f64) {
        gauge!("baton_transfer_path_bytes_per_second", "path" => kind.name()).set(bytes_per_second);
        // A rate fits; the fraction is dropped.
        self.lock().paths.entry(kind).or_default().bytes_per_second = bytes_per_second as u64;
    }

    /// A hand-over goes on over another path.
    pub(super) fn fell_back(&self, ticket: Ticket, fallback: &Fallback) {
        let Fallback { from, to, ref reason } = *fallback;
        tracing::warn!(%ticket, %from, %to, reason, "hand-over goes on over another path");
        counter!("baton_transfer_path_fallback_total", "from" => from.name(), "to" => to.name()).increment(1);
        self.lock().paths.entry(from).or_default().fallbacks += 1;
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
