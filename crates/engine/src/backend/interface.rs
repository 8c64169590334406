//! The border between a backend and its users: one forward pass over slices of sequences.
//!
//! Invariant that every backend keeps: a token's logits and KV are bit-identical whatever the batch, the chunking, the
//! placement of blocks, and whether the token came as prefill or as decode. The caller owns the blocks that it names.

use crate::error::StepError;
use crate::model::ModelConfig;
use baton_types::{ArenaView, BlockId, ModelFingerprint, NumericsId};
use std::ops::ControlFlow;

/// A loaded model that computes steps.
pub trait Backend: Send {
    /// Hyperparameters.
    fn config(&self) -> &ModelConfig;

    /// What these weights are.
    fn fingerprint(&self) -> ModelFingerprint;

    /// What decides the bits that it computes, beside the weights.
    fn numerics(&self) -> &NumericsId;

    /// Whether this is the scripted stand-in that no user may take for a model.
    fn is_stub(&self) -> bool;

    /// One forward pass over all slices; writes their K/V into the arena and gives logits rows in slice order.
    ///
    /// The caller owns every block that a slice names: it may be read by others below `start` only, and be written by
    /// this call from `start` on. A block that one slice writes may stand in no other slice.
    ///
    /// # Errors
    /// Input that cannot be computed is refused before anything is written; [`StepError::Aborted`] where the observer
    /// broke off: K/V of the layers after it is then undefined.
    fn step(
        &mut self,
        arena: &ArenaView,
        batch: &[Slice<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutput, StepError>;
}

/// Consecutive tokens of one sequence: a chunk of its prompt, or its newest token.
#[derive(Debug, Clone, Copy)]
pub struct Slice<'a> {
    /// Ids to run, in order; at least one.
    pub tokens: &'a [u32],
    /// Position of `tokens[0]` in its sequence; all before are in the blocks already.
    pub start: usize,
    /// The sequence's blocks in order; they cover `start + tokens.len()` tokens.
    pub blocks: &'a [BlockId],
    /// Which tokens' logits to give.
    pub logits: WantedLogits,
}

/// Which of a slice's tokens give a row of logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantedLogits {
    /// None: more of the prompt comes.
    None,
    /// The last one.
    Last,
    /// Each.
    All,
}

impl WantedLogits {
    /// Rows that a slice of `tokens` tokens gives.
    pub fn rows(self, tokens: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Last => tokens.min(1),
            Self::All => tokens,
        }
    }
}

/// Told of progress within a step; can break it off.
pub trait StepObserver {
    /// The K/V of layer `layer` of all slices is in the arena. `Break` aborts the step: nothing after it is computed.
    fn layer_done(&mut self, layer: u32) -> ControlFlow<()>;
}

/// Nobody watches.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl StepObserver for Unobserved {
    fn layer_done(&mut self, _layer: u32) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// The wanted logits.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepOutput {
    /// Length of a row.
    pub vocab: usize,
    /// `(rows, vocab)`, in slice order.
    pub logits: Vec<f32>,
}

impl StepOutput {
    /// One row: `(vocab,)`.
    ///
    /// # Panics
    /// Where there is no such row.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.logits[index * self.vocab..(index + 1) * self.vocab]
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.logits.len().checked_div(self.vocab).unwrap_or(0)
    }
}
