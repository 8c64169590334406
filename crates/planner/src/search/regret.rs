//! What becomes of a plan when the mix shifts.

use super::plan::divisions;
use super::trial::Trials;
use super::{PlanError, Question, Split, parallel};
use crate::workload::WorkloadError;

/// Divisions for which a shift is simulated, at most.
const SHIFT_SPLITS: usize = 12;

/// The plan and the best division of its nodes after a shift.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shifted {
    /// The plan's goodput, requests per second.
    pub ours: f64,
    /// The best division that was tried.
    pub best_split: Split,
    /// Its goodput.
    pub best: f64,
    /// Requests whose shifted prompt was cut to what the profiles cover: share of all.
    pub cut: f64,
}

impl Shifted {
    /// Share of the best goodput that the plan loses.
    pub fn regret(&self) -> f64 {
        if self.best > 0.0 {
            ((self.best - self.ours) / self.best).max(0.0)
        } else {
            0.0
        }
    }
}

/// One shift.
#[derive(Debug, Clone, PartialEq)]
pub struct Regret {
    /// What shifts, such as `input x2`.
    pub shift: &'static str,
    /// What then is; or why that is not known.
    pub outcome: Result<Shifted, String>,
}

pub(super) fn regrets(trials: &Trials<'_>, split: Split, rate: f64) -> Result<Vec<Regret>, PlanError> {
    type Shift = fn(&mut Question) -> Result<f64, WorkloadError>;
    let shifts: [(&'static str, Shift); 3] = [
        ("input x2", |q| q.workload.longer_inputs(2.0).map(|()| 1.0)),
        ("output x2", |q| q.workload.longer_outputs(2.0).map(|()| 1.0)),
        ("rate x1.5", |_| Ok(1.5)),
    ];
    let all = divisions(trials.question, split, usize::MAX);
    let every = all.len().div_ceil(SHIFT_SPLITS);
    let tried: Vec<Split> = all
        .iter()
        .enumerate()
        .filter(|(index, other)| **other == split || index % every == 0)
        .map(|(_, split)| *split)
        .collect();
    let mut regrets = Vec::new();
    for (shift, change) in shifts {
        let mut question = trials.question.clone();
        let faster = change(&mut question)?;
        // A model takes no prompt beyond its context, so clients would not send one.
        let covered = question
            .classes
            .iter()
            .map(|class| class.node.context_max())
            .fold(f64::INFINITY, f64::min);
        let cut = question.workload.cut_inputs(covered as u32) as f64 / question.workload.len().max(1) as f64;
        let shifted = Trials::new(&question, &|_| {});
        let goodput = |split: &Split| shifted.outcome(*split, rate * faster).map(|outcome| outcome.goodput());
        let ours = goodput(&split);
        let others = parallel::map(&tried, goodput);
        let best = tried
            .iter()
            .zip(others)
            .filter_map(|(split, goodput)| Some((*split, goodput.ok()?)));
        let best = best.max_by(|a, b| a.1.total_cmp(&b.1));
        let outcome = match (ours, best) {
            (Ok(ours), Some((best_split, best))) => Ok(Shifted {
                ours,
                best_split,
                best,
                cut,
            }),
            (Err(error), _) => Err(error.to_string()),
            (Ok(_), None) => Err("no division could be simulated".to_owned()),
        };
        regrets.push(Regret { shift, outcome });
    }
    Ok(regrets)
}
