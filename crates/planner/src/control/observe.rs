//! What a controller sees: no more than a coordinator knows.

use crate::Nanos;
use crate::sim::State;
use crate::workload::Workload;
use baton_scheduling::Side;

/// One node.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NodeSeen {
    /// Its role.
    pub side: Side,
    /// Where it is in its life.
    pub state: State,
    /// When it became ready last.
    pub ready_since: Nanos,
    /// Tokens of prompts that it has yet to compute.
    pub queued_tokens: u64,
    /// Requests there, waiting or running.
    pub requests: u32,
    /// Prompt tokens per second, as it last said; 0 where it computed none.
    pub prefill_tokens_per_s: f32,
    /// Share of its KV blocks that are in use.
    pub kv_used: f64,
}

/// One request of the window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Past {
    /// When it came.
    pub at: Nanos,
    /// Tokens of its prompt.
    pub input: u32,
    /// Tokens of its answer so far.
    pub tokens: u32,
    /// Tokens of its answer, once it has all of them.
    pub output: Option<u32>,
    /// From its arrival to its first token, once it has one.
    pub ttft: Option<Nanos>,
    /// From its arrival to its last token, once it has that.
    pub e2e: Option<Nanos>,
    /// Share of its gaps beyond the bound on ITL, once it has all its tokens.
    pub late_gaps: f64,
    /// It was refused, or failed.
    pub lost: bool,
}

/// The cluster at one moment, and its last requests.
#[derive(Debug, Clone, Default)]
pub struct Observation {
    /// When; of the same clock as everything in here.
    pub now: Nanos,
    /// Nodes by their number, which orders name.
    pub nodes: Vec<NodeSeen>,
    /// Requests that wait for a place on a node.
    pub line: usize,
    /// The last requests, in the order in which they came.
    pub past: Vec<Past>,
    /// Those that are not over yet, however long ago they came.
    pub open: Vec<Past>,
    /// Prompts' blocks of `past`, one list each, where they are known; else empty.
    pub chains: Vec<Vec<u32>>,
    /// Tokens of one of these blocks.
    pub chain_tokens: Option<u32>,
}

impl Observation {
    /// Nodes of a side that take work.
    pub fn ready(&self, side: Side) -> usize {
        let ready = |node: &&NodeSeen| node.side == side && node.state == State::Ready;
        self.nodes.iter().filter(ready).count()
    }

    /// A node is neither away nor at work.
    pub fn is_changing(&self) -> bool {
        let changing = |node: &NodeSeen| matches!(node.state, State::Coming | State::Draining);
        self.nodes.iter().any(changing)
    }

    /// Prompt tokens per answer token, as far as there are answers.
    pub(super) fn mix(past: &[Past]) -> Option<f64> {
        let finished = finished(past);
        let (mut input, mut output) = (0u64, 0u64);
        for past in past {
            if let Some(answer) = expected(past, &finished) {
                input += u64::from(past.input);
                output += u64::from(answer);
            }
        }
        (output > 0).then(|| input as f64 / output as f64)
    }

    /// Where those requests begin that the next ones will be like: the whole window, or its last fifth where that one's mix
    /// is another.
    pub(super) fn alike_from(&self, window: Nanos, requests_min: usize) -> usize {
        let since = self.now.saturating_sub(Nanos(window.0 / FIFTH));
        let first = self.past.partition_point(|past| past.at < since);
        let (before, last) = self.past.split_at(first);
        let enough = last.len() >= requests_min;
        match (Self::mix(before), Self::mix(last)) {
            (Some(before), Some(now)) if enough && differs(now, before) => first,
            _ => 0,
        }
    }

    /// What is expected: those that are there now come at once, then requests like those from `first` on, over and over, as
    /// far as `window`. Gives how many are of the first kind. Where an answer's length is not known yet it is taken
    /// for the median of those that are.
    pub(super) fn forecast(&self, first: usize, window: Nanos, blocks: bool) -> (Workload, usize) {
        let alike = &self.past[first..];
        let finished = finished(alike);
        let mut outputs: Vec<u32> = alike.iter().filter_map(|past| expected(past, &finished)).collect();
        outputs.sort_unstable();
        let median = outputs.get(outputs.len() / 2).copied().unwrap_or(1);
        let output = |past: &Past| expected(past, &finished).unwrap_or(median).max(1);
        let mut workload = Workload::empty(self.chain_tokens.filter(|_| blocks));
        for open in &self.open {
            let left = output(open).saturating_sub(open.tokens).max(1);
            workload.push(Nanos::ZERO, open.input.max(1) + open.tokens, left, &[]);
        }
        let Some(start) = alike.first().map(|past| past.at) else {
            return (workload, self.open.len());
        };
        let lasts = self.now.saturating_sub(start).0.max(1);
        let times = (window.0 / lasts).max(1);
        let fresh = self.chains.iter().flatten().max().map_or(0, |most| most + 1);
        let mut chain: Vec<u32> = Vec::new();
        for time in 0..times {
            for (past, index) in alike.iter().zip(first..) {
                chain.clear();
                // Nobody says the same twice.
                let known = self.chains.get(index).into_iter().flatten();
                chain.extend(known.map(|id| id.wrapping_add(fresh.wrapping_mul(time as u32))));
                let at = Nanos(time * lasts) + past.at.saturating_sub(start);
                workload.push(at, past.input.max(1), output(past), &chain);
            }
        }
        (workload, self.open.len())
    }
}

/// Lengths of answers that are complete, in order.
fn finished(past: &[Past]) -> Vec<u32> {
    let mut outputs: Vec<u32> = past.iter().filter_map(|past| past.output).collect();
    outputs.sort_unstable();
    outputs
}

/// How long its answer is, or will be; none before it has begun. Answers that are complete are the shorter ones, the more so
/// the slower the cluster is, so one that is not is taken for the median of those that were longer than it is now, and
/// for twice what it is where none was.
fn expected(past: &Past, finished: &[u32]) -> Option<u32> {
    let begun = (past.tokens > 0).then_some(past.tokens);
    past.output.or_else(|| {
        let tokens = begun?;
        let longer = &finished[finished.partition_point(|known| *known <= tokens)..];
        Some(
            longer
                .get(longer.len() / 2)
                .copied()
                .unwrap_or(tokens.saturating_mul(2)),
        )
    })
}

/// A mix that is so many times another is not the same.
const MIX: f64 = 1.6;
const FIFTH: u64 = 5;

pub(super) fn differs(now: f64, before: f64) -> bool {
    !(1.0 / MIX..=MIX).contains(&(now / before))
}
