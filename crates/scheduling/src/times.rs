//! The one step-time model: how long a node computes for a prompt, how long its decode step is, and how long a hand-over
//! between two nodes delays its request. Each is linear in a few features, learned per node (or pair) from what was seen,
//! by [`Regression`]; nodes that were never seen are assumed to be slow CPUs.
//!
//! A prompt of `n` tokens that are not held, behind `c` that are, takes `a + b n + q n (c + n/2)` seconds: linear layers per
//! token, attention per pair of tokens. A decode step of `s` sequences takes `a + b s`. A hand-over of `n` tokens is exposed
//! for `a + b n`.

use crate::digest::Digests;
use crate::regression::Regression;
use baton_types::Instance;
use std::collections::HashMap;
use std::time::Duration;

/// Seconds per prompt; per 1,000 tokens; per million pairs of tokens.
const PREFILL_PRIOR: [f64; 3] = [0.02, 2.0, 0.1];
/// Seconds per step; per sequence in it.
const DECODE_PRIOR: [f64; 2] = [0.015, 0.005];
/// Seconds per hand-over; per 1,000 tokens.
const HANDOVER_PRIOR: [f64; 2] = [0.002, 0.002];
/// A pair is judged by its own hand-overs once it has had so many, before that by its sender's.
const PAIR_SEEN_MIN: usize = 4;
/// Tokens for which a reported prefill rate is taken to hold.
const RATED_TOKENS: u64 = 512;

/// What is known of one node's speed, to predict from. A copy of [`StepModel`]'s state at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepTimes {
    prefill: [f64; 3],
    decode: [f64; 2],
    prefill_measured: bool,
}

impl Default for StepTimes {
    /// Of a node that was never seen.
    fn default() -> Self {
        StepModel::default().times()
    }
}

fn prefill_features(tokens: u64, held: u64) -> [f64; 3] {
    let (tokens, held) = (tokens as f64, held as f64);
    [1.0, tokens / 1e3, tokens * (held + tokens / 2.0) / 1e6]
}

fn dot<const K: usize>(coefficients: [f64; K], x: [f64; K]) -> f64 {
    (0..K).map(|i| coefficients[i] * x[i]).sum()
}

impl StepTimes {
    /// Prompts of this node were seen; else its prefill times are a guess.
    pub fn prefill_is_measured(&self) -> bool {
        self.prefill_measured
    }

    /// The same, but where no prompt of this node was seen, another one's figures are the better guess.
    pub fn or_prefill_of(self, other: &Self) -> Self {
        if self.prefill_measured {
            return self;
        }
        Self {
            prefill: other.prefill,
            ..self
        }
    }

    /// Seconds to compute `tokens` of a prompt behind `held` that need no computing.
    pub(crate) fn prefill(&self, tokens: u64, held: u64) -> f64 {
        dot(self.prefill, prefill_features(tokens, held))
    }

    /// Seconds until `requests` prompts of `tokens` in all are computed.
    pub(crate) fn queue(&self, requests: u32, tokens: u64) -> f64 {
        let requests = if tokens == 0 { 0 } else { u64::from(requests.max(1)) };
        requests as f64 * self.prefill(tokens.checked_div(requests).unwrap_or(0), 0)
    }

    /// Seconds of one step that decodes so many sequences.
    pub(crate) fn decode_step(&self, sequences: u32) -> f64 {
        dot(self.decode, [1.0, f64::from(sequences)])
    }
}

/// Learns one node's speed.
#[derive(Debug, Clone, PartialEq)]
pub struct StepModel {
    prefill: Regression<3>,
    decode: Regression<2>,
    /// The last step time that was reported: averages that did not move tell nothing new.
    reported_us: f32,
}

impl Default for StepModel {
    fn default() -> Self {
        Self {
            prefill: Regression::new(PREFILL_PRIOR),
            decode: Regression::new(DECODE_PRIOR),
            reported_us: 0.0,
        }
    }
}

impl StepModel {
    /// A prompt was computed: `tokens` of it, behind `held` that needed none.
    pub fn prefilled(&mut self, tokens: u32, held: u32, took: Duration) {
        if tokens > 0 {
            self.prefill
                .observe(prefill_features(tokens.into(), held.into()), took.as_secs_f64());
        }
    }

    /// The node reports its own averages, 0 where it has none: prompt tokens per second, and microseconds per decode step
    /// while it computes so many sequences.
    pub fn reported(&mut self, prefill_tokens_per_s: f32, decode_step_us: f32, sequences: u32) {
        if prefill_tokens_per_s > 0.0 {
            let seconds = RATED_TOKENS as f64 / f64::from(prefill_tokens_per_s);
            self.prefill.scale_prior(prefill_features(RATED_TOKENS, 0), seconds);
        }
        if decode_step_us > 0.0 && decode_step_us.to_bits() != self.reported_us.to_bits() {
            self.reported_us = decode_step_us;
            let x = [1.0, f64::from(sequences.max(1))];
            self.decode.observe(x, f64::from(decode_step_us) / 1e6);
        }
    }

    /// What is known now.
    pub fn times(&self) -> StepTimes {
        StepTimes {
            prefill: self.prefill.coefficients(),
            decode: self.decode.coefficients(),
            prefill_measured: self.prefill.seen() > 0,
        }
    }
}

