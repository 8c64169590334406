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

    /// The requests of the window, as they came, behind those that came before and are not over: these are there at the start.
    /// An answer whose length is not known is taken for one of those that are.
    pub(super) fn again(&self, blocks: bool) -> Workload {
        let finished = finished(&self.past);
        let mut outputs: Vec<u32> = self.past.iter().filter_map(|past| expected(past, &finished)).collect();
        outputs.sort_unstable();
        let median = outputs.get(outputs.len() / 2).copied().unwrap_or(1);
        let output = |past: &Past| expected(past, &finished).unwrap_or(median).max(1);
        let mut workload = Workload::empty(self.chain_tokens.filter(|_| blocks));
        let Some(start) = self.past.first().map(|past| past.at) else {
            return workload;
        };
        for open in self.open.iter().filter(|open| open.at < start) {
            workload.push(Nanos::ZERO, open.input.max(1), output(open), &[]);
        }
        for (index, past) in self.past.iter().enumerate() {
            let chain = self.chains.get(index).map_or(&[][..], Vec::as_slice);
            workload.push(past.at.saturating_sub(start), past.input.max(1), output(past), chain);
        }
        workload
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

pub(super) fn differs(now: f64, before: f64) -> bool {
    !(1.0 / MIX..=MIX).contains(&(now / before))
}
