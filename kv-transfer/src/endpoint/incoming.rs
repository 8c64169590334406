//! The receiver's handle of one expected hand-over.

use super::receiving::Receiving;
use crate::session::Event;
use crate::{Fallback, PathKind, TransferError};
use baton_types::{Attempt, BlockHash, Epoch, Ticket};
use bytes::Bytes;
use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// A hand-over that is expected.
#[derive(Debug, Clone)]
pub struct ExpectSpec {
    /// Its name; unguessable.
    pub ticket: Ticket,
    /// The attempt that may write for it.
    pub attempt: Attempt,
    /// Identities of the full blocks of the context, from the first.
    pub hashes: Vec<BlockHash>,
    /// Blocks of the reservation: those of the context, and one more to run on in.
    pub blocks: usize,
    /// Tokens of the context: the sender sends the blocks of these.
    pub context_tokens: usize,
    /// Time left for the hand-over.
    pub deadline: Duration,
}

/// What happens to an expected hand-over, in order.
pub enum IncomingEvent {
    /// Blocks were set aside and the sender told.
    Granted {
        /// The grant.
        epoch: Epoch,
        /// Leading blocks that were here already.
        held: usize,
        /// Blocks set aside.
        fresh: usize,
    },
    /// The first block of this epoch arrived.
    FirstBlock,
    /// All is here and nobody can write it any more. The last event.
    Committed {
        /// The attempt that won.
        attempt: Attempt,
        /// What `ReservedBlocks::commit` gave.
        blocks: Box<dyn Any + Send>,
        /// Leading blocks that were here already.
        held_blocks: usize,
        /// The sender's last word, opaque here.
        payload: Bytes,
        /// Bytes received.
        bytes: u64,
        /// How they came, at last.
        path: PathKind,
        /// Paths that broke under the attempt that won, in order.
        fallbacks: Vec<Fallback>,
    },
    /// One attempt failed. `Incoming::supersede` names the next; without one the handle is dropped.
    AttemptFailed {
        /// Which.
        attempt: Attempt,
        /// Why.
        error: TransferError,
    },
}

impl fmt::Debug for IncomingEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Granted { epoch, held, fresh } => f
                .debug_struct("Granted")
                .field("epoch", epoch)
                .field("held", held)
                .field("fresh", fresh)
                .finish(),
            Self::FirstBlock => f.write_str("FirstBlock"),
            Self::Committed {
                attempt,
                held_blocks,
                bytes,
                path,
                ..
            } => f
                .debug_struct("Committed")
                .field("attempt", attempt)
                .field("held_blocks", held_blocks)
                .field("bytes", bytes)
                .field("path", path)
                .finish_non_exhaustive(),
            Self::AttemptFailed { attempt, error } => f
                .debug_struct("AttemptFailed")
                .field("attempt", attempt)
                .field("error", error)
                .finish(),
        }
    }
}

/// One expected hand-over. Dropping it ends it: its epochs are fenced, its blocks quarantined and then freed.
pub struct Incoming {
    ticket: Ticket,
    events: mpsc::Receiver<IncomingEvent>,
    receiving: Arc<Receiving>,
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("ticket", &self.ticket)
            .finish_non_exhaustive()
    }
}

impl Incoming {
    pub(super) fn new(ticket: Ticket, events: mpsc::Receiver<IncomingEvent>, receiving: Arc<Receiving>) -> Self {
        Self {
            ticket,
            events,
            receiving,
        }
    }

    /// Its name.
    pub fn ticket(&self) -> Ticket {
        self.ticket
    }

    /// The next event. Pending for ever once `Committed` was given. Cancel safe.
    pub async fn next(&mut self) -> IncomingEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }

    /// Gives the hand-over to a later attempt: every earlier one is fenced from here on, without an event. An attempt that is
    /// not later changes nothing.
    pub fn supersede(&mut self, attempt: Attempt) {
        self.receiving.event(Event::Supersede {
            ticket: self.ticket,
            attempt,
        });
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.receiving.forget(self.ticket);
    }
}
