//! How many draft tokens each decoding sequence gets in a step: as many as make the whole batch faster.
//!
//! A draft is a guess at the tokens that follow; a step that computes them too is a little longer, and gives a token more
//! for each that was right. What a step takes is learned from steps, how often guesses are right from guesses.

use crate::regression::Regression;

/// Most draft tokens of one sequence in one step. With the token before them they are as many as the engine's attention
/// still shares out among its threads as it does one.
pub const DRAFT_TOKENS_MAX: usize = 7;
/// Kinds of guesses, by how much speaks for them: those of one kind are right about equally often.
pub const KINDS: usize = 5;
/// A sequence whose guesses do not pay is tried again after it left out so many.
const RETRY_AFTER: u32 = 64;
/// Drafts must make the batch so much faster: what is learned is never exact.
const GAIN_MIN: f64 = 1.02;
/// How much longer a step may become where some sequence in it has no draft and only waits.
const OTHERS_SLOWED_MAX: f64 = 0.25;
/// How likely each kind is to be right where nothing is known yet.
const CHANCES_FIRST: [f64; KINDS] = [0.3, 0.3, 0.45, 0.65, 0.8];
/// Weight of the newest guess, in one sequence and on the whole node.
const NEWEST: f64 = 1.0 / 12.0;
const NEWEST_ON_NODE: f64 = 1.0 / 128.0;

/// How often guesses of each kind are right.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Chances([f64; KINDS]);

impl Chances {
    /// Of a draft of `drafted` tokens, the first `accepted` were right; those behind the first wrong one say nothing.
    fn learn(&mut self, kind: usize, drafted: usize, accepted: usize, newest: f64) {
        let chance = &mut self.0[kind.min(KINDS - 1)];
        for _ in 0..accepted.min(drafted) {
            *chance += newest * (1.0 - *chance);
        }
        if accepted < drafted {
            *chance -= newest * *chance;
        }
    }
}

/// What one sequence's guesses were worth so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Acceptance {
    chances: Chances,
    /// Guesses left out since the last one that was tried.
    left_out: u32,
}

impl Acceptance {
    /// How likely a guess of this kind is right.
    pub fn chance(&self, kind: usize) -> f64 {
        self.chances.0[kind.min(KINDS - 1)]
    }

    /// A guess was left out. True where it is time to try one token all the same.
    pub fn leave_out(&mut self) -> bool {
        self.left_out += 1;
        let due = self.left_out >= RETRY_AFTER;
        if due {
            self.left_out = 0;
        }
        due
    }
}

/// What is learned of a whole node's drafts.
#[derive(Debug, Clone, PartialEq)]
pub struct Speculation {
    chances: Chances,
    /// Seconds of a step: itself, per decoding sequence, per draft token.
    costs: Regression<3>,
}

impl Default for Speculation {
    fn default() -> Self {
        Self {
            chances: Chances(CHANCES_FIRST),
            // One sequence is bound by reading the weights, and tokens beside the first cost a tenth of it.
            costs: Regression::new([1e-2, 1e-3, 1e-3]),
        }
    }
}

/// A sequence that could get a draft.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Proposal {
    /// So many tokens at most.
    pub tokens: usize,
    /// How likely each is right where those before it are.
    pub chance: f64,
}

/// What a step computes beside drafts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Sequences that decode, with a proposal or without.
    pub sequences: usize,
    /// Prompt tokens.
    pub prompt_tokens: usize,
}

impl Speculation {
    /// Of a sequence that begins.
    pub fn begin(&self) -> Acceptance {
        Acceptance {
            chances: self.chances,
            left_out: 0,
        }
    }

    /// A step of `sequences` decoding sequences and nothing else took `seconds`.
    pub fn step_took(&mut self, sequences: usize, drafted: usize, seconds: f64) {
        self.costs.observe([1.0, sequences as f64, drafted as f64], seconds);
    }

    /// Of a draft of `drafted` tokens of this kind the first `accepted` were right.
    pub fn verified(&mut self, of: &mut Acceptance, kind: usize, drafted: usize, accepted: usize) {
        of.left_out = 0;
        of.chances.learn(kind, drafted, accepted, NEWEST);
        self.chances.learn(kind, drafted, accepted, NEWEST_ON_NODE);
    }

    /// Tokens of each proposal's draft, such that the batch gets the most tokens per second; all 0 where none helps.
    ///
    /// Tokens over time is a ratio, so that a token belongs to the best choice where its chance over its cost is at least
    /// that choice's own ratio: found by raising the ratio from none (Dinkelbach, *On Nonlinear Fractional Programming*, 1967).
    pub fn lengths(&self, proposals: &[Proposal], batch: Batch) -> Vec<usize> {
        let [fixed, per_sequence, per_draft] = self.costs.coefficients();
        let work = (batch.sequences + batch.prompt_tokens) as f64;
        let alone = fixed + per_sequence * batch.sequences as f64 + per_draft * batch.prompt_tokens as f64;
        let rate = |lengths: &[usize]| {
            let right: f64 = lengths.iter().zip(proposals).map(|(n, p)| right(*p, *n)).sum();
            let drafted = lengths.iter().sum::<usize>() as f64;
            (work + right) / (alone + per_draft * drafted).max(f64::MIN_POSITIVE)
        };
        let none = vec![0; proposals.len()];
        let rate_alone = rate(&none);
        let mut lengths = none.clone();
        for _ in 0..3 {
            let least = rate(&lengths) * per_draft;
            lengths = proposals.iter().map(|p| tokens_above(*p, least)).collect();
        }
        let waits = lengths.iter().filter(|n| **n > 0).count() < batch.sequences;
        if waits || batch.prompt_tokens > 0 {
            let most = OTHERS_SLOWED_MAX * alone / per_draft.max(f64::MIN_POSITIVE);
            for cap in (0..DRAFT_TOKENS_MAX).rev() {
                if lengths.iter().sum::<usize>() as f64 <= most {
                    break;
                }
                lengths.iter_mut().for_each(|n| *n = (*n).min(cap));
            }
        }
        if rate(&lengths) >= GAIN_MIN * rate_alone {
            lengths
        } else {
            none
        }
    }
}

