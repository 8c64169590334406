//! What a request is to the nodes that compute it.

use crate::{Attempt, BlockHash, Budget, Instance, ModelFingerprint, RequestId, SamplingParams, Ticket};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// One attempt at one request.
#[derive(Debug, Clone, PartialEq)]
pub struct Work {
    /// Whose.
    pub request_id: RequestId,
    /// The hand-over's name.
    pub ticket: Ticket,
    /// Which try.
    pub attempt: Attempt,
    /// Token ids as the client's text gave them.
    pub prompt: Vec<u32>,
    /// Token ids that the client already has.
    pub generated: Vec<u32>,
    /// How to draw the next ones.
    pub sampling: SamplingParams,
    /// Identities of the full blocks of prompt ++ generated.
    pub block_hashes: Vec<BlockHash>,
    /// What those identities were salted with: [`crate::CacheScope::salt`].
    pub cache_salt: String,
    /// What is left of its time.
    pub budget: Budget,
    /// The coordinator process that owns it.
    pub coordinator: Instance,
    /// The model it was tokenized for.
    pub fingerprint: ModelFingerprint,
}

impl Work {
    /// Prompt and generated tokens: those whose KV is needed before the next token can be drawn.
    pub fn context_tokens(&self) -> usize {
        self.prompt.len() + self.generated.len()
    }
}

/// A chosen token's log probability, and those of its strongest rivals (token id, log probability), strongest first.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TokenLogprobs {
    /// Natural logarithm, of the distribution before temperature and cuts.
    pub logprob: f32,
    /// The rivals.
    pub top: Vec<(u32, f32)>,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-sequence token or a stop string.
    Stop,
    /// max_tokens or the context's end.
    Length,
    /// Somebody asked.
    Cancelled,
}

/// What a node does for requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeRole {
    /// Makes KV.
    Prefill,
    /// Runs on with it.
    Decode,
}

impl fmt::Display for NodeRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        })
    }
}

impl FromStr for NodeRole {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "prefill" => Ok(Self::Prefill),
            "decode" => Ok(Self::Decode),
            _ => Err(format!("`{text}` is no role: expected prefill or decode")),
        }
    }
}

/// Where a node is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// Loading; takes no work.
    Starting,
    /// Takes work.
    Ready,
    /// Finishes what it has.
    Draining,
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
        })
    }
}
