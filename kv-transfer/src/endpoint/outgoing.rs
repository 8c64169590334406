//! The sender's handle of one hand-over.

use crate::{PathKind, Peer, TransferError};
use baton_types::{Attempt, BlockId, Epoch, Ticket};
use bytes::Bytes;
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// A hand-over to make.
#[derive(Debug, Clone)]
pub struct OutgoingSpec {
    /// Whom to.
    pub peer: Peer,
    /// Its name.
    pub ticket: Ticket,
    /// Which try.
    pub attempt: Attempt,
    /// Tokens whose KV is handed over. Must equal what the receiver expects.
    pub context_tokens: usize,
    /// Time left for the hand-over.
    pub deadline: Duration,
}

/// The receiver's answer to a reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// The grant.
    pub epoch: Epoch,
    /// Leading ordinals that the receiver has.
    pub held: usize,
    /// Ordinals to send, all layers of each.
    pub wanted: Range<u32>,
}

/// How a hand-over went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandoverReport {
    /// How the bytes went.
    pub path: PathKind,
    /// How many were sent.
    pub bytes: u64,
    /// From `complete` until the receiver had committed: what compute did not hide.
    pub exposed: Duration,
    /// From `reserve` until the grant.
    pub reserve_wait: Duration,
}

/// One hand-over to a peer. Dropping it aborts: the receiver is told, and every claim is dropped as soon as no write names its block.
#[derive(Debug)]
pub struct Outgoing {
    _private: (),
}

impl Outgoing {
    /// Asks the receiver for blocks and waits for them. Asked again after a grant, it gives the same grant.
    ///
    /// # Errors
    /// Whatever ends the attempt.
    pub async fn reserve(&mut self) -> Result<Granted, TransferError> {
        todo!()
    }

    /// Queues `layers` of the block `source`, which is the `ordinal`-th of the context. Never waits. `claim` is dropped as
    /// soon as no write names the block any more: it is what frees source blocks. An ordinal that the receiver does not
    /// want is accepted and its claim dropped.
    ///
    /// # Errors
    /// Before the grant, and whatever ended the attempt.
    pub fn push(
        &self,
        _ordinal: u32,
        _layers: Range<u32>,
        _source: BlockId,
        _claim: Arc<dyn Any + Send + Sync>,
    ) -> Result<(), TransferError> {
        todo!()
    }

    /// Says that everything was pushed, and waits until the receiver has committed. `payload` reaches it as it is.
    ///
    /// # Errors
    /// Whatever ended the attempt; [`TransferError::Protocol`] where a wanted extent was never pushed.
    pub async fn complete(self, _payload: Bytes) -> Result<HandoverReport, TransferError> {
        todo!()
    }

    /// Resolves when the attempt has ended without success (peer gone, fenced, deadline, ...), so that compute can stop.
    pub async fn failed(&self) -> TransferError {
        todo!()
    }
}
