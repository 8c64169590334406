//! What can go wrong with a hand-over, one enum per operation.

use baton_types::{Attempt, Instance};
use std::net::SocketAddr;

/// Why one attempt at a hand-over failed. Nothing of it was committed, except where the variant says so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The two nodes cannot hand KV to each other.
    #[error("peer refused: {field} is {ours} here and {theirs} there")]
    Refused {
        /// What differs.
        field: String,
        /// This node's value.
        ours: String,
        /// The peer's value.
        theirs: String,
    },
    /// The peer's addresses name no transport that this node has, or none that it may use.
    #[error("no {wanted} path to the peer, which offers {offered}")]
    NoPath {
        /// Which kinds would do: the required one, else all that this node has.
        wanted: String,
        /// The peer's addresses.
        offered: String,
    },
    /// The receiver has no blocks for it, and will not have any in time.
    #[error("the receiver has no room: {reason}")]
    NoRoom {
        /// Which limit.
        reason: String,
    },
    /// A later attempt, or a later epoch, has taken this one's place.
    #[error("fenced: a later attempt has taken this one's place")]
    Fenced,
    /// Another attempt was committed first.
    #[error("another attempt at this hand-over was committed first")]
    AlreadyCommitted,
    /// The receiver does not expect this ticket (it never did, or the request is over).
    #[error("the receiver does not expect this hand-over")]
    UnknownTicket,
    /// The peer's process is gone, was replaced, or does not answer.
    #[error("the peer is gone: {reason}")]
    PeerGone {
        /// What was seen.
        reason: String,
    },
    /// The data path broke.
    #[error("the {path} path failed: {reason}")]
    PathFailed {
        /// Its kind.
        path: String,
        /// What was seen.
        reason: String,
    },
    /// The lease of a grant ran out without progress.
    #[error("no progress within the lease of the reservation")]
    LeaseExpired,
    /// The request's time is spent.
    #[error("the deadline has passed")]
    Deadline,
    /// What arrived is not what was sent.
    #[error("corrupt: {reason}")]
    Corrupt {
        /// What was seen.
        reason: String,
    },
    /// The peer broke the protocol.
    #[error("protocol violation: {reason}")]
    Protocol {
        /// What was seen.
        reason: String,
    },
    /// One side gave it up.
    #[error("aborted: {reason}")]
    Aborted {
        /// Why, as far as known.
        reason: String,
    },
    /// This endpoint is shutting down.
    #[error("this endpoint is shutting down")]
    ShuttingDown,
    /// A bound of this endpoint was reached.
    #[error("too many {what}: at most {limit}")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
}

impl TransferError {
    /// Another attempt, perhaps on another pair of nodes, can succeed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NoRoom { .. }
            | Self::PeerGone { .. }
            | Self::PathFailed { .. }
            | Self::LeaseExpired
            | Self::Corrupt { .. }
            | Self::Protocol { .. }
            | Self::Refused { .. }
            | Self::NoPath { .. }
            | Self::UnknownTicket
            | Self::Aborted { .. }
            | Self::ShuttingDown
            | Self::TooMany { .. } => true,
            Self::Fenced | Self::AlreadyCommitted | Self::Deadline => false,
        }
    }

    /// The other node is to be avoided by the next attempt.
    pub fn peer_at_fault(&self) -> bool {
        match self {
            Self::Refused { .. }
            | Self::NoPath { .. }
            | Self::PeerGone { .. }
            | Self::PathFailed { .. }
            | Self::LeaseExpired
            | Self::Corrupt { .. }
            | Self::Protocol { .. } => true,
            Self::NoRoom { .. }
            | Self::Fenced
            | Self::AlreadyCommitted
            | Self::UnknownTicket
            | Self::Deadline
            | Self::Aborted { .. }
            | Self::ShuttingDown
            | Self::TooMany { .. } => false,
        }
    }
}

/// Too few blocks are free or cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room for {wanted} blocks: {room} could be had")]
pub struct NoRoom {
    /// Blocks asked for.
    pub wanted: usize,
    /// Blocks free or cached.
    pub room: usize,
}

/// Why a hand-over cannot be expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpectError {
    /// The ticket is in use.
    #[error("this ticket is expected already, in attempt {attempt:?}")]
    Duplicate {
        /// The attempt in progress.
        attempt: Attempt,
    },
    /// It can never fit.
    #[error("{blocks} blocks are more than the {limit} that one hand-over may have here")]
    TooLarge {
        /// What was asked for.
        blocks: usize,
        /// The bound.
        limit: usize,
    },
    /// Too many hand-overs at once.
    #[error("{limit} hand-overs are expected already")]
    TooMany {
        /// The bound.
        limit: usize,
    },
    /// No time is left.
    #[error("the deadline has passed")]
    Deadline,
    /// This endpoint is shutting down.
    #[error("this endpoint is shutting down")]
    ShuttingDown,
}

impl ExpectError {
    /// Another node, or this one later, can take it.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::TooMany { .. } | Self::ShuttingDown => true,
            Self::Duplicate { .. } | Self::TooLarge { .. } | Self::Deadline => false,
        }
    }
}

/// Why an endpoint did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The listener's address cannot be had.
    #[error("cannot listen for hand-overs on {address} (--transfer-listen): {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// An option is out of its range, or names what this build does not have.
    #[error("{option} is {value}; {reason}")]
    Option {
        /// Its name.
        option: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        reason: &'static str,
    },
    /// The arena has another shape than the identity says.
    #[error(transparent)]
    Geometry(#[from] baton_types::GeometryMismatch),
    /// A transport did not start.
    #[error("the {path} transport did not start: {reason}")]
    Transport {
        /// Its kind.
        path: crate::PathKind,
        /// Why.
        reason: String,
    },
    /// This build lacks the transport.
    #[error("the {path} transport is not in this build{}", how_to_build(*path))]
    NotBuilt {
        /// Its kind.
        path: crate::PathKind,
    },
    /// The instance is in use within this process.
    #[error("process instance {instance} has an endpoint already")]
    InstanceInUse {
        /// Which.
        instance: Instance,
    },
}

impl StartError {
    /// The same start can succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Listen { .. } | Self::Transport { .. } => true,
            Self::Option { .. } | Self::NotBuilt { .. } | Self::Geometry(_) | Self::InstanceInUse { .. } => false,
        }
    }
}

fn how_to_build(path: crate::PathKind) -> &'static str {
    match path {
        crate::PathKind::Rdma => ": build it with `--features rdma`",
        crate::PathKind::Memory | crate::PathKind::Tcp | crate::PathKind::Shm | crate::PathKind::Cuda => "",
    }
}
