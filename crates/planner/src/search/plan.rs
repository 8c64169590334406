//! The plan: what to run, how sure that is, what limits it, and what it costs when the mix shifts.

use super::budget::{self, splits};
use super::trial::{Question, Split, Trials};
use super::{Limit, PlanError, RateMatch, demand, parallel};
use crate::sim::{Outcome, SimError};
use crate::slo::{Clause, Metric, Slo};
use crate::stats::{self, Interval, Verdict};
use crate::workload::WorkloadError;

/// What is given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Given {
    /// So many nodes: which division serves the most?
    Nodes(usize),
    /// So many requests per second: which nodes are the cheapest?
    Rate(f64),
}

/// What nodes cost per hour, in any currency.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prices {
    /// One prefill node.
    pub prefill: f64,
    /// One decode node.
    pub decode: f64,
}

impl Prices {
    /// Of all nodes.
    pub fn per_hour(&self, split: Split) -> f64 {
        split.prefill as f64 * self.prefill + split.decode as f64 * self.decode
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
    /// Whether the plan serves more good requests.
    pub beaten: Verdict,
}

/// What becomes of the plan when the mix shifts.
#[derive(Debug, Clone, PartialEq)]
pub struct Regret {
    /// What shifts, such as `input x2`.
    pub shift: &'static str,
    /// The plan's goodput then, and that of the best division of as many nodes; or why that is not known.
    pub outcome: Result<(f64, Split, f64), String>,
}

/// What limits the plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Bottleneck {
    /// In a word.
    pub name: &'static str,
    /// The clause that breaks first under more load.
    pub clause: Option<Clause>,
    /// Rates with one more prefill node, and with one more decode node.
    pub with_one_more: [f64; 2],
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
    pub matched: RateMatch,
    /// Other divisions of as many nodes, in the order of their prefill nodes.
    pub rivals: Vec<Rival>,
    /// What limits it.
    pub bottleneck: Bottleneck,
    /// When the mix shifts.
    pub regret: Vec<Regret>,
    /// Simulations that it took.
    pub simulations: usize,
}

/// A plan, or what could be promised instead.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// The SLO can be kept.
    Feasible(Box<Plan>),
    /// It cannot, at any load that was tried. With next to no load these bounds could be.
    Infeasible {
        /// The same clauses with bounds that are kept.
        nearest: Slo,
    },
}

/// Divisions for which a shift is simulated, at most.
const SHIFT_SPLITS: usize = 12;

