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
    /// Share of the requests within the SLO without it, and with it.
    pub without: f64,
    /// With it, its cost included.
    pub with: f64,
    /// Whether the difference is more than chance.
    pub better: Verdict,
}

impl Rehearsed {
    /// What it brings, as a share of the requests.
    pub fn gain(&self) -> f64 {
        self.with - self.without
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

/// Tries them on the requests of the window.
pub(super) fn rehearse(seen: &Observation, options: &ControlOptions, changes: &[Change]) -> Rehearsal {
    let Some(node) = &options.node else {
        return Rehearsal::NoProfile;
    };
    // Blocks that the profile's cannot be made of are of no use.
    let blocks = seen
        .chain_tokens
        .is_some_and(|tokens| tokens.is_multiple_of(node.block_tokens));
    let first = seen.alike_from(options.window, options.requests_min);
    let (workload, open) = seen.forecast(first, options.window, blocks);
    let run = |change: Option<Change>| -> Result<Vec<f64>, SimError> {
        let options = cluster(seen, options, node, change);
        let outcome = simulate(&workload, &options)?;
        // Those that are there already are late or not whatever is done.
        let new = &outcome.requests[open..];
        Ok(new.iter().map(|r| f64::from(u8::from(r.good))).collect())
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

/// As many nodes as are ready, and the change ordered as the first request comes.
fn cluster(seen: &Observation, options: &ControlOptions, node: &Arc<NodeModel>, change: Option<Change>) -> SimOptions {
    let (prefill, decode) = (seen.ready(Side::Prefill), seen.ready(Side::Decode));
    let mut sim = SimOptions::new(node, prefill, decode, options.slo.clone());
    sim.drain = options.drain;
    let last = |side| match side {
        Side::Prefill => prefill - 1,
        Side::Decode => prefill + decode - 1,
    };
    let orders: Vec<Order> = match change {
        Some(Change::Role { to, nodes }) => {
            let last = last(other(to));
            let order = |nth| Order::Role {
                node: last - nth,
                side: to,
            };
            (0..nodes).map(order).collect()
        }
        Some(Change::Add { side }) => {
            sim.spare.push(Arc::clone(node));
            let node = prefill + decode;
            vec![Order::Start { node, side }]
        }
        Some(Change::Remove { side }) => vec![Order::Stop { node: last(side) }],
        None => Vec::new(),
    };
    sim.orders = orders.into_iter().map(|order| (Nanos::ZERO, order)).collect();
    sim
}

pub(super) fn other(side: Side) -> Side {
    match side {
        Side::Prefill => Side::Decode,
        Side::Decode => Side::Prefill,
    }
}
