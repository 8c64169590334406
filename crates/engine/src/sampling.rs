//! Drawing a token from logits: pure, deterministic, keyed by (seed, index).
//!
//! All state derives from `prompt` and `generated`, so a request can move between nodes at any token. The order of
//! operations: repetition penalty, presence and frequency penalties, bias, the set of allowed tokens, temperature, min-p,
//! top-k, top-p. A logit that is not a number counts as impossible, so that one broken value never decides a token.

use baton_types::{SamplingParams, TokenLogprobs, TokenSet};
use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

/// A drawn token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its log probability and the alternatives', where they were asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// How many candidates are sorted first when a nucleus is sought; most nuclei end within.
const NUCLEUS_FIRST: usize = 64;

/// Draws token number `generated.len()` from `logits`, shape `(vocab,)`. Greedy ties go to the lowest id.
///
/// # Panics
/// Where `logits` is empty or longer than token ids reach.
pub fn sample(logits: &[f32], params: &SamplingParams, prompt: &[u32], generated: &[u32]) -> Sampled {
    sample_of(logits, params, [prompt, generated], None)
}

/// Draws as [`sample`] does, among the tokens in `allowed` only, where that is given; `known` is prompt and generated tokens.
///
/// # Panics
/// As [`sample`], and where `allowed` has none of the tokens that have logits.
pub fn sample_of(
    logits: &[f32],
    params: &SamplingParams,
    [prompt, generated]: [&[u32]; 2],
    allowed: Option<&TokenSet>,
) -> Sampled {
    assert!(!logits.is_empty(), "a distribution over nothing has no sample");
    let token = if params.temperature > 0.0 || changes_logits(params) || allowed.is_some() {
        let mut adjusted = adjusted(logits, params, prompt, generated);
        if let Some(allowed) = allowed {
            keep(&mut adjusted, allowed);
        }
        if params.temperature > 0.0 {
            draw(&mut adjusted, params, uniform(params.seed, generated.len() as u64))
        } else {
            argmax(&adjusted)
        }
    } else {
        argmax(logits)
    };
    let logprobs = params
        .logprobs
        .map(|alternatives| logprobs(logits, token, alternatives as usize));
    Sampled { token, logprobs }
}

/// A number in [0, 1) that depends on nothing but (seed, index): the top 53 bits of BLAKE3 over both.
fn uniform(seed: u64, index: u64) -> f64 {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..].copy_from_slice(&index.to_le_bytes());
    let digest = blake3::hash(&key);
    let mut first = [0; 8];
    first.copy_from_slice(&digest.as_bytes()[..8]);
    (u64::from_le_bytes(first) >> 11) as f64 / (1u64 << 53) as f64
}

fn id(index: usize) -> u32 {
    u32::try_from(index).expect("vocabularies are smaller than 2^32")
}

/// Orders logits, the highest first, with anything that is not a number last.
fn descending(a: f32, b: f32) -> Ordering {
    clean(b).total_cmp(&clean(a))
}

/// `-0` and `0` are one value, NaN is impossible.
fn clean(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit + 0.0 }
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if clean(*logit) > clean(logits[best]) {
            best = index;
        }
    }
    id(best)
}

fn changes_logits(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0
        || params.presence_penalty != 0.0
        || params.frequency_penalty != 0.0
        || !params.logit_bias.is_empty()
}

/// Logits after penalties and bias, free of NaN.
fn adjusted(logits: &[f32], params: &SamplingParams, prompt: &[u32], generated: &[u32]) -> Vec<f32> {
    let mut out: Vec<f32> = logits.iter().map(|logit| clean(*logit)).collect();
    if params.repetition_penalty != 1.0 {
        let seen: HashSet<u32> = prompt.iter().chain(generated).copied().collect();
        for token in seen {
            if let Some(logit) = out.get_mut(token as usize) {
                *logit = if *logit > 0.0 {
                    *logit / params.repetition_penalty
                } else {
                    *logit * params.repetition_penalty
                };
            }
        }
    }
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        let mut counts: HashMap<u32, u32> = HashMap::new();
        for token in generated {
            *counts.entry(*token).or_default() += 1;
        }
        for (token, count) in counts {
            if let Some(logit) = out.get_mut(token as usize) {
                *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
            }
        }
    }
    for (token, bias) in &params.logit_bias {
        if let Some(logit) = out.get_mut(*token as usize) {
            *logit += bias;
        }
    }
    for logit in &mut out {
        *logit = clean(*logit);
    }
    out
}

