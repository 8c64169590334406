//! What can go wrong with a store, one enum per operation.

use crate::keys::UnreadableValue;
use baton_types::{Instance, NodeId};
use std::path::PathBuf;

/// A store that did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nobody answers, or not in time.
    #[error(
        "the store at {address} (--store) is unreachable: {reason}; is etcd running there, and is its client port right?"
    )]
    Unreachable {
        /// Where it should be.
        address: String,
        /// What was seen.
        reason: String,
    },
    /// A call went unanswered for too long: it starts, is overloaded, has no leader, or is not there.
    #[error(
        "the store at {address} (--store) gives no answer; is etcd there, has it a leader, and is its disk keeping up?"
    )]
    Silent {
        /// Where it should be.
        address: String,
    },
    /// It does not let us in.
    #[error("the store at {address} refuses access: {reason}; see --etcd-user, --etcd-ca, --etcd-cert, --etcd-key")]
    Denied {
        /// Where it is.
        address: String,
        /// What it said.
        reason: String,
    },
    /// It understood and refused.
    #[error("the store at {address} refused: {reason}")]
    Refused {
        /// Where it is.
        address: String,
        /// What it said.
        reason: String,
    },
    /// A file of a TLS option cannot be read.
    #[error("{option} {path}: {reason}", path = path.display())]
    TlsFile {
        /// Which flag.
        option: &'static str,
        /// Its value.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Options that do not fit together.
    #[error("{option}: {problem}")]
    InvalidOption {
        /// Which flag.
        option: &'static str,
        /// What is wrong.
        problem: &'static str,
    },
    /// A key holds something else than it should.
    #[error(transparent)]
    Unreadable(#[from] UnreadableValue),
}

impl StoreError {
    /// The same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Silent { .. } => true,
            Self::Denied { .. }
            | Self::Refused { .. }
            | Self::TlsFile { .. }
            | Self::InvalidOption { .. }
            | Self::Unreadable(_) => false,
        }
    }
}

/// A node that could not register.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// Another living process has the name.
    #[error(
        "the node name {node_id} is taken by the living process {by}; stop that one, or give this node another --node-id"
    )]
    NameTaken {
        /// The name.
        node_id: NodeId,
        /// Who has it.
        by: Instance,
    },
    /// A name that cannot stand in a key.
    #[error("the node name `{node_id}` (--node-id) must not be empty or hold a `/`")]
    InvalidName {
        /// The name.
        node_id: NodeId,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl RegisterError {
    /// The same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NameTaken { .. } | Self::InvalidName { .. } => false,
            Self::Store(error) => error.is_retryable(),
        }
    }
}

/// A coordinator that may not use a store.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// An embedded store serves exactly one coordinator.
    #[error(
        "the store at {address} is embedded in the coordinator {owner} and serves only that one; \
         run etcd and give its address to all coordinators (--store etcd://...)"
    )]
    EmbeddedElsewhere {
        /// Where it is.
        address: String,
        /// Whose it is.
        owner: Instance,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ClaimError {
    /// The same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::EmbeddedElsewhere { .. } => false,
            Self::Store(error) => error.is_retryable(),
        }
    }
}
