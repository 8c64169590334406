//! Where one request is.

use super::pool::Table;
use crate::Nanos;

/// A sequence on its way to another decode node: what that one keeps for it.
#[derive(Debug)]
pub(super) struct Moving {
    pub to: u32,
    pub table: Table,
    pub blocks: u32,
}

/// Its way through the cluster.
#[derive(Debug, Default)]
pub(super) struct Journey {
    pub prefill: Option<u32>,
    pub decode: u32,
    /// Tokens that the coordinator counts as waiting at the node that prefills.
    pub claimed: u32,
    /// Its blocks on the decode node, while they are reserved.
    pub reserved: Option<Table>,
    pub reserved_blocks: u32,
    /// Its blocks on the prefill node, while they are sent.
    pub sending: Option<Table>,
    /// Tokens whose KV the decode node has, or is being sent.
    pub sent: u32,
    /// Tokens that the prefill node has computed, and how long its last chunk took.
    pub computed: u32,
    pub last_chunk: Nanos,
    /// The prompt is computed since.
    pub prefilled: Option<Nanos>,
    /// When the last push so far ends.
    pub pushed_until: Nanos,
    pub tokens_handed: u32,
    /// Tokens that were known when it was placed, and tokens that it wanted then.
    pub known: u32,
    pub left: u32,
    /// It waits at the prefill node, as the coordinator counts.
    pub at_prefill: bool,
    /// It has nodes.
    pub placed: bool,
    /// Nodes it was taken from before.
    pub attempt: u32,
    /// Of these, those that failed under it.
    pub deaths: u32,
    /// Where it is moved to.
    pub moving: Option<Moving>,
    /// The decode node had all of it.
    pub committed: bool,
    pub started: bool,
    pub fate: Option<super::outcome::Fate>,
}
