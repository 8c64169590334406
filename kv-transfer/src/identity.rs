//! Who a node is to its peers, and where its KV can be sent. Compared at every connection.

use crate::TransferError;
use baton_types::{Instance, KvGeometry, ModelFingerprint, NodeId, NumericsId};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Major version of the wire protocol, control and data. Nodes that differ in it refuse each other.
pub const WIRE_MAJOR: u32 = 1;

/// What one process says of itself in every handshake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The node's name.
    pub node: NodeId,
    /// This life of its process.
    pub instance: Instance,
    /// The weights that its KV belongs to.
    pub fingerprint: ModelFingerprint,
    /// The shape of its KV.
    pub geometry: KvGeometry,
    /// The arithmetic that makes its KV. A difference is a warning.
    pub numerics: NumericsId,
    /// Its build. A difference is normal during a rolling upgrade.
    pub build: String,
}

impl Identity {
    /// Compares what must be equal between two nodes that hand KV over.
    ///
    /// # Errors
    /// [`TransferError::Refused`] naming the first differing field.
    pub fn check_peer(
        &self,
        major: u32,
        fingerprint: &ModelFingerprint,
        geometry: &KvGeometry,
    ) -> Result<(), TransferError> {
        let refused = |field: &str, ours: String, theirs: String| {
            Err(TransferError::Refused {
                field: field.to_owned(),
                ours,
                theirs,
            })
        };
        if major != WIRE_MAJOR {
            return refused("wire_major", WIRE_MAJOR.to_string(), major.to_string());
        }
        if *fingerprint != self.fingerprint {
            return refused("fingerprint", self.fingerprint.to_string(), fingerprint.to_string());
        }
        match self.geometry.check_same(geometry) {
            Ok(()) => Ok(()),
            Err(mismatch) => refused(mismatch.field, mismatch.ours, mismatch.theirs),
        }
    }
}

/// Where a process can be reached for hand-overs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Peer {
    /// The node's name.
    pub node: NodeId,
    /// The life of its process that is meant: another one refuses.
    pub instance: Instance,
    /// `control://host:port` once, and one address per transport, best first: `tcp://host:port`, `memory://name`.
    pub addresses: Vec<String>,
}

impl Peer {
    /// The part behind `scheme://` of the first address of that scheme.
    pub fn address(&self, scheme: &str) -> Option<&str> {
        self.addresses
            .iter()
            .find_map(|address| address.strip_prefix(scheme)?.strip_prefix("://"))
    }
}

/// A kind of transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PathKind {
    /// Both nodes in one process.
    Memory,
    /// TCP sockets.
    Tcp,
    /// Shared memory of one host.
    Shm,
    /// RDMA verbs.
    Rdma,
    /// GPU memory.
    Cuda,
}

impl PathKind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Memory, Self::Tcp, Self::Shm, Self::Rdma, Self::Cuda];

    /// This build has it.
    pub fn is_built(self) -> bool {
        match self {
            Self::Memory | Self::Tcp | Self::Shm => true,
            Self::Rdma => cfg!(feature = "rdma"),
            Self::Cuda => false,
        }
    }

    /// Its name, which is its addresses' scheme too.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Tcp => "tcp",
            Self::Shm => "shm",
            Self::Rdma => "rdma",
            Self::Cuda => "cuda",
        }
    }
}

/// A hand-over went on over another path, because the one that it used broke.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fallback {
    /// What broke.
    pub from: PathKind,
    /// What it went on over.
    pub to: PathKind,
    /// What was seen.
    pub reason: String,
}

impl fmt::Display for PathKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PathKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| format!("`{text}` is no transport: expected memory, tcp, shm, rdma or cuda"))
    }
}
