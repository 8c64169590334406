//! The plan: what to run, how sure that is, what limits it, and what it costs when the mix shifts.

use super::bottleneck::{Bottleneck, bottleneck};
use super::budget::{self, Found};
use super::regret::{Regret, regrets};
use super::split::{CLASSES_MAX, Within, splits};
use super::trial::{Question, Trials};
use super::{Matched, PlanError, Split, demand, parallel};
use crate::sim::{Outcome, SimError};
use crate::slo::Slo;
use crate::stats::{self, Interval, Verdict};

/// What is given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Given {
    /// So many nodes: which division serves the most?
    Nodes(usize),
    /// All nodes that the classes have: which division serves the most?
    All,
    /// So many requests per second: which nodes are the cheapest?
    Rate(f64),
}

/// What a node costs per hour, in any currency.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prices {
    /// As a prefill node.
    pub prefill: f64,
    /// As a decode node.
    pub decode: f64,
}

impl Prices {
    /// The same on both sides.
    pub fn both(cost: f64) -> Self {
        Self {
            prefill: cost,
            decode: cost,
        }
    }
}

/// Another division under the same load.
#[derive(Debug, Clone, PartialEq)]
pub struct Rival {
    /// Which.
    pub split: Split,
    /// Its goodput, requests per second; none where its nodes would leave the profile.
    pub goodput: Option<f64>,
    /// Share of the values within each bound, in the order of the clauses.
    pub attainment: Vec<f64>,
    /// Every percentile is within its bound.
    pub meets: bool,
    /// Whether the plan serves more good requests.
    pub beaten: Verdict,
}

/// The plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What to run.
    pub split: Split,
    /// The load that it was found for, requests per second.
    pub rate: f64,
    /// Requests per second within all bounds.
    pub goodput: Interval,
    /// What the simulation gave.
    pub outcome: Outcome,
    /// By means.
    pub matched: Matched,
    /// Other divisions of the same nodes, in the order of their prefill nodes; with many, the nearest.
    pub rivals: Vec<Rival>,
    /// What limits it.
    pub bottleneck: Bottleneck,
    /// When the mix shifts.
    pub regret: Vec<Regret>,
    /// Simulations that it took.
    pub simulations: usize,
}

/// What could be instead of what was asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Nearest {
    /// With next to no load these bounds are kept, and no stricter ones.
    Slo(Slo),
    /// The SLO is kept at so many requests per second, by these nodes, and not at more.
    Rate(f64, Split),
}

/// A plan, or what could be promised instead.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// The SLO can be kept.
    Feasible(Box<Plan>),
    /// It cannot.
    Infeasible {
        /// What can.
        nearest: Nearest,
    },
}

/// Other divisions that the plan is compared with, at most.
const RIVALS_MAX: usize = 128;

/// Finds the plan. `progress` is called with the number of simulations begun.
///
/// # Errors
/// Where the workload is outside the profile, or there is nothing to plan.
pub fn plan(question: &Question, given: Given, progress: &(dyn Fn(usize) + Sync)) -> Result<Answer, PlanError> {
    if question.workload.rate() <= 0.0 {
        return Err(PlanError::NoDuration);
    }
    question.check(given)?;
    let trials = Trials::new(question, progress);
    let matched = Matched::of(&question.workload, &question.classes, &question.slo)?;
    let classes = &question.classes;
    let found = match given {
        Given::Nodes(nodes) => budget::best(&trials, &matched, splits(classes, Within::Nodes(nodes)))?,
        Given::All => budget::best(&trials, &matched, splits(classes, Within::All))?,
        Given::Rate(rate) => demand::cheapest(&trials, &matched, rate)?.map(|split| Found { split, rate }),
    };
    match found {
        Some(found) => explain(&trials, matched, found).map(|plan| Answer::Feasible(Box::new(plan))),
        None => infeasible(&trials, &matched, given).map(|nearest| Answer::Infeasible { nearest }),
    }
}