/// Makes all tokens but those in `allowed` impossible, and none of those: where the model finds all of them impossible, they
/// are equally likely.
fn keep(logits: &mut [f32], allowed: &TokenSet) {
    let mut any = false;
    for (index, logit) in logits.iter_mut().enumerate() {
        if allowed.contains(id(index)) {
            *logit = logit.max(f32::MIN);
            any = true;
        } else {
            *logit = f32::NEG_INFINITY;
        }
    }
    assert!(any, "a set of no tokens has no sample");
}

/// Draws by `uniform` in [0, 1) from the softmax of `logits / temperature` after the cuts.
fn draw(logits: &mut [f32], params: &SamplingParams, uniform: f64) -> u32 {
    let peak = argmax(logits);
    let highest = f64::from(logits[peak as usize]);
    if !highest.is_finite() {
        return peak;
    }
    let temperature = f64::from(params.temperature);
    let weight = |logit: f32| ((f64::from(logit) - highest) / temperature).exp();
    // The most likely weight is 1, so min_p is a bound on weights as it stands.
    let floor = f64::from(params.min_p);
    let cuts = params.top_k > 0 || params.top_p < 1.0;
    if !cuts {
        let kept = |logit: f32| Some(weight(logit)).filter(|w| *w > 0.0 && *w >= floor);
        let total: f64 = logits.iter().filter_map(|logit| kept(*logit)).sum();
        let weights = logits
            .iter()
            .enumerate()
            .filter_map(|(index, logit)| Some((id(index), kept(*logit)?)));
        return pick(weights, uniform * total).unwrap_or(peak);
    }
    let mut candidates: Vec<(u32, f64)> = logits
        .iter()
        .enumerate()
        .map(|(index, logit)| (id(index), weight(*logit)))
        .filter(|(_, w)| *w > 0.0 && *w >= floor)
        .collect();
    let keep = if params.top_k > 0 {
        params.top_k as usize
    } else {
        candidates.len()
    };
    if keep < candidates.len() {
        sort_first(&mut candidates, keep);
        candidates.truncate(keep);
    }
    if params.top_p < 1.0 {
        cut_nucleus(&mut candidates, f64::from(params.top_p));
    }
    let total: f64 = candidates.iter().map(|(_, w)| w).sum();
    pick(candidates.into_iter(), uniform * total).unwrap_or(peak)
}

/// The first entry at which the running sum passes `target`; the last one where rounding lets none pass it.
fn pick(weights: impl Iterator<Item = (u32, f64)>, target: f64) -> Option<u32> {
    let mut sum = 0.0;
    let mut last = None;
    for (token, weight) in weights {
        sum += weight;
        last = Some(token);
        if sum > target {
            break;
        }
    }
    last
}

fn by_weight(a: &(u32, f64), b: &(u32, f64)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Brings the `count` heaviest to the front, in order.
fn sort_first(candidates: &mut [(u32, f64)], count: usize) {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, by_weight);
    }
    let count = count.min(candidates.len());
    candidates[..count].sort_unstable_by(by_weight);
}

/// Keeps the smallest set of the heaviest that reaches `share` of the total weight.
fn cut_nucleus(candidates: &mut Vec<(u32, f64)>, share: f64) {
    let total: f64 = {
        // Summed by id, so that the bound does not depend on how selection left the order.
        candidates.sort_unstable_by_key(|(token, _)| *token);
        candidates.iter().map(|(_, w)| w).sum()
    };
    let mut sorted = NUCLEUS_FIRST.min(candidates.len());
    loop {
        sort_first(candidates, sorted);
        let mut sum = 0.0;
        let reached = candidates[..sorted].iter().position(|(_, weight)| {
            sum += weight;
            sum >= share * total
        });
        match reached {
            Some(last) => return candidates.truncate(last + 1),
            None if sorted == candidates.len() => return,
            None => sorted = (8 * sorted).min(candidates.len()),
        }
    }
}

