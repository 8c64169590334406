//! One request as the engine thread sees it, and what it tells of it.

use super::constraint::Constraint;
use baton_engine::{BlockTable, StepError};
use baton_node_runtime::Moment;
use baton_text::GrammarError;
use baton_types::{BlockHash, BlockHashChain, FinishReason, RequestId, SamplingParams, TokenLogprobs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::mpsc;

/// How a sequence begins.
#[derive(Debug)]
pub enum Beginning {
    /// Nothing is computed yet: it waits for blocks.
    Compute,
    /// All but the last known token's KV is in this table.
    Resume(BlockTable),
}

/// When a sequence ends, besides by its own limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// With the first token that it draws; its table is given away then.
    FirstToken,
    /// At end-of-sequence, `max_tokens` or the context's end.
    End,
}

/// A sequence to compute.
#[derive(Debug)]
pub struct SequenceSpec {
    /// Whose, for logs.
    pub request_id: RequestId,
    /// The client's tokens.
    pub prompt: Vec<u32>,
    /// Tokens generated so far.
    pub generated: Vec<u32>,
    /// How to draw.
    pub sampling: SamplingParams,
    /// Where `generated` is in the grammar of `sampling`; present where there is one.
    pub constraint: Option<Constraint>,
    /// Identities of leading full blocks.
    pub hashes: Vec<BlockHash>,
    /// The chain behind `hashes`, where it is known: blocks that fill up later get identities by it.
    pub chain: Option<BlockHashChain>,
    /// Until when.
    pub deadline: Moment,
    /// How it begins.
    pub beginning: Beginning,
    /// When it ends.
    pub until: Until,
    /// After how many layers of its last chunk it is told so, ascending; empty where nobody wants to know.
    pub layer_borders: Arc<[u32]>,
    /// Shared with the request's task.
    pub control: Arc<Control>,
    /// Where its events go. Never waited for: it must have room for all tokens to come.
    pub events: mpsc::Sender<SequenceEvent>,
}

/// A wish to read a sequence's blocks while it goes on.
#[derive(Debug)]
pub struct ShareWish {
    /// So many leading blocks, of which the sequence may not have all yet.
    pub blocks: usize,
    /// Where they go, each as soon as it is full, in order. What finds no room is sent again after a later step.
    pub to: mpsc::Sender<SharedBlocks>,
}

/// Full blocks of a sequence that goes on: nothing of them changes any more.
#[derive(Debug)]
pub struct SharedBlocks {
    /// Place of the first among the sequence's blocks.
    pub first: usize,
    /// They stay as long as this does.
    pub table: BlockTable,
}

/// What a request's task tells its sequence. After a change, `EngineHandle::wake`.
#[derive(Debug)]
pub struct Control {
    cancelled: AtomicBool,
    may_continue: AtomicBool,
    /// There is a wish that the engine has not taken yet.
    wished: AtomicBool,
    wish: Mutex<Option<ShareWish>>,
}

impl Control {
    /// `may_continue`: beyond its first chunk.
    pub fn new(may_continue: bool) -> Arc<Self> {
        Arc::new(Self {
            cancelled: AtomicBool::new(false),
            may_continue: AtomicBool::new(may_continue),
            wished: AtomicBool::new(false),
            wish: Mutex::new(None),
        })
    }

    /// The sequence is to share its blocks. A later wish takes the place of one before.
    pub fn share(&self, wish: ShareWish) {
        *self.wish.lock().unwrap_or_else(PoisonError::into_inner) = Some(wish);
        self.wished.store(true, Ordering::Release);
    }

    /// A wish that came since the last look.
    pub(super) fn take_wish(&self) -> Option<ShareWish> {
        if !self.wished.swap(false, Ordering::AcqRel) {
            return None;
        }
        self.wish.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Nobody wants the sequence any more: computing stops at the next layer.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// The sequence may go beyond its first chunk.
    pub fn let_continue(&self) {
        self.may_continue.store(true, Ordering::Release);
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    pub(super) fn may_continue(&self) -> bool {
        self.may_continue.load(Ordering::Acquire)
    }
}

/// A token that the engine drew.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// Its place among the generated tokens, from 0.
    pub index: u32,
    /// Its id.
    pub token: u32,
    /// Where they were asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// Set where it is the last one.
    pub finish: Option<FinishReason>,
}

/// What becomes of a sequence, in order.
#[derive(Debug)]
pub enum SequenceEvent {
    /// It has blocks and its first chunk begins. Comes again where it gave way and began anew: then only the newest counts.
    Started {
        /// With [`Until::FirstToken`]: its blocks, as long as it keeps them. Else it names none.
        table: Weak<BlockTable>,
        /// Leading blocks that came from the prefix cache.
        held_blocks: usize,
        /// How long it waited.
        queued: Duration,
    },
    /// The KV of this many leading tokens is final. Left out where the channel is full, since the next one says more.
    Computed {
        /// How many.
        tokens: usize,
    },
    /// The KV of all known tokens is final in this many leading layers, while the others are being computed. Left out where
    /// the channel is full. Where the step is broken off and computed anew, the same bits are written once more.
    Layers {
        /// How many tokens are known.
        tokens: usize,
        /// How many layers.
        layers: u32,
    },
    /// The next token.
    Token {
        /// Which.
        drawn: Drawn,
        /// With [`Until::FirstToken`]: the sequence's blocks, now the receiver's.
        table: Option<Arc<BlockTable>>,
        /// From the first chunk's begin, with the first token that follows computed prompt tokens.
        prefill: Option<PrefillDone>,
        /// When its step had ended.
        at: Moment,
        /// Draft tokens of its step, told with the first token that was drawn from it.
        drafted: u32,
        /// It was drawn from the same step as the token before it.
        extra: bool,
    },
    /// It ended without its last token.
    Failed {
        /// Why.
        error: SequenceError,
    },
}

/// What computing a prompt took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefillDone {
    /// From the first chunk's begin to the first token.
    pub took: Duration,
    /// Tokens computed, those from the cache left out.
    pub tokens: usize,
}

/// Why a sequence ended early.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SequenceError {
    /// The backend refused it.
    #[error("the engine failed: {0}")]
    Step(StepError),
    /// A block that was to be zeroed lies outside the arena.
    #[error("the engine failed: {0}")]
    Arena(#[from] baton_types::OutOfArena),
    /// The output cannot go on as it must.
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    /// The node is going down.
    #[error("the node is shutting down")]
    ShuttingDown,
}

impl SequenceError {
    /// Another node may do better.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Step(_) | Self::Arena(_) | Self::Grammar(_) => false,
            Self::ShuttingDown => true,
        }
    }
}
