//! What routing is asked, and what it answers.

use super::{Policy, Prediction};
use crate::HandoverTimes;
use baton_types::Instance;
use std::time::Duration;

/// What is asked.
#[derive(Debug, Clone)]
pub struct RouteRequest<'a> {
    /// Tokens whose KV is needed before the next token can be drawn: the prompt and what was generated so far.
    pub context_tokens: u32,
    /// Nodes that must not be chosen: they failed under this request.
    pub excluded: &'a [Instance],
    /// The decode node that already waits for this request's KV; it is kept where it can be.
    pub keep_decode: Option<Instance>,
    /// How to choose.
    pub policy: Policy,
    /// Bounds that the choice should keep to. None once the client has a token: such a request is never refused for them.
    pub slo: Slo,
    /// Counts requests up: whose turn it is, and what the policies that draw lots draw from.
    pub turn: u64,
    /// How long hand-overs take.
    pub handovers: &'a HandoverTimes,
}

/// Bounds on one request's times, as far as there are any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Slo {
    /// From now to the first token. The request is refused where no choice is predicted to keep to it; but one of
    /// [`PROBE_TURNS`] is tried on an idle node all the same, so that predictions that are wrong are found out.
    pub ttft: Option<Duration>,
    /// Between two tokens. The request is held where no choice is predicted to keep to it, and one may later.
    pub itl: Option<Duration>,
}

/// Nodes that could serve the request, and what that is predicted to be like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Who prefills; none where the decode node does.
    pub prefill: Option<Instance>,
    /// Who decodes.
    pub decode: Instance,
    /// Tokens of the context that the node which prefills would compute.
    pub prefill_tokens: u32,
    /// Tokens of the context whose KV would be handed over.
    pub handover_tokens: u32,
    /// The decode node has free blocks for the context now.
    pub room: bool,
    /// Prompts of the node that prefills were seen; else its times are a guess, and no request is refused for them.
    pub measured: bool,
    /// The node that prefills has nothing else to compute.
    pub idle: bool,
    /// What it would be like.
    pub predicted: Prediction,
}

/// The choice.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// These nodes serve it.
    Place(Candidate),
    /// Nobody takes it now; it is worth waiting until their load changes.
    Hold {
        /// What it waits for.
        reason: HoldReason,
    },
    /// Nobody takes it, and waiting is of no use.
    Refuse {
        /// Why.
        reason: RefuseReason,
        /// When to ask again.
        retry_after: Duration,
    },
}

/// The choice, and what it was made from.
#[derive(Debug, Clone, PartialEq)]
pub struct Routed {
    /// The choice.
    pub decision: Decision,
    /// What was weighed, the cheapest first; at most [`CANDIDATES_MAX`].
    pub candidates: Vec<Candidate>,
}

/// See [`Slo::ttft`].
pub const PROBE_TURNS: u64 = 16;

/// Candidates that a choice is explained with.
pub const CANDIDATES_MAX: usize = 16;

/// Why a request is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HoldReason {
    /// Their bounds are reached.
    #[error("the queue of every {role} node is full")]
    QueuesFull {
        /// Of which kind.
        role: &'static str,
    },
    /// One more sequence would make every decode node too slow.
    #[error("with one more sequence every decode node would take {itl:?} per token")]
    TooSlow {
        /// The best that is predicted.
        itl: Duration,
    },
}

/// Why nobody takes a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RefuseReason {
    /// None that has not failed under this request.
    #[error("no decode node is ready")]
    NoDecodeNode,
    /// It would not fit even into an empty arena.
    #[error("{needed} KV blocks are needed, but the largest {role} node has {largest}")]
    TooLarge {
        /// Of which kind.
        role: &'static str,
        /// For the context and one more token.
        needed: u32,
        /// What there is.
        largest: u32,
    },
    /// The first token would come too late.
    #[error("the first token is predicted in {predicted:?}, and {allowed:?} are left for it")]
    TooLate {
        /// The soonest, by prediction.
        predicted: Duration,
        /// What is left of the bound.
        allowed: Duration,
    },
}

impl RefuseReason {
    /// The same request may be taken later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NoDecodeNode | Self::TooLate { .. } => true,
            Self::TooLarge { .. } => false,
        }
    }
}