/// Finds the plan. `progress` is called with the number of simulations begun.
///
/// # Errors
/// Where the workload is outside the profile, or there is nothing to plan.
pub fn plan(
    question: &Question,
    given: Given,
    prices: Prices,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Answer, PlanError> {
    if question.workload.rate() <= 0.0 {
        return Err(PlanError::NoDuration);
    }
    let trials = Trials::new(question, progress);
    let Some(matched) = RateMatch::of(&question.workload, &question.decode, &question.slo)? else {
        return infeasible(&trials, Split { prefill: 1, decode: 1 });
    };
    let found = match given {
        Given::Nodes(nodes) if nodes < 2 => return Err(PlanError::Budget { nodes }),
        Given::Nodes(nodes) => budget::best(&trials, &matched, nodes)?.map(|found| (found.split, found.rate)),
        Given::Rate(rate) => demand::cheapest(&trials, &matched, rate, prices)?.map(|split| (split, rate)),
    };
    match found {
        Some((split, rate)) => explain(&trials, matched, split, rate).map(|plan| Answer::Feasible(Box::new(plan))),
        None => infeasible(&trials, Split { prefill: 1, decode: 1 }),
    }
}

/// What is kept with next to no load.
fn infeasible(trials: &Trials<'_>, split: Split) -> Result<Answer, PlanError> {
    let outcome = trials.outcome(split, trials.question.workload.rate() / 1000.0)?;
    let mut nearest = trials.question.slo.clone();
    for clause in &mut nearest.clauses {
        if let Some(time) = outcome.percentile(clause.metric, clause.share()) {
            // Up to the next of three digits.
            let unit = 10u64.pow(time.0.max(1).ilog10().saturating_sub(2));
            clause.bound.0 = clause.bound.0.max((time.0 / unit + 1) * unit);
        }
    }
    Ok(Answer::Infeasible { nearest })
}

fn good(outcome: &Outcome) -> Vec<f64> {
    outcome.requests.iter().map(|r| f64::from(u8::from(r.good))).collect()
}

fn explain(trials: &Trials<'_>, matched: RateMatch, split: Split, rate: f64) -> Result<Plan, PlanError> {
    let outcome = trials.outcome(split, rate)?;
    let chosen = good(&outcome);
    let offered = outcome.offered();
    let interval = stats::mean(&chosen);
    let goodput = Interval {
        low: interval.low.max(0.0),
        high: interval.high.min(1.0),
        ..interval
    };
    let others = splits(split.prefill + split.decode);
    let rivals = parallel::map(&others, |other| rival(trials, *other, rate, &chosen));
    let rivals = rivals.into_iter().collect::<Result<_, PlanError>>()?;
    Ok(Plan {
        split,
        rate,
        goodput: goodput.scaled(offered),
        matched,
        rivals,
        bottleneck: bottleneck(trials, &matched, split, rate)?,
        regret: regrets(trials, split, rate)?,
        simulations: trials.count(),
        outcome,
    })
}

fn rival(trials: &Trials<'_>, split: Split, rate: f64, chosen: &[f64]) -> Result<Rival, PlanError> {
    let outcome = match trials.outcome(split, rate) {
        Ok(outcome) => outcome,
        Err(PlanError::Sim(SimError::OutOfRange { .. } | SimError::Stalled { .. })) => {
            return Ok(Rival {
                split,
                goodput: None,
                attainment: Vec::new(),
                beaten: Verdict::CannotTell,
            });
        }
        Err(error) => return Err(error),
    };
    let clauses = &trials.question.slo.clauses;
    Ok(Rival {
        split,
        goodput: Some(outcome.goodput()),
        attainment: clauses.iter().map(|clause| outcome.attainment(clause)).collect(),
        beaten: stats::beats(chosen, &good(&outcome)),
    })
}

fn bottleneck(trials: &Trials<'_>, matched: &RateMatch, split: Split, rate: f64) -> Result<Bottleneck, PlanError> {
    let [more_prefill, more_decode] = [(1, 0), (0, 1)].map(|(prefill, decode)| Split {
        prefill: split.prefill + prefill,
        decode: split.decode + decode,
    });
    let highest = |split| match trials.meets(split, rate)? {
        true => trials.highest(split, rate, budget::PRECISION),
        false => Ok::<f64, PlanError>(0.0),
    };
    let rates = parallel::map(&[more_prefill, more_decode], |split| highest(*split));
    let rates: Vec<f64> = rates.into_iter().collect::<Result<_, _>>()?;
    // A bit more than it can carry shows what breaks.
    let slo = &trials.question.slo;
    let over = trials.outcome(split, rate * 1.15).ok();
    let missing = |clause: &&Clause| {
        over.as_ref()
            .map_or(0.0, |over| clause.share() - over.attainment(clause))
    };
    let clause = slo
        .clauses
        .iter()
        .max_by(|a, b| missing(a).total_cmp(&missing(b)))
        .copied();
    let kv = over.as_ref().is_some_and(|over| {
        over.nodes[over.prefill_nodes..]
            .iter()
            .any(|used| used.preemptions > 0 || used.kv_peak > 0.98)
    });
    let name = match clause.map(|clause| clause.metric) {
        _ if rates[1] > rates[0] && kv => "decode KV capacity",
        _ if rates[1] > rates[0] => "decode",
        Some(Metric::Itl | Metric::Tpot) if split.prefill == 0 || matched.limit == Limit::StepTime => {
            "prefill stalls decoding"
        }
        _ => "prefill",
    };
    Ok(Bottleneck {
        name,
        clause,
        with_one_more: [rates[0], rates[1]],
    })
}

fn regrets(trials: &Trials<'_>, split: Split, rate: f64) -> Result<Vec<Regret>, PlanError> {
    type Shift = fn(&mut Question) -> Result<f64, WorkloadError>;
    let shifts: [(&'static str, Shift); 3] = [
        ("input x2", |q| q.workload.longer_inputs(2.0).map(|()| 1.0)),
        ("output x2", |q| q.workload.longer_outputs(2.0).map(|()| 1.0)),
        ("rate x1.5", |_| Ok(1.5)),
    ];
    let mut all = splits(split.prefill + split.decode);
    let every = all.len().div_ceil(SHIFT_SPLITS);
    all.retain(|other| *other == split || other.prefill % every == 0);
    let mut regrets = Vec::new();
    for (shift, change) in shifts {
        let mut question = trials.question.clone();
        let faster = change(&mut question)?;
        let shifted = Trials::new(&question, &|_| {});
        let goodput = |split: &Split| shifted.outcome(*split, rate * faster).map(|outcome| outcome.goodput());
        let ours = goodput(&split);
        let others = parallel::map(&all, goodput);
        let best = all
            .iter()
            .zip(others)
            .filter_map(|(split, goodput)| Some((*split, goodput.ok()?)));
        let best = best.max_by(|a, b| a.1.total_cmp(&b.1));
        let outcome = match (ours, best) {
            (Ok(ours), Some((split, best))) => Ok((ours, split, best)),
            (Err(error), _) => Err(error.to_string()),
            (Ok(_), None) => Err("no division could be simulated".to_owned()),
        };
        regrets.push(Regret { shift, outcome });
    }
    Ok(regrets)
}
