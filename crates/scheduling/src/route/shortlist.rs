//! The policies: which few nodes of each role are worth weighing.

use super::predict::{alone_cost, decode_seconds, prefill_seconds};
use super::{NodeView, RouteRequest};
use std::fmt;
use std::str::FromStr;

/// Nodes of each role that the predicting policy scores with each other.
const SHORTLIST: usize = 8;

/// How nodes are chosen. All policies keep to the same bounds (room in queues and arenas, failed nodes); they differ in what
/// they prefer. Only the predicting one prefills short prompts on decode nodes while there are prefill nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// The cheapest of the best pairs and decode nodes, by predicted times.
    #[default]
    Predicted,
    /// The prefill node with the fewest tokens, the decode node with the fewest sequences.
    LeastLoaded,
    /// Each in its turn.
    RoundRobin,
    /// The less loaded of two drawn by lot.
    RandomTwo,
}

impl Policy {
    const ALL: [Self; 4] = [Self::Predicted, Self::LeastLoaded, Self::RoundRobin, Self::RandomTwo];

    /// As flags and explanations write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Predicted => "predicted",
            Self::LeastLoaded => "least-loaded",
            Self::RoundRobin => "round-robin",
            Self::RandomTwo => "random-two",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no policy has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no policy `{name}`: predicted, least-loaded, round-robin and random-two are there")]
pub struct UnknownPolicy {
    /// What was given.
    pub name: String,
}

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        let found = Self::ALL.into_iter().find(|policy| policy.name() == name);
        found.ok_or_else(|| UnknownPolicy { name: name.to_owned() })
    }
}

/// The prefill nodes worth weighing, none where there are none.
pub(super) fn prefill<'a>(request: &RouteRequest<'_>, open: &[&'a NodeView]) -> Vec<&'a NodeView> {
    let load = |node: &NodeView| (node.queued_tokens, node.queued_requests, node.instance);
    pick(request, open, 0, load, |node| {
        let (queue, compute) = prefill_seconds(request, node);
        queue + compute
    })
}

/// The decode nodes worth weighing as one of a pair.
pub(super) fn decode<'a>(request: &RouteRequest<'_>, open: &[&'a NodeView]) -> Vec<&'a NodeView> {
    let load = |node: &NodeView| (u64::from(node.sequences()), 0, node.instance);
    pick(request, open, 1, load, |node| {
        // Between equal ones the one that need not be sent everything.
        decode_seconds(request, node).0 + 1e-6 * f64::from(node.lacking(request))
    })
}

/// The decode nodes worth weighing for doing it alone.
pub(super) fn alone<'a>(request: &RouteRequest<'_>, open: &[&'a NodeView]) -> Vec<&'a NodeView> {
    let load = |node: &NodeView| (u64::from(node.sequences()), 0, node.instance);
    pick(request, open, 1, load, |node| alone_cost(request, node))
}

fn pick<'a, L: Ord>(
    request: &RouteRequest<'_>,
    open: &[&'a NodeView],
    salt: u64,
    load: impl Fn(&NodeView) -> L,
    seconds: impl Fn(&NodeView) -> f64,
) -> Vec<&'a NodeView> {
    let drawn = |lot: u64| {
        let place = if open.is_empty() {
            0
        } else {
            mix(lot) % open.len() as u64
        };
        open.get(place as usize).copied()
    };
    match request.policy {
        Policy::Predicted => best(open, seconds),
        Policy::LeastLoaded => open.iter().copied().min_by_key(|node| load(node)).into_iter().collect(),
        Policy::RoundRobin => {
            let turn = request.turn.checked_rem(open.len() as u64).unwrap_or(0);
            open.get(turn as usize).copied().into_iter().collect()
        }
        Policy::RandomTwo => {
            let lots = [4 * request.turn + 2 * salt, 4 * request.turn + 2 * salt + 1];
            let two = lots.into_iter().filter_map(drawn);
            two.min_by_key(|node| load(node)).into_iter().collect()
        }
    }
}

/// The few of least seconds, in that order; equal ones by name.
fn best<'a>(open: &[&'a NodeView], seconds: impl Fn(&NodeView) -> f64) -> Vec<&'a NodeView> {
    let mut best: Vec<(f64, &NodeView)> = Vec::with_capacity(SHORTLIST + 1);
    for node in open {
        let key = (seconds(node), *node);
        let after = |known: &(f64, &NodeView)| {
            known
                .0
                .total_cmp(&key.0)
                .then(known.1.instance.cmp(&node.instance))
                .is_le()
        };
        if best.len() < SHORTLIST || !best.last().is_some_and(after) {
            let at = best.partition_point(after);
            best.insert(at, key);
            best.truncate(SHORTLIST);
        }
    }
    best.into_iter().map(|(_, node)| node).collect()
}

/// Spreads a counter over all numbers. Source: SplitMix64, Steele, Lea and Flood 2014.
fn mix(counter: u64) -> u64 {
    let mut z = counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
