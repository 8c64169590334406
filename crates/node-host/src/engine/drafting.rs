//! Drafts of decoding sequences: guessed tokens that a step computes behind the last known one, so that several can be drawn
//! from it. Each token is drawn as ever, from its own place's logits; a draft only says how far the KV was computed with the
//! right tokens. What is drawn is therefore the same with drafts and without. KV behind the first wrong guess is of no token:
//! it is never read, stands in no full block, and is written over.

use super::lookup::{Guess, Lookup};
use super::slots::Slot;
use baton_scheduling::step::Part;
use baton_scheduling::step::speculation::{Acceptance, Batch, DRAFT_TOKENS_MAX, Proposal, Speculation as Learned};
use baton_types::KvGeometry;

/// Whether decoding sequences get drafts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Speculation {
    /// Never.
    Off,
    /// Where they make decoding faster, by what steps take and how many guesses are right.
    #[default]
    Auto,
    /// Whenever there is a guess, whatever it costs. For tests and measurements.
    Always,
}

/// One sequence's drafts.
#[derive(Debug, Default)]
pub(super) struct Drafting {
    known: Option<(Lookup, Acceptance)>,
    guess: Option<Guess>,
    /// The last known token and the draft behind it, in the step at hand; empty without a draft.
    line: Vec<u32>,
}

impl Drafting {
    /// Draft tokens of the step at hand.
    pub fn drafted(&self) -> &[u32] {
        self.line.get(1..).unwrap_or(&[])
    }

    /// The last known token and the draft behind it; empty without a draft.
    pub fn line(&self) -> &[u32] {
        &self.line
    }

    /// There is no step at hand, or none with a draft.
    pub fn clear(&mut self) {
        self.line.clear();
    }

    /// Looks for a guess at what follows `tokens`; `to_come` more at most are drawn.
    pub fn propose(&mut self, tokens: &[u32], to_come: usize, learned: &Learned) -> Option<Proposal> {
        let (lookup, acceptance) = self
            .known
            .get_or_insert_with(|| (Lookup::new(tokens.len() + to_come), learned.begin()));
        lookup.follow(tokens);
        // The last one that is drawn needs no draft: nothing is drawn from its own place.
        let most = to_come.saturating_sub(1).min(DRAFT_TOKENS_MAX);
        self.guess = lookup.guess(tokens).filter(|_| most > 0);
        let guess = self.guess?;
        Some(Proposal {
            tokens: most,
            chance: acceptance.chance(guess.kind),
        })
    }

    /// The guess is left out. True where one token is tried all the same.
    fn leave_out(&mut self) -> bool {
        self.known
            .as_mut()
            .is_some_and(|(_, acceptance)| acceptance.leave_out())
    }

    /// The next step has `count` draft tokens behind the last of `tokens`.
    pub fn take(&mut self, tokens: &[u32], count: usize) {
        self.line.clear();
        let (Some(guess), Some(last), true) = (self.guess, tokens.last(), count > 0) else {
            return;
        };
        self.line.push(*last);
        guess.tokens(tokens, count, &mut self.line);
    }
}

/// Who gets drafts, on the whole node.
pub(super) struct Drafter {
    speculation: Speculation,
    learned: Learned,
}

/// What bounds the drafts of a step.
pub(super) struct Bounds<'a> {
    pub geometry: &'a KvGeometry,
    /// The model's longest sequence, in tokens.
    pub context_tokens: usize,
    /// Blocks that drafts may take; the rest is for what is sure to be needed.
    pub blocks: usize,
}

impl Drafter {
    pub fn new(speculation: Speculation) -> Self {
        Self {
            speculation,
            learned: Learned::default(),
        }
    }

    /// Gives drafts to the decoding sequences of a step.
    pub fn draft(&mut self, running: &mut [Slot], parts: &[Part], bounds: Bounds<'_>) {
        let mut batch = Batch {
            sequences: 0,
            prompt_tokens: 0,
        };
        let (mut proposals, mut whose) = (Vec::new(), Vec::new());
        for part in parts {
            let slot = &mut running[part.index];
            slot.drafting.clear();
            if !slot.decoding {
                batch.prompt_tokens += part.tokens;
                continue;
            }
            batch.sequences += 1;
            if self.speculation != Speculation::Off
                && let Some(proposal) = slot.propose_draft(bounds.context_tokens, &self.learned)
            {
                proposals.push(proposal);
                whose.push(part.index);
            }
        }
        if proposals.is_empty() {
            return;
        }
        let lengths = match self.speculation {
            Speculation::Off => return,
            Speculation::Auto => self.learned.lengths(&proposals, batch),
            Speculation::Always => proposals.iter().map(|proposal| proposal.tokens).collect(),
        };
        let mut blocks = bounds.blocks;
        for (index, length) in whose.into_iter().zip(lengths) {
            let slot = &mut running[index];
            let tried = length == 0 && slot.drafting.leave_out();
            slot.take_draft(length.max(usize::from(tried)), &mut blocks, bounds.geometry);
        }
    }

    /// A step of `sequences` decoding sequences and nothing else took `seconds`.
    pub fn step_took(&mut self, sequences: usize, drafted: usize, seconds: f64) {
        self.learned.step_took(sequences, drafted, seconds);
    }

    /// Of a slot's draft of `drafted` tokens, the first `accepted` were right, and the next was not.
    pub fn verified(&mut self, slot: &mut Slot, drafted: usize, accepted: usize) {
        if let (Some((_, acceptance)), Some(guess)) = (&mut slot.drafting.known, slot.drafting.guess) {
            self.learned.verified(acceptance, guess.kind, drafted, accepted);
        }
    }
}
