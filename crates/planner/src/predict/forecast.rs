//! The simulation of a cluster whose nodes may share a machine: how busy each side is decides how fast the other one is, so it is
//! simulated until the two agree.

use super::Figures;
use crate::profile::{NodeModel, Profile};
use crate::search::{PlanError, Split};
use crate::sim::{NodeUse, Outcome, SimError, SimOptions, simulate};
use crate::slo::Slo;
use crate::workload::Workload;
use baton_scheduling::Policy;
use std::sync::Arc;

/// Rounds until busy shares and speeds agree. They settle fast: a round changes shares by a tenth of what the one before did.
const ROUNDS: usize = 4;
/// Rates are found within this share.
const PRECISION: f64 = 0.02;
/// No rate beyond this many times the first one is tried.
const RATES_MAX: f64 = 1e4;

/// One cluster.
#[derive(Debug, Clone)]
pub struct Case<'a> {
    /// What its nodes are like.
    pub profile: &'a Profile,
    /// How many of each.
    pub split: Split,
    /// How the coordinator chooses.
    pub policy: Policy,
    /// What is promised.
    pub slo: &'a Slo,
}

/// What will be.
#[derive(Debug, Clone)]
pub struct Forecast {
    /// In figures.
    pub figures: Figures,
    /// In full.
    pub outcome: Outcome,
    /// Share of the time that prefill nodes, and decode nodes, compute.
    pub busy: [f64; 2],
}

fn sides(nodes: &[NodeUse], prefill: usize) -> [f64; 2] {
    let mean = |nodes: &[NodeUse]| {
        let busy = nodes.iter().map(|node| node.prefilling + node.decoding).sum::<f64>();
        busy / nodes.len().max(1) as f64
    };
    [mean(&nodes[..prefill]), mean(&nodes[prefill..])]
}

/// How busy the neighbours of one node of a side are, on average.
fn neighbours(split: Split, busy: [f64; 2], side: usize) -> f64 {
    let mut counts = [split.prefill() as f64, split.decode() as f64];
    counts[side] -= 1.0;
    let all = counts[0] + counts[1];
    if all > 0.0 {
        (counts[0] * busy[0] + counts[1] * busy[1]) / all
    } else {
        0.0
    }
}

/// What the cluster will do with these requests, at the times that they have.
///
/// # Errors
/// Where it would leave the profile.
pub fn predict(case: &Case<'_>, workload: &Workload) -> Result<Forecast, PlanError> {
    let mut busy = [0.5; 2];
    let rounds = if case.profile.contended.is_some() { ROUNDS } else { 1 };
    let mut outcome = run(case, workload, busy)?;
    for _ in 1..rounds {
        busy = sides(&outcome.nodes, outcome.prefill_nodes);
        outcome = run(case, workload, busy)?;
    }
    Ok(Forecast {
        figures: Figures::of(&outcome),
        busy: sides(&outcome.nodes, outcome.prefill_nodes),
        outcome,
    })
}

fn run(case: &Case<'_>, workload: &Workload, busy: [f64; 2]) -> Result<Outcome, PlanError> {
    let model = |side| Arc::new(NodeModel::beside(case.profile, neighbours(case.split, busy, side)));
    let mut options = SimOptions::new(&model(0), case.split.prefill(), 0, case.slo.clone());
    options.decode = vec![model(1); case.split.decode()];
    (options.policy, options.frames) = (case.policy, true);
    Ok(simulate(workload, &options)?)
}

/// The highest rate, requests per second, at which the SLO is kept; none where it is not kept at any that was tried. A load under
/// which a node would leave its profile counts as one at which it is not kept.
///
/// # Errors
/// Where the workload cannot be brought to a rate, or not be simulated.
pub fn highest_rate(case: &Case<'_>, workload: &Workload) -> Result<Option<f64>, PlanError> {
    let meets = |rate: f64| {
        let mut workload = workload.clone();
        workload.at_rate(rate)?;
        match predict(case, &workload) {
            Ok(forecast) => Ok(forecast.outcome.meets(case.slo)),
            Err(PlanError::Sim(SimError::OutOfRange { .. })) => Ok(false),
            Err(error) => Err(error),
        }
    };
    let begin = workload.rate().max(1e-3);
    let mut low = begin;
    while !meets(low)? {
        low /= 2.0;
        if low < begin / RATES_MAX {
            return Ok(None);
        }
    }
    let mut high = low * 2.0;
    while high < begin * RATES_MAX && meets(high)? {
        (low, high) = (high, high * 2.0);
    }
    while high / low > 1.0 + PRECISION {
        let middle = (low * high).sqrt();
        if meets(middle)? { low = middle } else { high = middle }
    }
    Ok(Some(low))
}