/// Learns how long hand-overs delay their requests, per sender and per pair. Bounded: beyond the bound, pairs are judged by
/// their sender alone.
#[derive(Debug)]
pub struct HandoverTimes {
    limit: usize,
    senders: HashMap<Instance, Regression<2>, Digests>,
    pairs: HashMap<(Instance, Instance), Regression<2>, Digests>,
}

fn handover_features(tokens: u64) -> [f64; 2] {
    [1.0, tokens as f64 / 1e3]
}

impl HandoverTimes {
    /// Of at most `limit` pairs, and as many senders.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            senders: HashMap::default(),
            pairs: HashMap::default(),
        }
    }

    /// The KV of so many tokens was handed over, and compute did not hide `exposed` of it.
    pub fn handed_over(&mut self, from: Instance, to: Instance, tokens: u32, exposed: Duration) {
        let (x, seconds) = (handover_features(tokens.into()), exposed.as_secs_f64());
        let new = || Regression::new(HANDOVER_PRIOR);
        if self.senders.len() < self.limit || self.senders.contains_key(&from) {
            self.senders.entry(from).or_insert_with(new).observe(x, seconds);
        }
        if self.pairs.len() < self.limit || self.pairs.contains_key(&(from, to)) {
            self.pairs.entry((from, to)).or_insert_with(new).observe(x, seconds);
        }
    }

    /// A node is gone for good.
    pub fn forget(&mut self, node: Instance) {
        self.senders.remove(&node);
        self.pairs.retain(|(from, to), _| *from != node && *to != node);
    }

    /// Seconds that handing over so many tokens is expected to delay a request.
    pub(crate) fn exposed(&self, from: Instance, to: Instance, tokens: u64) -> f64 {
        let pair = self.pairs.get(&(from, to)).filter(|pair| pair.seen() >= PAIR_SEEN_MIN);
        let known = pair.or_else(|| self.senders.get(&from));
        dot(
            known.map_or(HANDOVER_PRIOR, Regression::coefficients),
            handover_features(tokens),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(s: f64) -> Duration {
        Duration::from_secs_f64(s)
    }

    #[test]
    fn prompts_teach_overhead_rate_and_attention() {
        let mut model = StepModel::default();
        let truth = |tokens: f64, held: f64| 0.01 + tokens / 20_000.0 + tokens * (held + tokens / 2.0) * 2e-9;
        for (tokens, held) in [(64, 0), (8000, 0), (512, 0), (2000, 6000), (32, 8000), (4000, 0)].repeat(10) {
            model.prefilled(tokens, held, seconds(truth(tokens.into(), held.into())));
        }
        let times = model.times();
        for (tokens, held) in [(100, 0), (1000, 0), (8000, 0), (1000, 7000)] {
            let off = times.prefill(tokens, held) / truth(tokens as f64, held as f64) - 1.0;
            assert!(off.abs() < 0.15, "{tokens} behind {held}: off by {off}");
        }
    }

    #[test]
    fn a_reported_rate_stands_in_until_prompts_were_seen() {
        let mut model = StepModel::default();
        model.reported(51_200.0, 0.0, 0);
        assert!((model.times().prefill(RATED_TOKENS, 0) - 0.01).abs() < 1e-9);
        let guess = model.times();
        assert!(!guess.prefill_is_measured());
        (0..9).for_each(|_| model.prefilled(512, 0, seconds(0.1)));
        let measured = model.times();
        assert_eq!(measured.or_prefill_of(&guess), measured);
        assert_eq!(guess.or_prefill_of(&measured).prefill, measured.prefill);
        model.reported(51_200.0, 0.0, 0);
        assert!((model.times().prefill(RATED_TOKENS, 0) - 0.1).abs() < 0.01);
    }

    #[test]
    fn steps_are_learned_from_reports_that_moved() {
        let mut model = StepModel::default();
        for sequences in [1, 4, 16, 8, 2, 32].repeat(5) {
            let step_us = 10_000.0 + 500.0 * sequences as f32;
            (0..50).for_each(|_| model.reported(0.0, step_us, sequences));
        }
        for (sequences, expected) in [(1, 0.0105), (10, 0.015), (32, 0.026)] {
            assert!((model.times().decode_step(sequences) / expected - 1.0).abs() < 0.05);
        }
    }

    #[test]
    fn a_queue_is_its_prompts_one_after_another() {
        let times = StepTimes::default();
        assert_eq!(times.queue(3, 0), 0.0);
        assert_eq!(times.queue(4, 400), 4.0 * times.prefill(100, 0));
        assert_eq!(times.queue(0, 100), times.prefill(100, 0));
    }

    #[test]
    fn a_pair_is_judged_by_itself_once_it_is_known() {
        let mut paths = HandoverTimes::new(2);
        let (p, near, far) = (Instance(1), Instance(2), Instance(3));
        let prior = paths.exposed(p, near, 1000);
        assert!((prior - 0.004).abs() < 1e-9);
        (0..PAIR_SEEN_MIN).for_each(|_| paths.handed_over(p, near, 1000, seconds(0.001)));
        (0..PAIR_SEEN_MIN).for_each(|_| paths.handed_over(p, far, 1000, seconds(0.1)));
        assert!(paths.exposed(p, near, 1000) < 0.002 && paths.exposed(p, far, 1000) > 0.05);
        paths.handed_over(p, Instance(4), 1000, seconds(0.1));
        assert_eq!(paths.pairs.len(), 2, "bounded");
        paths.forget(far);
        assert_eq!(paths.pairs.len(), 1);
        paths.forget(p);
        assert_eq!(paths.exposed(p, near, 1000), prior);
    }
}
