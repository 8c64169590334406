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

/// The last word of a hand-over: the token that the decode node goes on from, and the generated ones before it that it was
/// not told yet. A prefill node's is one token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastWord {
    /// Place of the first of them among the generated tokens.
    pub first_index: u32,
    /// At least one.
    pub tokens: Vec<u32>,
}

impl LastWord {
    /// Little-endian, four bytes each: index, tokens.
    pub fn encode(&self) -> Bytes {
        let words = std::iter::once(&self.first_index).chain(&self.tokens);
        words.flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Reads it; `None` where it is none.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks();
        let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
        let (first_index, tokens) = (words.next()?, words.collect::<Vec<u32>>());
        (rest.is_empty() && !tokens.is_empty()).then_some(Self { first_index, tokens })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_last_word_survives_and_nothing_else_is_read(
            first_index in any::<u32>(),
            tokens in prop::collection::vec(any::<u32>(), 1..9),
            junk in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let word = LastWord { first_index, tokens };
            prop_assert_eq!(LastWord::decode(&word.encode()), Some(word));
            prop_assert_eq!(LastWord::decode(&junk).is_some(), junk.len() >= 8 && junk.len() % 4 == 0);
        }
    }
}