/// Tokens of a draft of `tokens` that are right, on average.
fn right(proposal: Proposal, tokens: usize) -> f64 {
    (1..=tokens).map(|n| power(proposal.chance, n)).sum()
}

/// Leading tokens whose chance to be right, with all before them, is at least `least`.
fn tokens_above(proposal: Proposal, least: f64) -> usize {
    (1..=proposal.tokens.min(DRAFT_TOKENS_MAX))
        .take_while(|n| power(proposal.chance, *n) >= least)
        .count()
}

fn power(chance: f64, n: usize) -> f64 {
    chance.powi(i32::try_from(n).unwrap_or(i32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A node whose steps take 10 ms, one more per sequence and so much per draft token.
    fn learned(per_draft: f64) -> Speculation {
        let mut speculation = Speculation::default();
        for i in 0..200usize {
            let (sequences, drafted) = (1 + i % 4, i * 7 % 8);
            let seconds = 0.010 + 0.001 * sequences as f64 + per_draft * drafted as f64;
            speculation.step_took(sequences, drafted, seconds);
        }
        speculation
    }

    fn alone(speculation: &Speculation, chance: f64) -> usize {
        let batch = Batch {
            sequences: 1,
            prompt_tokens: 0,
        };
        speculation.lengths(&[Proposal { tokens: 9, chance }], batch)[0]
    }

    #[test]
    fn likely_guesses_are_drafted_and_dear_or_unlikely_ones_are_not() {
        let cheap = learned(0.001);
        assert_eq!(alone(&cheap, 0.95), DRAFT_TOKENS_MAX);
        assert!((1..4).contains(&alone(&cheap, 0.4)), "{}", alone(&cheap, 0.4));
        assert_eq!(alone(&cheap, 0.05), 0);
        let dear = learned(0.009);
        assert_eq!(alone(&dear, 0.5), 0);
        assert!(alone(&dear, 0.99) > 0);
    }

    #[test]
    fn a_sequence_without_draft_is_slowed_within_bounds() {
        let speculation = learned(0.001);
        let likely = Proposal {
            tokens: 7,
            chance: 0.99,
        };
        let lengths = |sequences| {
            let batch = Batch {
                sequences,
                prompt_tokens: 0,
            };
            speculation.lengths(&[likely], batch)[0]
        };
        assert_eq!(lengths(1), 7);
        let beside_another = lengths(2);
        assert!((1..=3).contains(&beside_another), "{beside_another}");
    }

    #[test]
    fn what_was_right_is_drafted_on_and_what_was_wrong_is_tried_again_later() {
        let mut speculation = learned(0.001);
        let mut acceptance = speculation.begin();
        let first = acceptance.chance(2);
        speculation.verified(&mut acceptance, 2, 4, 4);
        assert!(acceptance.chance(2) > first);
        (0..60).for_each(|_| speculation.verified(&mut acceptance, 2, 4, 0));
        assert_eq!(alone(&speculation, acceptance.chance(2)), 0);
        assert_eq!(
            acceptance.chance(4),
            speculation.begin().chance(4),
            "other kinds are untouched"
        );
        let tried = (0..256).filter(|_| acceptance.leave_out()).count();
        assert_eq!(tried, 4);
        assert!(
            speculation.begin().chance(2) < first,
            "the next sequence begins with what the node knows"
        );
    }

    proptest! {
        #[test]
        fn lengths_stay_within_bounds(
            proposals in prop::collection::vec((0usize..12, 0.0f64..=1.0), 0..9),
            more in 0usize..5,
            prompt_tokens in prop_oneof![Just(0usize), 1usize..300],
            steps in prop::collection::vec((1usize..9, 0usize..20, 0.0f64..1.0), 0..40),
        ) {
            let mut speculation = Speculation::default();
            steps.iter().for_each(|(s, d, t)| speculation.step_took(*s, *d, *t));
            let proposals: Vec<Proposal> =
                proposals.iter().map(|(tokens, chance)| Proposal { tokens: *tokens, chance: *chance }).collect();
            let batch = Batch { sequences: proposals.len() + more, prompt_tokens };
            let lengths = speculation.lengths(&proposals, batch);
            prop_assert_eq!(lengths.len(), proposals.len());
            for (length, proposal) in lengths.iter().zip(&proposals) {
                prop_assert!(*length <= proposal.tokens.min(DRAFT_TOKENS_MAX));
            }
        }
    }
}
