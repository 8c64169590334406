//! A change, tried in the simulator on the last requests before it is made.

use super::controller::Change;
use super::{ControlOptions, Observation};
use crate::Nanos;
use crate::profile::NodeModel;
use crate::sim::{Order, SimError, SimOptions, simulate};
use crate::stats::{Verdict, beats};
use baton_scheduling::Side;
use std::sync::Arc;

/// One change against none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rehearsed {
    /// What would be changed.
    pub change: Change,
    /// Share of the requests within the SLO without it.
    pub without: f64,
    /// With it, its cost included.
    pub with: f64,
    /// What it brings in the first half of the time, and in the second.
    pub halves: [f64; 2],
    /// Whether the difference is more than chance.
    pub better: Verdict,
}

impl Rehearsed {
    /// What it brings, as a share of the requests.
    pub fn gain(&self) -> f64 {
        self.with - self.without
    }

    /// It is for the worse in neither half: a burst speaks for one half alone, and so does what is over.
    pub fn lasts(&self) -> bool {
        self.halves.iter().all(|gain| *gain >= 0.0)
    }
}

/// All changes that could be made, or why none could be tried.
#[derive(Debug, Clone, PartialEq)]
pub enum Rehearsal {
    /// They were tried.
    Tried(Vec<Rehearsed>),
    /// There is no profile.
    NoProfile,
    /// The profile does not cover what was seen.
    NotCovered(SimError),
}

/// The first of so many parts of the window warms the caches and fills the nodes; then the change is ordered.
const WARMING: u64 = 3;

/// Tries them on the window's requests, as they came: the nodes are as now until a third of the time is over; then the change
/// is made, and judged are those that came since.
pub(super) fn rehearse(seen: &Observation, options: &ControlOptions, changes: &[Change]) -> Rehearsal {
    let Some(node) = &options.node else {
        return Rehearsal::NoProfile;
    };
    // Blocks that the profile's cannot be made of are of no use.
    let blocks = seen
        .chain_tokens
        .is_some_and(|tokens| tokens.is_multiple_of(node.block_tokens));
    let workload = seen.again(blocks);
    let at = Nanos(workload.duration().0 / WARMING);
    let half = at + Nanos((workload.duration().0 - at.0) / 2);
    let index = |at: Nanos| workload.requests().partition_point(|request| request.at < at);
    let (judged, middle) = (index(at), index(half) - index(at));
    let run = |change: Option<Change>| -> Result<Vec<f64>, SimError> {
        let outcome = simulate(
            &workload,
            &cluster(seen, options, node, change.map(|change| (change, at))),
        )?;
        let judged = &outcome.requests[judged..];
        Ok(judged.iter().map(|r| f64::from(u8::from(r.good))).collect())
    };
    let share = |good: &[f64]| good.iter().sum::<f64>() / good.len().max(1) as f64;
    let tried = || -> Result<Vec<Rehearsed>, SimError> {
        let without = run(None)?;
        let one = |change: &Change| {
            let with = run(Some(*change))?;
            Ok(Rehearsed {
                change: *change,
                without: share(&without),
                with: share(&with),
                halves: [
                    share(&with[..middle]) - share(&without[..middle]),
                    share(&with[middle..]) - share(&without[middle..]),
                ],
                better: beats(&with, &without),
            })
        };
        changes.iter().map(one).collect()
    };
    match tried() {
        Ok(all) => Rehearsal::Tried(all),
        Err(error) => Rehearsal::NotCovered(error),
    }
}

/// As many nodes as are ready, and the change ordered when it is due.
fn cluster(
    seen: &Observation,
    options: &ControlOptions,
    node: &Arc<NodeModel>,
    change: Option<(Change, Nanos)>,
) -> SimOptions {
    let (prefill, decode) = (seen.ready(Side::Prefill), seen.ready(Side::Decode));
    let mut sim = SimOptions::new(node, prefill, decode, options.slo.clone());
    sim.drain = options.drain;
    (sim.policy, sim.route_slo) = (options.policy, options.route_slo);
    let last = |side| match side {
        Side::Prefill => prefill - 1,
        Side::Decode => prefill + decode - 1,
    };
    let Some((change, at)) = change else { return sim };
    let orders: Vec<Order> = match change {
        Change::Role { to, nodes } => {
            let last = last(other(to));
            let order = |nth| Order::Role {
                node: last - nth,
                side: to,
            };
            (0..nodes).map(order).collect()
        }
        Change::Add { side } => {
            sim.spare.push(Arc::clone(node));
            let node = prefill + decode;
            vec![Order::Start { node, side }]
        }
        Change::Remove { side } => vec![Order::Stop { node: last(side) }],
    };
    sim.orders = orders.into_iter().map(|order| (at, order)).collect();
    sim
}

pub(super) fn other(side: Side) -> Side {
    match side {
        Side::Prefill => Side::Decode,
        Side::Decode => Side::Prefill,
    }
}
