//! The controller at work in the simulator.

use super::{Advice, Change, Controller, NodeSeen, Observation, Past};
use crate::Nanos;
use crate::sim::{Looked, Order};

/// Directs a simulated cluster, and keeps what it advised.
#[derive(Debug)]
pub struct Directed {
    /// Who decides.
    pub controller: Controller,
    /// Changes it ordered, and when.
    pub changes: Vec<(Nanos, Change)>,
    /// Looks that came to a rehearsal.
    pub rehearsals: usize,
    /// What the last look came to.
    pub last: Option<Advice>,
    /// All before this one are over.
    first_open: usize,
}

impl Directed {
    /// By this controller.
    pub fn new(controller: Controller) -> Self {
        Self {
            controller,
            changes: Vec::new(),
            rehearsals: 0,
            last: None,
            first_open: 0,
        }
    }

    /// What it orders now.
    pub fn look(&mut self, looked: &Looked<'_>) -> Vec<Order> {
        let seen = observation(looked, self.controller.options().window, &mut self.first_open);
        let advice = self.controller.look(&seen);
        self.rehearsals += usize::from(!advice.rehearsed.is_empty());
        let advice = self.last.insert(advice);
        let (Some((change, nodes)), None) = (&advice.change, &advice.hold) else {
            return Vec::new();
        };
        let change = *change;
        self.changes.push((looked.now, change));
        let order = |node| match change {
            Change::Role { to, .. } => Order::Role { node, side: to },
            Change::Add { side } => Order::Start { node, side },
            Change::Remove { .. } => Order::Stop { node },
        };
        nodes.iter().map(|node| order(*node)).collect()
    }
}

fn observation(looked: &Looked<'_>, window: Nanos, first_open: &mut usize) -> Observation {
    let requests = &looked.workload.requests()[..looked.arrived];
    let from = looked.now.saturating_sub(window);
    let first = requests.partition_point(|request| request.at < from);
    let past = |index: usize| {
        let request = &requests[index];
        let known = looked.request(index);
        let gaps = f64::from(known.output.unwrap_or(1).saturating_sub(1)).max(1.0);
        Past {
            at: request.at,
            input: request.input,
            tokens: known.tokens,
            output: known.output,
            ttft: known.ttft,
            e2e: known.output.map(|_| known.done_at.saturating_sub(request.at)),
            late_gaps: f64::from(known.late_gaps) / gaps,
            lost: known.lost,
        }
    };
    let is_open = |index: &usize| {
        let known = looked.request(*index);
        known.output.is_none() && !known.lost
    };
    while *first_open < requests.len() && !is_open(first_open) {
        *first_open += 1;
    }
    let nodes = looked.nodes.iter().map(|node| NodeSeen {
        side: node.side,
        state: node.state,
        ready_since: node.ready_since,
        queued_tokens: node.queued_tokens,
        requests: node.queued_requests + node.running_requests,
        prefill_tokens_per_s: node.prefill_tokens_per_s,
        kv_used: node.kv_used,
    });
    Observation {
        now: looked.now,
        nodes: nodes.collect(),
        line: looked.line,
        past: (first..requests.len()).map(past).collect(),
        open: (*first_open..requests.len()).filter(is_open).map(past).collect(),
        chains: requests[first..]
            .iter()
            .map(|request| looked.workload.chain(request).to_vec())
            .collect(),
        chain_tokens: looked.workload.block_tokens(),
    }
}