/// Log-softmax of the raw logits: the chosen token's value and the strongest `alternatives`.
fn logprobs(logits: &[f32], token: u32, alternatives: usize) -> TokenLogprobs {
    let highest = f64::from(clean(logits[argmax(logits) as usize]));
    let sum: f64 = logits
        .iter()
        .map(|logit| (f64::from(clean(*logit)) - highest).exp())
        .sum();
    let log_total = highest + sum.ln();
    let value = |logit: f32| {
        let logprob = f64::from(clean(logit)) - log_total;
        if logprob.is_nan() {
            f32::NEG_INFINITY
        } else {
            logprob as f32
        }
    };
    let mut order: Vec<u32> = (0..id(logits.len())).collect();
    let strongest = |a: &u32, b: &u32| descending(logits[*a as usize], logits[*b as usize]).then(a.cmp(b));
    let count = alternatives.min(order.len());
    if count < order.len() {
        order.select_nth_unstable_by(count, strongest);
    }
    order.truncate(count);
    order.sort_unstable_by(strongest);
    TokenLogprobs {
        logprob: value(logits[token as usize]),
        top: order
            .into_iter()
            .map(|token| (token, value(logits[token as usize])))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn greedy() -> SamplingParams {
        SamplingParams {
            temperature: 0.0,
            ..SamplingParams::default()
        }
    }

    fn token(logits: &[f32], params: &SamplingParams, generated: &[u32]) -> u32 {
        sample(logits, params, &[], generated).token
    }

    /// Frequencies of each of four tokens over many seeds.
    fn frequencies(params: &SamplingParams) -> Vec<f64> {
        let logits: Vec<f32> = [0.4f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let mut counts = vec![0.0; 4];
        let draws = 20_000;
        for seed in 0..draws {
            let params = SamplingParams { seed, ..params.clone() };
            counts[token(&logits, &params, &[]) as usize] += 1.0 / draws as f64;
        }
        counts
    }

    fn close(found: &[f64], expected: [f64; 4]) {
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 0.015, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_best_and_ignores_what_is_no_number() {
        assert_eq!(token(&[1.0, 3.0, 3.0], &greedy(), &[]), 1);
        assert_eq!(token(&[f32::NAN, -1.0, f32::NAN], &greedy(), &[]), 1);
        assert_eq!(token(&[f32::NAN, f32::NAN], &greedy(), &[]), 0);
        assert_eq!(token(&[-0.0, 0.0], &greedy(), &[]), 0);
        assert_eq!(token(&[f32::NAN, f32::NAN], &SamplingParams::default(), &[]), 0);
        assert_eq!(token(&[0.0, f32::INFINITY], &SamplingParams::default(), &[]), 1);
    }

    #[test]
    fn drawn_frequencies_are_those_of_the_distribution() {
        let params = SamplingParams::default();
        close(&frequencies(&params), [0.4, 0.3, 0.2, 0.1]);
        close(
            &frequencies(&SamplingParams {
                top_k: 2,
                ..params.clone()
            }),
            [4.0 / 7.0, 3.0 / 7.0, 0.0, 0.0],
        );
        close(
            &frequencies(&SamplingParams {
                top_p: 0.65,
                ..params.clone()
            }),
            [4.0 / 7.0, 3.0 / 7.0, 0.0, 0.0],
        );
        close(
            &frequencies(&SamplingParams {
                min_p: 0.4,
                ..params.clone()
            }),
            [4.0 / 9.0, 3.0 / 9.0, 2.0 / 9.0, 0.0],
        );
        close(
            &frequencies(&SamplingParams {
                top_p: 0.01,
                ..params.clone()
            }),
            [1.0, 0.0, 0.0, 0.0],
        );
        // p^2 normalised: 16, 9, 4, 1 of 30.
        let cold = SamplingParams {
            temperature: 0.5,
            ..params
        };
        close(&frequencies(&cold), [16.0 / 30.0, 9.0 / 30.0, 4.0 / 30.0, 1.0 / 30.0]);
    }

    #[test]
    fn penalties_and_bias() {
        let base = greedy();
        let logits = [2.0, 1.9, -1.0];
        assert_eq!(
            token(
                &logits,
                &SamplingParams {
                    presence_penalty: 0.2,
                    ..base.clone()
                },
                &[0]
            ),
            1
        );
        let twice = SamplingParams {
            frequency_penalty: 0.06,
            ..base.clone()
        };
        assert_eq!(token(&logits, &twice, &[0]), 0);
        assert_eq!(token(&logits, &twice, &[0, 0]), 1);
        let repeat = SamplingParams {
            repetition_penalty: 1.5,
            ..base.clone()
        };
        assert_eq!(sample(&logits, &repeat, &[0], &[]).token, 1);
        let negative = [-1.0, -1.2];
        assert_eq!(
            sample(&negative, &repeat, &[0], &[]).token,
            1,
            "a penalty lowers negative logits too"
        );
        let biased = SamplingParams {
            logit_bias: vec![(2, 100.0), (99, 1.0)],
            ..base
        };
        assert_eq!(token(&logits, &biased, &[]), 2);
    }

    #[test]
    fn logprobs_are_those_of_the_raw_distribution() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.25].iter().map(|p| p.ln() + 7.0).collect();
        let params = SamplingParams {
            logprobs: Some(2),
            temperature: 0.3,
            top_k: 1,
            ..SamplingParams::default()
        };
        let sampled = sample(&logits, &params, &[], &[]);
        let found = sampled.logprobs.unwrap();
        assert_eq!(sampled.token, 0);
        assert!((found.logprob - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(
            found.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(),
            vec![0, 1]
        );
        assert!((found.top[1].1 - 0.25f32.ln()).abs() < 1e-6);
        assert_eq!(sample(&logits, &greedy(), &[], &[]).logprobs, None);
    }

    #[test]
    fn a_wide_nucleus_is_found_beyond_the_first_sort() {
        let logits = vec![0.0; 5000];
        let params = SamplingParams {
            top_p: 0.9,
            ..SamplingParams::default()
        };
        let largest = (0..500)
            .map(|seed| token(&logits, &SamplingParams { seed, ..params.clone() }, &[]))
            .max();
        assert!(largest.is_some_and(|id| (4000..4500).contains(&id)), "{largest:?}");
    }

    #[test]
    fn only_allowed_tokens_are_drawn_by_their_own_weights() {
        let allowed = TokenSet::from_words(vec![0b1010]);
        let logits: Vec<f32> = [0.4f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let drawn = |params: &SamplingParams| sample_of(&logits, params, [&[], &[]], Some(&allowed));
        assert_eq!(drawn(&greedy()).token, 1);
        let biased = SamplingParams {
            logit_bias: vec![(0, 100.0), (3, 9.0)],
            ..greedy()
        };
        assert_eq!(drawn(&biased).token, 3, "bias counts among what is allowed");
        let seeds = 20_000;
        let third = (0..seeds)
            .filter(|seed| {
                drawn(&SamplingParams {
                    seed: *seed,
                    ..SamplingParams::default()
                })
                .token
                    == 3
            })
            .count();
        assert!((third as f64 / seeds as f64 - 0.25).abs() < 0.015, "{third} of {seeds}");
        let scored = SamplingParams {
            logprobs: Some(1),
            ..greedy()
        };
        let logprobs = drawn(&scored).logprobs.unwrap();
        assert!(
            (logprobs.logprob - 0.3f32.ln()).abs() < 1e-6,
            "log probabilities are the model's own"
        );
        assert_eq!(logprobs.top[0].0, 0);
    }

    proptest! {
        #[test]
        fn whatever_the_logits_are_an_allowed_token_is_drawn(
            logits in prop::collection::vec(prop_oneof![any::<f32>(), Just(f32::NAN), Just(f32::NEG_INFINITY)], 70),
            words in (any::<u32>(), any::<u32>(), 1u32..64),
            (seed, temperature, top_k, top_p) in (any::<u64>(), prop_oneof![Just(0.0f32), 0.1f32..=2.0], 0u32..4, 0.01f32..=1.0),
        ) {
            let allowed = TokenSet::from_words(vec![words.0, words.1, words.2]);
            let params = SamplingParams { temperature, top_k, top_p, seed, ..SamplingParams::default() };
            let token = sample_of(&logits, &params, [&[], &[]], Some(&allowed)).token;
            prop_assert!(allowed.contains(token), "{token}");
        }

        #[test]
        fn any_input_gives_a_valid_token_and_the_same_one_again(
            logits in prop::collection::vec(any::<f32>(), 1..200),
            seed in any::<u64>(),
            temperature in 0.0f32..=2.0,
            (top_k, top_p, min_p) in (0u32..10, 0.01f32..=1.0, 0.0f32..=1.0),
            (repetition, presence) in (0.1f32..=2.0, -2.0f32..=2.0),
            history in prop::collection::vec(0u32..300, 0..20),
        ) {
            let params = SamplingParams {
                temperature, top_k, top_p, min_p, seed, repetition_penalty: repetition, presence_penalty: presence,
                logprobs: Some(3), ..SamplingParams::default()
            };
            let first = sample(&logits, &params, &history, &history);
            prop_assert!((first.token as usize) < logits.len());
            let again = sample(&logits, &params, &history, &history);
            prop_assert_eq!(first.token, again.token);
        }
    }
}
