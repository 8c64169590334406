//! What a node computes next: which sequences' tokens go into one step, in which order waiting ones are let in, and who
//! gives way when blocks run out.
//!
//! Decoding sequences are in every step (continuous batching); prompts share what is left of one chunk, the earliest
//! deadline first. A chunk ends at a block's border unless it ends its prompt, so that whole blocks can be handed over.

pub mod speculation;

use std::time::Duration;

/// Bounds of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Tokens of one KV block.
    pub block_tokens: usize,
    /// Prompt tokens of one step; at least `block_tokens`.
    pub chunk_tokens: usize,
}

/// One sequence that has blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Tokens whose KV is there.
    pub computed: usize,
    /// Tokens that are known; those from `computed` on can be computed.
    pub known: usize,
    /// It drew its last token itself: it is one token per step from here on.
    pub decoding: bool,
    /// It must not be computed now (it waits for a reservation elsewhere).
    pub held_back: bool,
    /// What is left of its time.
    pub time_left: Duration,
    /// Counts up: who came later has more.
    pub arrival: u64,
}

/// Part of a step: `tokens` of the candidate at `index`, from its `computed` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Place among the candidates.
    pub index: usize,
    /// How many tokens.
    pub tokens: usize,
}

/// Chooses the next step's parts; empty where nothing can be computed. Decoding sequences come first, by index.
pub fn step(candidates: &[Candidate], limits: &StepLimits) -> Vec<Part> {
    let able = |c: &Candidate| !c.held_back && c.computed < c.known;
    let indexed = || candidates.iter().enumerate().filter(|(_, c)| able(c));
    let mut parts: Vec<Part> = indexed()
        .filter(|(_, c)| c.decoding)
        .map(|(index, _)| Part { index, tokens: 1 })
        .collect();
    let mut prompts: Vec<(usize, &Candidate)> = indexed().filter(|(_, c)| !c.decoding).collect();
    prompts.sort_by_key(|(_, c)| (c.time_left, c.arrival));
    let mut left = limits.chunk_tokens.max(limits.block_tokens);
    for (index, candidate) in prompts {
        let tokens = chunk(candidate, left, limits.block_tokens);
        if tokens > 0 {
            parts.push(Part { index, tokens });
            left -= tokens;
        }
    }
    parts
}

/// Tokens of a chunk of at most `most`: all the rest, or up to a block's border; 0 where not even one block fits.
fn chunk(candidate: &Candidate, most: usize, block_tokens: usize) -> usize {
    let end = candidate.computed + most;
    if end >= candidate.known {
        return candidate.known - candidate.computed;
    }
    (end - end % block_tokens).saturating_sub(candidate.computed)
}

/// One sequence that waits for blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiter {
    /// It was running, gave way and could go on: it goes before those that never ran.
    pub preempted: bool,
    /// What is left of its time.
    pub time_left: Duration,
    /// Counts up: who came later has more.
    pub arrival: u64,
}

/// Which waiter is let in next; none where none waits.
pub fn next_in(waiters: &[Waiter]) -> Option<usize> {
    let order = |w: &Waiter| (!w.preempted, w.time_left, w.arrival);
    waiters
        .iter()
        .enumerate()
        .min_by_key(|(_, waiter)| order(waiter))
        .map(|(index, _)| index)
}

/// Whether a waiter is let in now: where the prompts at hand do not fill the next chunk, or its deadline comes before
/// theirs, or it gave way before. Else it keeps waiting, so that blocks here and reservations elsewhere are taken late.
pub fn lets_in(candidates: &[Candidate], waiter: &Waiter, limits: &StepLimits) -> bool {
    let at_hand = || {
        candidates
            .iter()
            .filter(|c| !c.held_back && !c.decoding && c.computed < c.known)
    };
    let tokens: usize = at_hand().map(|c| c.known - c.computed).sum();
    let earliest = at_hand().map(|c| c.time_left).min();
    waiter.preempted || tokens < limits.chunk_tokens || earliest.is_some_and(|earliest| waiter.time_left < earliest)
}

/// Who gives its blocks back so that another can go on: the newest one.
pub fn gives_way(candidates: &[Candidate]) -> Option<usize> {
    candidates
        .iter()
        .enumerate()
        .max_by_key(|(_, c)| c.arrival)
        .map(|(index, _)| index)
}