fn infeasible(trials: &Trials<'_>, matched: &Matched, given: Given) -> Result<Nearest, PlanError> {
    let classes = &trials.question.classes;
    if let Given::Rate(_) = given
        && classes.iter().all(|class| class.count_max.is_some())
        && let Some(found) = budget::best(trials, matched, splits(classes, Within::All))?
    {
        return Ok(Nearest::Rate(found.rate, found.split));
    }
    let mut all = splits(classes, Within::UpTo([[1; 2]; CLASSES_MAX]));
    all.retain(|split| split.nodes() <= 2 && split.decode() == 1);
    let mut best: Option<(f64, Slo)> = None;
    let mut failed = None;
    for split in all {
        match kept(trials, split) {
            Ok((excess, slo)) if best.as_ref().is_none_or(|(least, _)| excess < *least) => best = Some((excess, slo)),
            Ok(_) => {}
            Err(error) => failed = Some(error),
        }
    }
    match (best, failed) {
        (Some((_, slo)), _) => Ok(Nearest::Slo(slo)),
        (None, Some(error)) => Err(error),
        (None, None) => Err(PlanError::NoNodes),
    }
}

/// The bounds that these nodes keep with next to no load, and how many times the given ones they are, multiplied.
fn kept(trials: &Trials<'_>, split: Split) -> Result<(f64, Slo), PlanError> {
    let outcome = trials.outcome(split, trials.question.workload.rate() / 1000.0)?;
    let mut nearest = trials.question.slo.clone();
    let mut excess = 1.0;
    for clause in &mut nearest.clauses {
        if let Some(time) = outcome.percentile(clause.metric, clause.share()) {
            // Up to the next of three digits.
            let unit = 10u64.pow(time.0.max(1).ilog10().saturating_sub(2));
            let bound = clause.bound.0.max((time.0 / unit + 1) * unit);
            excess *= bound as f64 / clause.bound.0.max(1) as f64;
            clause.bound.0 = bound;
        }
    }
    Ok((excess, nearest))
}

fn good(outcome: &Outcome) -> Vec<f64> {
    outcome.requests.iter().map(|r| f64::from(u8::from(r.good))).collect()
}

fn explain(trials: &Trials<'_>, matched: Matched, found: Found) -> Result<Plan, PlanError> {
    let Found { split, rate } = found;
    let outcome = trials.outcome(split, rate)?;
    let chosen = good(&outcome);
    let offered = outcome.offered();
    let interval = stats::mean(&chosen);
    let goodput = Interval {
        low: interval.low.max(0.0),
        high: interval.high.min(1.0),
        ..interval
    };
    let others = divisions(trials.question, split, RIVALS_MAX);
    let rivals = parallel::map(&others, |other| rival(trials, *other, rate, &chosen));
    let rivals = rivals.into_iter().collect::<Result<_, PlanError>>()?;
    Ok(Plan {
        split,
        rate,
        goodput: goodput.scaled(offered),
        rivals,
        bottleneck: bottleneck(trials, &matched, split, rate)?,
        regret: regrets(trials, split, rate)?,
        simulations: trials.count(),
        matched,
        outcome,
    })
}

/// All divisions of as many nodes of each class, itself among them; of more than `most`, the nearest.
pub(super) fn divisions(question: &Question, split: Split, most: usize) -> Vec<Split> {
    let mut classes = question.classes.clone();
    for (index, class) in classes.iter_mut().enumerate() {
        class.count_max = Some(split.of_class(index));
    }
    let mut all = splits(&classes, Within::All);
    all.sort_by_key(|other| other.distance(&split));
    all.truncate(most);
    all.sort_by_key(|other| (other.prefill(), *other));
    all
}

fn rival(trials: &Trials<'_>, split: Split, rate: f64, chosen: &[f64]) -> Result<Rival, PlanError> {
    let outcome = match trials.outcome(split, rate) {
        Ok(outcome) => outcome,
        Err(PlanError::Sim(SimError::OutOfRange { .. } | SimError::Stalled { .. })) => {
            return Ok(Rival {
                split,
                goodput: None,
                attainment: Vec::new(),
                meets: false,
                beaten: Verdict::CannotTell,
            });
        }
        Err(error) => return Err(error),
    };
    let slo = &trials.question.slo;
    Ok(Rival {
        split,
        goodput: Some(outcome.goodput()),
        attainment: slo.clauses.iter().map(|clause| outcome.attainment(clause)).collect(),
        meets: outcome.meets(slo),
        beaten: stats::beats(chosen, &good(&outcome)),
    })
}
