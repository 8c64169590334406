//! What the tasks of both roles need: the guard that ends a sequence with its request, the word on how it ended, and the
//! form of what a prefill node tells a decode node at the end of a hand-over.

use crate::engine::{Control, EngineHandle};
use baton_types::NodeRole;
use bytes::Bytes;
use std::sync::Arc;

/// Cancels a sequence when dropped. Cancelling what is over already changes nothing.
pub struct CancelOnDrop {
    control: Arc<Control>,
    engine: EngineHandle,
}

impl CancelOnDrop {
    /// For the sequence of `control`.
    pub fn new(control: Arc<Control>, engine: EngineHandle) -> Self {
        Self { control, engine }
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.control.cancel();
        self.engine.wake();
    }
}

/// How a request ended on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As it should.
    Done,
    /// The coordinator gave it up.
    Cancelled,
    /// Its time ran out.
    Deadline,
    /// It was not taken.
    Refused,
    /// It failed.
    Failed,
}

impl Outcome {
    /// Its name in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Deadline => "deadline",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }

    /// Counts it.
    pub fn count(self, role: NodeRole) {
        let role = match role {
            NodeRole::Prefill => "prefill",
            NodeRole::Decode => "decode",
        };
        metrics::counter!("baton_node_requests_total", "role" => role, "outcome" => self.name()).increment(1);
    }
}

/// The last word of a hand-over: the first token, which the decode node goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirstTokenPayload {
    /// Its place among the generated tokens.
    pub index: u32,
    /// Its id.
    pub token: u32,
}

impl FirstTokenPayload {
    /// Eight bytes, little-endian: index, token.
    pub fn encode(self) -> Bytes {
        let mut bytes = Vec::with_capacity(8);
        bytes.extend_from_slice(&self.index.to_le_bytes());
        bytes.extend_from_slice(&self.token.to_le_bytes());
        bytes.into()
    }

    /// Reads it; `None` where it is none.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (index, token) = bytes.split_at_checked(4)?;
        Some(Self {
            index: u32::from_le_bytes(index.try_into().ok()?),
            token: u32::from_le_bytes(token.try_into().ok()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_payload_survives_and_nothing_else_is_read(index in any::<u32>(), token in any::<u32>(), junk in prop::collection::vec(any::<u8>(), 0..12)) {
            let payload = FirstTokenPayload { index, token };
            prop_assert_eq!(FirstTokenPayload::decode(&payload.encode()), Some(payload));
            prop_assert_eq!(FirstTokenPayload::decode(&junk).is_some(), junk.len() == 8);
        }
    }
}
