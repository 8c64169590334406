//! One cluster under one load, simulated; all trials of a search see the same requests.

use super::split::CLASSES_MAX;
use super::{Given, NodeClass, PlanError, Side, Split};
use crate::sim::{Outcome, SimError, SimOptions, simulate};
use crate::slo::Slo;
use crate::workload::Workload;
use baton_scheduling::Policy;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A rate so many times the first one is not exceeded: a short trace may keep a lax SLO at any.
const RATES_MAX: f64 = 1e4;

/// What is planned for: the same for all trials.
#[derive(Debug, Clone)]
pub struct Question {
    /// The requests.
    pub workload: Workload,
    /// Kinds of nodes that there may be.
    pub classes: Vec<NodeClass>,
    /// What is promised.
    pub slo: Slo,
    /// How the coordinator chooses.
    pub policy: Policy,
}

impl Question {
    /// That its nodes can serve together, and that what is given says how many there are.
    pub(super) fn check(&self, given: Given) -> Result<(), PlanError> {
        let count = self.classes.len();
        if !(1..=CLASSES_MAX).contains(&count) {
            return Err(PlanError::Classes {
                count,
                most: CLASSES_MAX,
            });
        }
        let first = &self.classes[0];
        for other in &self.classes[1..] {
            let (a, b) = (&first.node, &other.node);
            let differs = |what: &str, a: u64, b: u64| (a != b).then(|| format!("{what} of {a} and {b}"));
            let why = differs("block_tokens", a.block_tokens.into(), b.block_tokens.into())
                .or_else(|| differs("bytes of a KV block", a.block_bytes, b.block_bytes))
                .or_else(|| differs("layers", a.layers.into(), b.layers.into()));
            if let Some(why) = why {
                let (one, other) = (first.name.clone(), other.name.clone());
                return Err(PlanError::Unlike { one, other, why });
            }
        }
        if !self.classes.iter().any(|class| class.decode) {
            return Err(PlanError::NoNodes);
        }
        let unbounded = self.classes.iter().find(|class| class.count_max.is_none());
        match (given, unbounded) {
            (Given::Nodes(nodes), _) if nodes < 2 => Err(PlanError::Budget { nodes }),
            (Given::All, Some(class)) => Err(PlanError::Unbounded {
                class: class.name.clone(),
            }),
            (Given::Nodes(_) | Given::All | Given::Rate(_), _) => Ok(()),
        }
    }
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
        let question = self.question;
        let nodes = |side| {
            let classes = question.classes.iter().enumerate();
            classes.flat_map(move |(class, of)| std::iter::repeat_n(Arc::clone(&of.node), split.count(class, side)))
        };
        let mut options = SimOptions::new(&question.classes[0].node, 0, 0, question.slo.clone());
        options.prefill = nodes(Side::Prefill).collect();
        options.decode = nodes(Side::Decode).collect();
        (options.policy, options.give_up) = (question.policy, give_up);
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
