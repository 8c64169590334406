//! What the two ends say to each other over the control connection, in order. The wire form is `control`'s business, and so
//! are the process instances: a connection belongs to one pair of them.

use crate::{PathKind, TransferError};
use baton_types::{Attempt, BlockId, Epoch, Ticket};
use bytes::Bytes;
use std::ops::Range;
use std::time::Duration;

/// What a message is about. `epoch` is absent where no grant was given yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub ticket: Ticket,
    pub attempt: Attempt,
    pub epoch: Option<Epoch>,
}

/// From the writer of blocks to their owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ToReceiver {
    /// Wants blocks for its context, to be written over one kind of path. Where the header names an epoch, that one's path
    /// broke, and the attempt is to go on under another.
    Reserve {
        context_tokens: u64,
        path: PathKind,
        budget: Duration,
        /// `Complete` will carry a digest.
        digest: bool,
    },
    /// Still at work under the grant, with nothing waiting for the wire.
    Renew,
    /// Everything was handed to the wire, or is about to be: these ordinals, all layers. `digest` covers the ordinals from the
    /// grant's `digest_from` on.
    Complete {
        blocks: Range<u32>,
        payload: Bytes,
        digest: Option<u64>,
    },
    /// Gives the attempt up. `Fenced` follows where there was a grant.
    Abort { error: TransferError },
    /// Nothing more of the epoch will be written; a marker went down each of so many connections.
    Fenced { connections: u32 },
    /// The path of the epoch is broken: nothing more will be written under it, and no marker can prove that. Its connections
    /// are to be destroyed.
    PathBroken { error: TransferError },
}

/// From the owner of blocks to their writer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ToSender {
    /// The writer may write these ordinals; `destinations` are their blocks. A digest is to cover the ordinals from
    /// `digest_from` on: what this attempt wrote before is among them.
    Grant {
        held: u32,
        digest_from: u32,
        wanted: Range<u32>,
        destinations: Vec<BlockId>,
        lease: Duration,
    },
    /// No grant, and why.
    Refused { error: TransferError },
    /// The hand-over is done: applied at the destination.
    Committed,
    /// The grant is over: stop writing, and prove it.
    Fence { error: TransferError },
}
