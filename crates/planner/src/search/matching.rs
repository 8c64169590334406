//! Rate matching: how many requests per second one prefill node computes on average, and how many one decode node decodes within
//! the bounds. It knows means only: no queues, no variance, no bursts. A place to begin, and an explanation; never the answer.

use super::{NodeClass, Side, Split};
use crate::profile::{Neighbour, NodeModel, OutOfRange};
use crate::slo::{Metric, Slo};
use crate::workload::Workload;

/// Requests whose prefill times the mean is taken of, at most.
const SAMPLE: usize = 4096;

/// What keeps a decode batch from being larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Steps would take longer than the bound on ITL (or TPOT).
    StepTime,
    /// KV would not fit.
    KvCapacity,
    /// Larger ones are not in the profile, or not allowed.
    Batch,
}

/// Rates by means.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateMatch {
    /// Requests per second of one prefill node that never waits.
    pub prefill_rate: f64,
    /// Requests per second of one decode node whose batch is as large as may be.
    pub decode_rate: f64,
    /// That batch.
    pub batch: u32,
    /// Seconds of its step.
    pub step_s: f64,
    /// What keeps it from being larger.
    pub limit: Limit,
    /// Share of prompt tokens that one cache without end would save; counted as saved.
    pub shared: f64,
}

impl RateMatch {
    /// Of one kind of node for both sides.
    ///
    /// # Errors
    /// Where the workload is outside the profile; none where not even one sequence keeps to the bounds.
    pub fn of(workload: &Workload, node: &NodeModel, slo: &Slo) -> Result<Option<Self>, OutOfRange> {
        let every = workload.len().div_ceil(SAMPLE).max(1);
        let (mut seconds, mut sampled) = (0.0, 0.0);
        for request in workload.requests().iter().step_by(every) {
            seconds += prompt_seconds(node, request.input)?;
            sampled += 1.0;
        }
        let shared = workload.shared_share();
        let prefill_s = seconds / f64::max(sampled, 1.0) * (1.0 - shared);
        let (input, output) = workload.mean_lengths();
        let context = input + output / 2.0;
        let bound = [Metric::Itl, Metric::Tpot]
            .into_iter()
            .filter_map(|metric| slo.on(metric))
            .map(|clause| clause.bound.seconds())
            .fold(f64::INFINITY, f64::min);
        let Some((batch, step_s, limit)) = largest_batch(node, context, bound) else {
            return Ok(None);
        };
        Ok(Some(Self {
            prefill_rate: 1.0 / prefill_s,
            decode_rate: f64::from(batch) / (output * step_s),
            batch,
            step_s,
            limit,
            shared,
        }))
    }

    /// Requests per second of so many nodes.
    pub fn rate(&self, prefill: usize, decode: usize) -> f64 {
        (prefill as f64 * self.prefill_rate).min(decode as f64 * self.decode_rate)
    }

    /// The best division of so many nodes, by means.
    pub fn best(&self, nodes: usize) -> (usize, usize) {
        let split = |prefill: usize| (prefill, nodes - prefill);
        let better = |a: &(usize, usize), b: &(usize, usize)| self.rate(a.0, a.1).total_cmp(&self.rate(b.0, b.1));
        (1..nodes).map(split).max_by(better).unwrap_or((0, nodes))
    }

    /// The fewest nodes that a rate needs, by means.
    pub fn needed(&self, rate: f64) -> (usize, usize) {
        let count = |of: f64| ((rate / of).ceil() as usize).max(1);
        (count(self.prefill_rate), count(self.decode_rate))
    }
}

/// Rate matching for each class of nodes.
#[derive(Debug, Clone, PartialEq)]
pub struct Matched {
    /// In the order of the classes; none where not even one sequence keeps to the bounds on such a node.
    pub classes: Vec<Option<RateMatch>>,
}

impl Matched {
    /// For these classes.
    ///
    /// # Errors
    /// Where the workload is outside a profile.
    pub fn of(workload: &Workload, classes: &[NodeClass], slo: &Slo) -> Result<Self, OutOfRange> {
        let each = |class: &NodeClass| RateMatch::of(workload, &class.node, slo);
        let classes = classes.iter().map(each).collect::<Result<_, _>>()?;
        Ok(Self { classes })
    }

    /// Requests per second of one node of this class on this side.
    pub fn node_rate(&self, class: usize, side: Side) -> f64 {
        let matched = self.classes.get(class).copied().flatten();
        matched.map_or(0.0, |matched| match side {
            Side::Prefill => matched.prefill_rate,
            Side::Decode => matched.decode_rate,
        })
    }

    /// Requests per second of this side's nodes.
    pub fn side_rate(&self, split: &Split, side: Side) -> f64 {
        let of = |class| split.count(class, side) as f64 * self.node_rate(class, side);
        (0..self.classes.len()).map(of).sum()
    }

    /// Requests per second of these nodes, where each side does its own work alone.
    pub fn rate(&self, split: &Split) -> f64 {
        self.side_rate(split, Side::Prefill)
            .min(self.side_rate(split, Side::Decode))
    }

    /// The same where decode nodes may also do both alone.
    pub fn rate_at_most(&self, split: &Split) -> f64 {
        let both = |class| {
            let [prefill, decode] = [Side::Prefill, Side::Decode].map(|side| self.node_rate(class, side));
            let alone = if decode > 0.0 {
                1.0 / (1.0 / prefill + 1.0 / decode)
            } else {
                0.0
            };
            split.count(class, Side::Decode) as f64 * alone
        };
        self.rate(split).max((0..self.classes.len()).map(both).sum())
    }

    /// The best of these divisions, by means; none where none has nodes of both sides that keep to the bounds.
    pub fn best(&self, all: &[Split]) -> Option<Split> {
        let best = all.iter().max_by(|a, b| self.rate(a).total_cmp(&self.rate(b)));
        best.copied().filter(|best| self.rate(best) > 0.0)
    }
}

/// One prompt by itself, chunk by chunk.
fn prompt_seconds(node: &NodeModel, input: u32) -> Result<f64, OutOfRange> {
    let mut seconds = 0.0;
    let mut done = 0;
    while done < input {
        let chunk = node.chunk_tokens.min(input - done);
        seconds += node.prefill_step(&[(chunk, done)], Neighbour::Idle)?;
        done += chunk;
    }
    Ok(seconds)
}

fn largest_batch(node: &NodeModel, context: f64, bound: f64) -> Option<(u32, f64, Limit)> {
    const RUNNING_MAX: u32 = 256;
    let capacity = f64::from(node.blocks) * f64::from(node.block_tokens);
    let mut best = None;
    for batch in 1..=RUNNING_MAX {
        let tokens = f64::from(batch) * context;
        if tokens > capacity {
            return best.map(|(batch, step)| (batch, step, Limit::KvCapacity));
        }
        let step = node
            .decode_row(batch, Neighbour::Idle)
            .and_then(|row| row.seconds(tokens as u64, 1));
        match step {
            Ok(step) if step <= bound => best = Some((batch, step)),
            Ok(_) => return best.map(|(batch, step)| (batch, step, Limit::StepTime)),
            Err(_) => break,
        }
    }
    best.map(|(batch, step)| (batch, step, Limit::Batch))
}
