//! The sender's handle of one hand-over.

use super::sending::Sending;
use crate::control::PAYLOAD_BYTES_MAX;
use crate::session::SenderEvent;
use crate::{Fallback, PathKind, Peer, TransferError};
use baton_types::{Attempt, BlockId, Epoch, Ticket};
use bytes::Bytes;
use std::any::Any;
use std::fmt;
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
    /// How the bytes went, at last.
    pub path: PathKind,
    /// Paths that broke under it, in order.
    pub fallbacks: Vec<Fallback>,
    /// How many were sent.
    pub bytes: u64,
    /// How long the path was at work for them: bytes by this are its speed, whatever else took time.
    pub busy: Duration,
    /// From `complete` until the receiver had committed: what compute did not hide.
    pub exposed: Duration,
    /// From `reserve` until the grant.
    pub reserve_wait: Duration,
}

/// One hand-over to a peer. Dropping it aborts: the receiver is told, and every claim is dropped as soon as no write names
/// its block.
pub struct Outgoing {
    sending: Arc<Sending>,
}

impl fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ticket, attempt) = self.sending.key();
        f.debug_struct("Outgoing")
            .field("ticket", &ticket)
            .field("attempt", &attempt)
            .finish_non_exhaustive()
    }
}

impl Outgoing {
    pub(super) fn new(sending: Arc<Sending>) -> Self {
        Self { sending }
    }

    /// Asks the receiver for blocks and waits for them. Asked again after a grant, it gives the same grant. Cancel safe: the
    /// ask stays.
    ///
    /// # Errors
    /// Whatever ended the attempt.
    pub async fn reserve(&mut self) -> Result<Granted, TransferError> {
        self.sending.granted().await
    }

    /// Queues `layers` of the block `source`, which is the `ordinal`-th of the context. Never waits. `claim` is dropped as
    /// soon as no write names the block any more: it is what frees source blocks. An ordinal that the receiver holds already
    /// is accepted and its claim dropped.
    ///
    /// # Errors
    /// [`TransferError::Protocol`] before the grant, outside the context or pushed before (the latter two end the attempt),
    /// and whatever ended the attempt.
    pub fn push(
        &self,
        ordinal: u32,
        layers: Range<u32>,
        source: BlockId,
        claim: Arc<dyn Any + Send + Sync>,
    ) -> Result<(), TransferError> {
        self.sending.push(ordinal, layers, source, claim)
    }

    /// Says that everything was pushed, and waits until the receiver has committed. `payload` reaches it as it is. Dropping
    /// the future aborts.
    ///
    /// # Errors
    /// Whatever ended the attempt; [`TransferError::Protocol`] where a wanted extent was never pushed, or the payload is
    /// larger than 512 KiB.
    pub async fn complete(self, payload: Bytes) -> Result<HandoverReport, TransferError> {
        if payload.len() > PAYLOAD_BYTES_MAX {
            let reason = format!("a payload of {} bytes; {PAYLOAD_BYTES_MAX} are allowed", payload.len());
            return Err(TransferError::Protocol { reason });
        }
        self.sending.handle(SenderEvent::Complete { payload });
        self.sending.committed().await
    }

    /// Resolves when the attempt has failed (peer gone, fenced, deadline, ...), so that compute can stop. Never where it
    /// succeeds.
    pub async fn failed(&self) -> TransferError {
        self.sending.failed().await
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        let error = TransferError::Aborted {
            reason: "the sender gave the hand-over up".to_owned(),
        };
        self.sending.handle(SenderEvent::Abort { error });
    }
}
