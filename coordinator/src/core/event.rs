//! What happens to a request, and what is to be done about it.

use crate::{ApiError, PathFallback, Timeline};
use baton_types::{Attempt, FinishReason, Instance, NodeId, Ticket, TokenLogprobs};

/// One stream to one node, numbered within its request. What a closed leg still says is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Leg(pub(crate) u32);

/// A node, in one of its lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) instance: Instance,
}

/// Where a decode node's arena can be reached. The core only passes it on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) node: NodeId,
    pub(crate) instance: Instance,
    pub(crate) addresses: Vec<String>,
}

/// The nodes that routing chose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Placement {
    Pair { prefill: Node, decode: Node },
    Alone { decode: Node },
}

/// Consecutive tokens.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct TokenBatch {
    /// Index of the first among the generated tokens.
    pub(crate) first_index: usize,
    pub(crate) tokens: Vec<u32>,
    /// One per token, or none at all.
    pub(crate) logprobs: Vec<TokenLogprobs>,
}

/// What a decode node says of its own prefill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct LocalPrefill {
    pub(crate) queue_us: u64,
    pub(crate) prefill_us: u64,
    pub(crate) prefill_tokens: u32,
    pub(crate) cached_tokens: u32,
}

/// Why a leg ended badly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) kind: FailureKind,
    pub(crate) message: String,
}

/// What follows from a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FailureKind {
    /// The connection broke after the node had taken the work.
    Died,
    /// It could not be reached; it never saw the work.
    Unreachable,
    /// It, or its peer, has no place now.
    Full { peer: bool },
    /// It gave up; another attempt may succeed. `peer`: the other node of the pair, or the path to it, is at fault.
    Failed { peer: bool },
    /// It says that the request is at fault.
    Rejected,
    /// The request's time is over.
    Deadline,
    /// Another attempt would fail as well.
    Fatal,
}

/// What a decode node says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum DecodeEvent {
    Accepted {
        ticket: Ticket,
        peer: Peer,
    },
    Committed {
        attempt: Attempt,
        index: usize,
        token: u32,
        handover_bytes: u64,
        held_tokens: u32,
    },
    Tokens {
        batch: TokenBatch,
        local: Option<LocalPrefill>,
    },
    Finished {
        reason: FinishReason,
        decoded_tokens: u32,
        decode_us: u64,
    },
    /// The node wants to be rid of the sequence, which runs on.
    Leaving,
    /// How handing the sequence on ended; it runs on.
    HandedOn {
        ticket: Ticket,
        result: Result<Handover, Failure>,
    },
    Failed(Failure),
}

/// What a prefill node says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum PrefillEvent {
    Started { queue_us: u64, cached_tokens: u32 },
    FirstToken(FirstToken),
    HandedOver(Handover),
    Failed(Failure),
}

/// A hand-over as its sender saw it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Handover {
    pub(crate) path: String,
    pub(crate) fallbacks: Vec<PathFallback>,
    pub(crate) bytes: u64,
    pub(crate) exposed_us: u64,
    pub(crate) reserve_us: u64,
    /// The path was at work for it.
    pub(crate) busy_us: u64,
}

/// The first token of one attempt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct FirstToken {
    pub(crate) index: usize,
    pub(crate) token: u32,
    pub(crate) logprobs: Option<TokenLogprobs>,
    /// Set where it is the last one too.
    pub(crate) finish: Option<FinishReason>,
    pub(crate) prefill_us: u64,
    pub(crate) prefill_tokens: u32,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Event {
    /// The answer to [`Effect::Place`].
    Placed(Placement),
    /// The answer to [`Effect::PlaceMove`].
    MovePlaced(Node),
    /// No nodes, for good.
    NotPlaced(ApiError),
    Decode(Leg, DecodeEvent),
    Prefill(Leg, PrefillEvent),
    /// A stop string ended within what was delivered; so many tokens count.
    Stopped {
        completion_tokens: usize,
    },
    /// The client asked, or went away.
    Cancelled,
    DeadlinePassed,
    /// The answer to [`Effect::StartGrace`].
    GraceOver,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Effect {
    /// Choose nodes, none of `Request::excluded`. An earlier search still under way is given up.
    Place { keep_decode: Option<Instance> },
    /// Open a stream to a decode node; the tokens delivered so far go along as `generated`.
    OpenDecode {
        leg: Leg,
        node: Node,
        attempt: Attempt,
        local_prefill: bool,
    },
    /// Open a stream to a prefill node; `generated` is the first `base` tokens delivered.
    OpenPrefill {
        leg: Leg,
        node: Node,
        ticket: Ticket,
        attempt: Attempt,
        peer: Peer,
        base: usize,
    },
    /// Tell the decode node that its attempt is given up and that this one comes.
    Supersede { leg: Leg, attempt: Attempt },
    /// Choose a decode node that the sequence can be moved to, none of `Request::not_moved_to`; there is no hurry, and maybe no
    /// answer. An earlier search still under way is given up.
    PlaceMove,
    /// Open a stream to it; besides the tokens delivered so far, `ahead` tokens will come with the hand-over.
    OpenMove { leg: Leg, ahead: usize },
    /// Tell the decode node to hand its sequence on, up to so many tokens; the other one was told of `known` generated ones.
    HandOn {
        leg: Leg,
        ticket: Ticket,
        peer: Peer,
        context_tokens: usize,
        known: usize,
    },
    /// The stream that was opened for the move is that of the decode node now.
    Promote(Leg),
    /// Drop the stream, which cancels what the node does for it.
    Close(Leg),
    /// Show these to the client. Indexes rise by one, without gap or repeat.
    Deliver(TokenBatch),
    /// The node failed: let others not run into it for a moment.
    NodeFailed { node: Node, message: String },
    /// The node has no place: let others not run into it until it says otherwise.
    NodeFull(Node),
    /// Tell when the time allowed for the last figures of the timeline is over.
    StartGrace,
    /// The end. Nothing follows.
    End(Outcome),
}

/// How it ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    Finished {
        reason: FinishReason,
        completion_tokens: usize,
        cached_tokens: u32,
        timeline: Timeline,
    },
    Failed(ApiError),
}
