//! One cluster under one load, simulated; all trials of a search see the same requests.

use super::PlanError;
use crate::profile::NodeModel;
use crate::sim::{Outcome, SimError, SimOptions, simulate};
use crate::slo::Slo;
use crate::workload::Workload;
use baton_scheduling::Policy;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A rate so many times the first one is not exceeded: a short trace may keep a lax SLO at any.
const RATES_MAX: f64 = 1e4;

/// So many nodes of each side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Split {
    /// Prefill nodes.
    pub prefill: usize,
    /// Decode nodes.
    pub decode: usize,
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}P+{}D", self.prefill, self.decode)
    }
}

/// What is planned for: the same for all trials.
#[derive(Debug, Clone)]
pub struct Question {
    /// The requests.
    pub workload: Workload,
    /// Prefill nodes.
    pub prefill: Arc<NodeModel>,
    /// Decode nodes.
    pub decode: Arc<NodeModel>,
    /// What is promised.
    pub slo: Slo,
    /// How the coordinator chooses.
    pub policy: Policy,
}

/// Runs trials, and remembers whether each met the SLO.
pub(super) struct Trials<'a> {
    pub question: &'a Question,
    /// Simulations so far.
    count: Mutex<usize>,
    met: Mutex<BTreeMap<(Split, u64), bool>>,
    progress: &'a (dyn Fn(usize) + Sync),
}

impl<'a> Trials<'a> {
    pub fn new(question: &'a Question, progress: &'a (dyn Fn(usize) + Sync)) -> Self {
        Self {
            question,
            count: Mutex::default(),
            met: Mutex::default(),
            progress,
        }
    }

    pub fn count(&self) -> usize {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn simulate(&self, split: Split, rate: f64, give_up: bool) -> Result<Outcome, PlanError> {
        let mut workload = self.question.workload.clone();
        workload.at_rate(rate)?;
        let count = {
            let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
            *count += 1;
            *count
        };
        (self.progress)(count);
        Ok(simulate(&workload, &self.options(split, give_up))?)
    }

    fn options(&self, split: Split, give_up: bool) -> SimOptions {
        let mut options = SimOptions::new(&self.question.prefill, split.prefill, 0, self.question.slo.clone());
        options.decode = vec![Arc::clone(&self.question.decode); split.decode];
        (options.policy, options.give_up) = (self.question.policy, give_up);
        options
    }

    /// All that happens.
    pub fn outcome(&self, split: Split, rate: f64) -> Result<Outcome, PlanError> {
        self.simulate(split, rate, false)
    }

    /// Whether the SLO is met. A load under which a node would leave its profile counts as not met: nothing is known of it.
    pub fn meets(&self, split: Split, rate: f64) -> Result<bool, PlanError> {
        let key = (split, rate.to_bits());
        if let Some(known) = self.met.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(*known);
        }
        let meets = match self.simulate(split, rate, true) {
            Ok(outcome) => outcome.meets(&self.question.slo),
            Err(PlanError::Sim(SimError::OutOfRange { .. })) => false,
            Err(error) => return Err(error),
        };
        self.met
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key, meets);
        Ok(meets)
    }

    /// The highest rate, within `precision`, at which the SLO is met, from `low` (where it is) on; `low` where it is there only.
    pub fn highest(&self, split: Split, low: f64, precision: f64) -> Result<f64, PlanError> {
        let (mut low, mut high) = (low, low * 1.25);
        let enough = low * RATES_MAX;
        while high < enough && self.meets(split, high)? {
            (low, high) = (high, high * 1.25);
        }
        while high < enough && high / low > 1.0 + precision {
            let middle = (low * high).sqrt();
            if self.meets(split, middle)? {
                low = middle
            } else {
                high = middle
            }
        }
        Ok(low)
    }

    /// Down from `high` until the SLO is met; none where it is not met at a thousandth of it either.
    pub fn first_met(&self, split: Split, high: f64) -> Result<Option<f64>, PlanError> {
        let mut rate = high;
        while rate > high / 1000.0 {
            if self.meets(split, rate)? {
                return Ok(Some(rate));
            }
            rate *= 0.7;
        }
        Ok(None)
    }
}
