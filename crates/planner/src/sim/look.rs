//! What whoever directs the cluster sees of it: no more than a live coordinator knows.

use super::cluster::Cluster;
use super::life::State;
use super::outcome::Fate;
use crate::Nanos;
use crate::workload::Workload;
use baton_scheduling::Side;
use rustc_hash::FxHashMap;

/// One node, as its heartbeats and the coordinator's own book say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NodeLook {
    /// Its role; of one that changes it, the old one until it is empty.
    pub side: Side,
    /// Where it is in its life.
    pub state: State,
    /// When it became ready last.
    pub ready_since: Nanos,
    /// Requests that wait there.
    pub queued_requests: u32,
    /// Tokens of prompts that it has yet to compute.
    pub queued_tokens: u64,
    /// Sequences that it computes.
    pub running_requests: u32,
    /// Prompt tokens per second of its last step that computed prompts; 0 before one did.
    pub prefill_tokens_per_s: f32,
    /// Share of its KV blocks that are in use.
    pub kv_used: f64,
}

/// The cluster at one moment.
#[derive(Debug)]
pub struct Looked<'a> {
    /// When.
    pub now: Nanos,
    /// Prefill nodes, decode nodes, spare ones, as they were given.
    pub nodes: Vec<NodeLook>,
    /// Requests that wait for a place on a node.
    pub line: usize,
    /// The whole workload; what is behind [`Self::arrived`] is nobody's to look at.
    pub workload: &'a Workload,
    /// How many of its requests have come.
    pub arrived: usize,
    /// Tokens so far of those that are decoded.
    running: FxHashMap<u32, u32>,
    cluster: &'a Cluster<'a>,
}

impl std::fmt::Debug for Cluster<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a cluster of {} nodes", self.engines.len())
    }
}

fn running(cluster: &Cluster<'_>) -> FxHashMap<u32, u32> {
    let mut running = FxHashMap::default();
    for engine in &cluster.engines {
        let (steps, _) = engine.growing(cluster.events.now);
        for (request, computed) in engine.decoding.requests() {
            let input = cluster.workload.requests()[request as usize].input;
            running.insert(request, (computed + 1 + steps as u32).saturating_sub(input));
        }
    }
    running
}

/// One request that has come, as the coordinator knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestLook {
    /// From its arrival to its first token, once it has one.
    pub ttft: Option<Nanos>,
    /// Tokens of its answer so far.
    pub tokens: u32,
    /// Tokens of its answer, once it has all of them.
    pub output: Option<u32>,
    /// When it got its last one, then.
    pub done_at: Nanos,
    /// Gaps beyond the bound on ITL, then.
    pub late_gaps: u32,
    /// It was refused, or failed.
    pub lost: bool,
}

impl<'a> Looked<'a> {
    pub(super) fn new(cluster: &'a Cluster<'a>, arrived: usize) -> Self {
        let node = |node: usize| {
            let (life, reported) = (&cluster.lives[node], cluster.reported(node));
            let engine = &cluster.engines[node];
            NodeLook {
                side: life.side,
                state: life.state,
                ready_since: life.ready_since,
                queued_requests: reported.queued_requests,
                queued_tokens: reported
                    .queued_tokens
                    .max(cluster.placed[node].figures().waiting_tokens),
                running_requests: reported.running_requests,
                prefill_tokens_per_s: engine.prefill_tokens_per_s,
                kv_used: f64::from(engine.pool.used()) / f64::from(engine.pool.total().max(1)),
            }
        };
        Self {
            now: cluster.events.now,
            nodes: (0..cluster.engines.len()).map(node).collect(),
            line: cluster.line.len() + usize::from(cluster.head.is_some()) + cluster.again.len(),
            workload: cluster.workload,
            arrived,
            running: running(cluster),
            cluster,
        }
    }

    /// What is known of a request that has come.
    pub fn request(&self, index: usize) -> RequestLook {
        let (seen, fate) = (&self.cluster.record.seen[index], self.cluster.journeys[index].fate);
        let done = fate == Some(Fate::Served);
        RequestLook {
            ttft: seen.first,
            tokens: self.running.get(&(index as u32)).copied().unwrap_or(seen.drawn),
            output: done.then_some(seen.drawn),
            done_at: seen.last,
            late_gaps: if done { seen.late } else { 0 },
            lost: matches!(fate, Some(Fate::Refused | Fate::Failed)),
        }
    }
}