/// Who gives its blocks back so that a waiter can be let in: among those held back, the one with the most time left, and
/// only where that is more than the waiter's. One that gave way before and could go on now has a reservation elsewhere that
/// must not wait: it displaces any.
pub fn gives_way_to(candidates: &[Candidate], waiter: &Waiter) -> Option<usize> {
    let held_back = candidates
        .iter()
        .enumerate()
        .filter(|(_, c)| c.held_back && (waiter.preempted || c.time_left > waiter.time_left));
    held_back
        .max_by_key(|(_, c)| (c.time_left, c.arrival))
        .map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: StepLimits = StepLimits {
        block_tokens: 16,
        chunk_tokens: 64,
    };

    fn prompt(computed: usize, known: usize, seconds: u64) -> Candidate {
        let time_left = Duration::from_secs(seconds);
        Candidate {
            computed,
            known,
            decoding: false,
            held_back: false,
            time_left,
            arrival: seconds,
        }
    }

    fn decoding(arrival: u64) -> Candidate {
        Candidate {
            decoding: true,
            arrival,
            ..prompt(20, 21, 1)
        }
    }

    #[test]
    fn decoding_sequences_are_always_in_and_prompts_share_a_chunk_by_deadline() {
        let all = [
            prompt(0, 40, 9),
            decoding(1),
            prompt(0, 1000, 5),
            decoding(2),
            prompt(0, 20, 3),
        ];
        let parts = step(&all, &LIMITS);
        let expected = [(1, 1), (3, 1), (4, 20), (2, 32)];
        assert_eq!(parts, expected.map(|(index, tokens)| Part { index, tokens }));
        assert!(step(&[], &LIMITS).is_empty());
        assert!(
            step(
                &[Candidate {
                    held_back: true,
                    ..prompt(0, 9, 1)
                }],
                &LIMITS
            )
            .is_empty()
        );
        assert!(step(&[prompt(9, 9, 1)], &LIMITS).is_empty());
    }

    #[test]
    fn preempted_waiters_go_first_and_the_newest_gives_way() {
        let waiter = |preempted, seconds, arrival| Waiter {
            preempted,
            time_left: Duration::from_secs(seconds),
            arrival,
        };
        assert_eq!(
            next_in(&[waiter(false, 1, 0), waiter(true, 9, 1), waiter(true, 8, 2)]),
            Some(2)
        );
        assert_eq!(next_in(&[]), None);
        assert_eq!(gives_way(&[decoding(4), decoding(7), decoding(5)]), Some(1));
        let held_back = Candidate {
            held_back: true,
            ..prompt(64, 100, 8)
        };
        assert_eq!(
            gives_way_to(&[prompt(0, 9, 9), held_back], &waiter(false, 5, 9)),
            Some(1)
        );
        assert_eq!(gives_way_to(&[held_back], &waiter(false, 8, 9)), None);
        assert_eq!(gives_way_to(&[held_back], &waiter(true, 8, 9)), Some(0));
    }

    #[test]
    fn waiters_are_let_in_as_late_as_the_next_chunk_allows() {
        let waiter = |preempted, seconds| Waiter {
            preempted,
            time_left: Duration::from_secs(seconds),
            arrival: 9,
        };
        let lets = |candidates: &[Candidate], waiter| lets_in(candidates, &waiter, &LIMITS);
        assert!(lets(&[], waiter(false, 5)));
        assert!(lets(&[prompt(0, 63, 3), decoding(1)], waiter(false, 5)));
        assert!(!lets(&[prompt(0, 64, 3)], waiter(false, 5)));
        assert!(lets(&[prompt(0, 64, 3)], waiter(false, 2)), "an earlier deadline");
        assert!(lets(&[prompt(0, 64, 3)], waiter(true, 5)), "it gave way before");
        let held_back = Candidate {
            held_back: true,
            ..prompt(64, 1000, 3)
        };
        assert!(lets(&[held_back], waiter(false, 5)));
    }

    fn candidate() -> impl Strategy<Value = Candidate> {
        (0usize..200, 0usize..300, any::<bool>(), any::<bool>(), 0u64..50).prop_map(
            |(blocks, more, decoding, held_back, s)| {
                let computed = blocks / 16 * 16;
                let known = computed + if decoding { 1 } else { more };
                Candidate {
                    decoding,
                    held_back,
                    ..prompt(computed, known, s)
                }
            },
        )
    }

    proptest! {
        #[test]
        fn parts_stay_within_bounds(
            all in prop::collection::vec(candidate(), 0..12),
            chunk_tokens in 16usize..200,
        ) {
            let limits = StepLimits { block_tokens: 16, chunk_tokens };
            let parts = step(&all, &limits);
            let mut prompt_tokens = 0;
            for part in &parts {
                let c = &all[part.index];
                let end = c.computed + part.tokens;
                prop_assert!(part.tokens > 0 && end <= c.known && !c.held_back);
                prop_assert!(end == c.known || end % 16 == 0);
                prompt_tokens += if c.decoding { 0 } else { part.tokens };
            }
            prop_assert!(prompt_tokens <= chunk_tokens);
            let mut indexes: Vec<usize> = parts.iter().map(|p| p.index).collect();
            indexes.sort_unstable();
            indexes.dedup();
            prop_assert_eq!(indexes.len(), parts.len());
            let able = all.iter().any(|c| !c.held_back && c.computed < c.known);
            prop_assert_eq!(able, !parts.is_empty(), "what can be computed is");
        }
    }
}
