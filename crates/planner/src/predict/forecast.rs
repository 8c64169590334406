//! What a cluster is expected to do, its nodes on one machine where the profile knows neighbours.

use super::Figures;
use crate::profile::{NodeModel, Profile};
use crate::search::{PlanError, Split};
use crate::sim::{NodeUse, Outcome, SimError, SimOptions, simulate};
use crate::slo::Slo;
use crate::workload::Workload;
use baton_scheduling::Policy;
use std::sync::Arc;

/// Rates are found within this share.
const PRECISION: f64 = 0.02;
/// So many machines are expected to do what one will, the fastest and the slowest this share away from what was profiled.
const MACHINES: u32 = 16;
const APART: f64 = 0.02;
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

/// What the cluster will do with these requests, at the times that they have.
///
/// # Errors
/// Where it would leave the profile.
pub fn predict(case: &Case<'_>, workload: &Workload) -> Result<Forecast, PlanError> {
    let model = Arc::new(NodeModel::new(case.profile));
    let mut options = SimOptions::new(&model, case.split.prefill(), case.split.decode(), case.slo.clone());
    (options.policy, options.frames) = (case.policy, true);
    options.neighbours = case.profile.contended.is_some();
    let outcome = simulate(workload, &options)?;
    Ok(Forecast {
        figures: Figures::of(&outcome),
        busy: sides(&outcome.nodes, outcome.prefill_nodes),
        outcome,
    })
}

/// What the cluster will do on average over machines that are a little faster or slower than the profiled one, none of them more
/// likely: figures, and the busy shares. Which requests meet at a node hangs by milliseconds, and percentiles of a few hundred requests hang
/// by that; one simulation tells one such chance to its last digit.
///
/// # Errors
/// Where one of them would leave the profile.
pub fn expect(case: &Case<'_>, workload: &Workload) -> Result<(Figures, [f64; 2]), PlanError> {
    let (mut figures, mut busy) = (Vec::new(), [0.0; 2]);
    for machine in 0..MACHINES {
        let place = (f64::from(machine) + 0.5) / f64::from(MACHINES);
        let mut profile = case.profile.clone();
        profile.scale_steps(1.0 + APART * (2.0 * place - 1.0));
        let case = Case {
            profile: &profile,
            ..case.clone()
        };
        let forecast = predict(&case, workload)?;
        figures.push(forecast.figures);
        for (sum, share) in busy.iter_mut().zip(forecast.busy) {
            *sum += share / f64::from(MACHINES);
        }
    }
    Ok((Figures::mean(&figures), busy))
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
