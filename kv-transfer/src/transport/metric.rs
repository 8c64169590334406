//! The transports' metrics. Labels are the kind of path and a fixed reason: nothing of a request.

use super::Reject;
use crate::PathKind;
use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};

/// Gives the metrics their help texts. Saying it again changes nothing.
pub(super) fn describe() {
    describe_counter!(
        "baton_transport_sent_bytes_total",
        Unit::Bytes,
        "Payload bytes handed to the wire"
    );
    describe_counter!("baton_transport_sent_extents_total", "Extents handed to the wire");
    describe_counter!(
        "baton_transport_landed_bytes_total",
        Unit::Bytes,
        "Payload bytes that arrived whole and were counted"
    );
    describe_counter!(
        "baton_transport_landed_extents_total",
        "Extents that arrived whole and were counted"
    );
    describe_counter!(
        "baton_transport_rejected_extents_total",
        "Extents that the receiver discarded, by reason"
    );
    describe_counter!(
        "baton_transport_corrupt_extents_total",
        "Extents whose checksum was wrong on arrival"
    );
    describe_counter!(
        "baton_transport_malformed_frames_total",
        "Connections ended because a peer broke the wire format"
    );
    describe_gauge!(
        "baton_transport_writer_connections",
        "Data connections that writers hold to this process"
    );
}

/// Bytes and extents handed to the wire.
pub(super) fn sent(path: PathKind, extents: usize, bytes: usize) {
    counter!("baton_transport_sent_bytes_total", "path" => path.name()).increment(bytes as u64);
    counter!("baton_transport_sent_extents_total", "path" => path.name()).increment(extents as u64);
}

/// Bytes and extents that landed.
pub(super) fn landed(path: PathKind, extents: usize, bytes: usize) {
    counter!("baton_transport_landed_bytes_total", "path" => path.name()).increment(bytes as u64);
    counter!("baton_transport_landed_extents_total", "path" => path.name()).increment(extents as u64);
}

/// An extent that the receiver did not take; its bytes were discarded.
pub(super) fn rejected(path: PathKind, reject: Reject) {
    counter!("baton_transport_rejected_extents_total", "path" => path.name(), "reason" => reject.name()).increment(1);
}

/// An extent whose bytes were not what its checksum says.
pub(super) fn corrupt(path: PathKind) {
    counter!("baton_transport_corrupt_extents_total", "path" => path.name()).increment(1);
}

/// A connection that ended because the peer broke the protocol.
pub(super) fn malformed(path: PathKind) {
    counter!("baton_transport_malformed_frames_total", "path" => path.name()).increment(1);
}

/// Connections that writers hold to this process now.
pub(super) fn writers(path: PathKind, connections: usize) {
    gauge!("baton_transport_writer_connections", "path" => path.name()).set(connections as f64);
}
