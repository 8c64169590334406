//! The decision.

use super::rehearse::{Rehearsal, Rehearsed, other, rehearse};
use super::signals::{Reason, Signals};
use super::{ControlOptions, Observation};
use crate::Nanos;
use crate::sim::State;
use crate::stats::Verdict;
use baton_scheduling::Side;

/// A node that was added is not taken away again for so many cooldowns.
const UNDO_COOLDOWNS: u64 = 5;
/// A node is not needed where so many of the requests that are within the SLO would not be without it.
const SPARE: f64 = 0.002;
/// So many nodes are tried at once: a change goes to where it is best, not there step by step.
const AT_ONCE: [usize; 6] = [1, 2, 3, 4, 8, 16];

/// What may be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nodes of the other role take up this one.
    Role {
        /// Their role from then on.
        to: Side,
        /// How many.
        nodes: usize,
    },
    /// One node more.
    Add {
        /// Its role.
        side: Side,
    },
    /// One node less.
    Remove {
        /// Its role.
        side: Side,
    },
}

fn name(side: Side) -> &'static str {
    match side {
        Side::Prefill => "prefill",
        Side::Decode => "decode",
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Role { to, nodes: 1 } => write!(f, "one {} node becomes a {} node", name(other(*to)), name(*to)),
            Self::Role { to, nodes } => {
                write!(f, "{nodes} {} nodes become {} nodes", name(other(*to)), name(*to))
            }
            Self::Add { side } => write!(f, "one {} node more", name(*side)),
            Self::Remove { side } => write!(f, "one {} node less", name(*side)),
        }
    }
}

/// Why nothing is done.
#[derive(Debug, Clone, PartialEq)]
pub enum Hold {
    /// A node drains, starts or changes its role.
    Changing,
    /// The last change was too short a time ago.
    Cooldown {
        /// Seconds until it may be followed by another.
        left_s: f64,
    },
    /// Too few requests came.
    TooFew {
        /// In the window.
        requests: usize,
    },
    /// The SLO is kept, and the load is what it was.
    Fine,
    /// No change would bring enough, or it might be chance.
    NoGain,
    /// One would, but has not been the best one for long enough.
    Unconfirmed,
    /// There is no profile to rehearse a change with.
    NoProfile,
    /// The profile does not cover the load.
    NotCovered(String),
}

impl std::fmt::Display for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Changing => f.write_str("a node is changing"),
            Self::Cooldown { left_s } => write!(
                f,
                "the last change was a short time ago: {left_s:.0} s of cooldown left"
            ),
            Self::TooFew { requests } => write!(f, "{requests} requests in the window are too few to tell"),
            Self::Fine => f.write_str("the SLO is kept and the load is what it was"),
            Self::NoGain => f.write_str("no change would gain more than its margin and chance"),
            Self::Unconfirmed => f.write_str("waits whether the next look says the same"),
            Self::NoProfile => f.write_str("there is no profile to rehearse a change with (--profile FILE)"),
            Self::NotCovered(error) => f.write_str(error),
        }
    }
}

/// What a look came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Advice {
    /// What should be changed, and the nodes that it is best done to, by their numbers.
    pub change: Option<(Change, Vec<usize>)>,
    /// Why nothing is to be done (now).
    pub hold: Option<Hold>,
    /// What was seen.
    pub signals: Signals,
    /// What the rehearsal said, where there was one.
    pub rehearsed: Vec<Rehearsed>,
    /// Prefill and decode nodes that there should be.
    pub target: (usize, usize),
}

/// One cluster's controller.
#[derive(Debug)]
pub struct Controller {
    options: ControlOptions,
    /// The last change, and when the cluster was last seen changing.
    last: Option<(Change, Nanos)>,
    settled: Nanos,
    /// The best change of the last looks, and how many in a row.
    best: Option<(Change, u32)>,
    mix: Option<f64>,
}

impl Controller {
    /// One that has seen nothing.
    pub fn new(options: ControlOptions) -> Self {
        Self {
            options,
            last: None,
            settled: Nanos::ZERO,
            best: None,
            mix: None,
        }
    }

    /// How it decides.
    pub fn options(&self) -> &ControlOptions {
        &self.options
    }

    /// Looks. What it advises counts as done: whoever only shows advice says [`Controller::not_done`].
    pub fn look(&mut self, seen: &Observation) -> Advice {
        let signals = Signals::of(seen, &self.options, self.mix);
        if self.mix.is_none() {
            self.mix = signals.mix;
        }
        let ready = (seen.ready(Side::Prefill), seen.ready(Side::Decode));
        let mut advice = Advice {
            change: None,
            hold: None,
            signals,
            rehearsed: Vec::new(),
            target: ready,
        };
        if let Some(hold) = self.must_hold(seen, &advice.signals) {
            advice.hold = Some(hold);
            return advice;
        }
        let rehearsed = match rehearse(seen, &self.options, &self.possible(seen, ready)) {
            Rehearsal::Tried(all) => all,
            Rehearsal::NoProfile => {
                advice.hold = Some(Hold::NoProfile);
                let change = by_figures(&advice.signals).filter(|change| self.possible(seen, ready).contains(change));
                advice.change = change.map(|change| (change, nodes_for(seen, change)));
                return advice;
            }
            Rehearsal::NotCovered(error) => {
                advice.hold = Some(Hold::NotCovered(error.to_string()));
                return advice;
            }
        };
        advice.rehearsed.clone_from(&rehearsed);
        let Some(best) = self.best_of(&rehearsed, seen.now) else {
            self.best = None;
            // This mix is served as well as it can be: what it takes to look again is another one, or a miss.
            self.mix = advice.signals.mix;
            advice.hold = Some(Hold::NoGain);
            return advice;
        };
        let times = match self.best {
            Some((change, times)) if goes_with(change, best) => times + 1,
            Some(_) | None => 1,
        };
        self.best = Some((best, times));
        advice.target = target(ready, best);
        advice.change = Some((best, nodes_for(seen, best)));
        if times < self.options.confirmations {
            advice.hold = Some(Hold::Unconfirmed);
            return advice;
        }
        (self.best, self.last, self.settled) = (None, Some((best, seen.now)), seen.now);
        advice
    }

    /// The last advice was not followed: it does not count as a change.
    pub fn not_done(&mut self) {
        self.last = None;
    }

    fn must_hold(&mut self, seen: &Observation, signals: &Signals) -> Option<Hold> {
        if seen.is_changing() {
            self.settled = seen.now;
            return Some(Hold::Changing);
        }
        if self.last.is_some() {
            let until = self.settled + self.options.cooldown;
            if seen.now < until {
                return Some(Hold::Cooldown {
                    left_s: (until - seen.now).seconds(),
                });
            }
        }
        if seen.past.len() < self.options.requests_min {
            return Some(Hold::TooFew {
                requests: seen.past.len(),
            });
        }
        (signals.reasons.is_empty() && !self.options.scale).then_some(Hold::Fine)
    }

    /// Never the last node of a side, and no more than the budget.
    fn possible(&self, seen: &Observation, (prefill, decode): (usize, usize)) -> Vec<Change> {
        let mut all = Vec::new();
        for (to, from) in [(Side::Decode, prefill), (Side::Prefill, decode)] {
            let some = AT_ONCE.into_iter().filter(|nodes| *nodes < from);
            all.extend(some.map(|nodes| Change::Role { to, nodes }));
        }
        if self.options.scale {
            let there = seen.nodes.iter().filter(|node| node.state != State::Away).count();
            if there < self.options.nodes_max {
                all.extend([Side::Prefill, Side::Decode].map(|side| Change::Add { side }));
            }
            let more = [(prefill, Side::Prefill), (decode, Side::Decode)];
            let more = more.into_iter().filter(|(count, _)| *count > 1);
            all.extend(more.map(|(_, side)| Change::Remove { side }));
        }
        all
    }

    /// The one that brings most. A node more is for where no other division is enough, a node less for where it is not missed.
    fn best_of(&self, all: &[Rehearsed], now: Nanos) -> Option<Change> {
        let most = |kind: fn(&Change) -> bool| {
            let gains = all.iter().filter(|tried| kind(&tried.change) && self.gains(tried));
            gains
                .max_by(|a, b| a.gain().total_cmp(&b.gain()))
                .map(|tried| tried.change)
        };
        let role = most(|change| matches!(change, Change::Role { .. }));
        let add = || most(|change| matches!(change, Change::Add { .. }));
        let remove = || {
            let kept = self
                .options
                .slo
                .clauses
                .iter()
                .map(|clause| clause.share())
                .fold(0.0, f64::max);
            let spare = all.iter().filter(|tried| {
                matches!(tried.change, Change::Remove { .. })
                    && tried.gain() >= -SPARE
                    && tried.with >= kept
                    && !self.undoes(tried.change, now)
            });
            spare
                .max_by(|a, b| a.gain().total_cmp(&b.gain()))
                .map(|tried| tried.change)
        };
        role.or_else(add).or_else(remove)
    }

    /// Beyond the margin and chance, and for the worse in neither half of the time.
    fn gains(&self, tried: &Rehearsed) -> bool {
        tried.better == Verdict::Yes && tried.gain() >= self.options.margin && tried.lasts()
    }

    fn undoes(&self, change: Change, now: Nanos) -> bool {
        let Some((last, at)) = self.last else { return false };
        let soon = now < at + Nanos(self.options.cooldown.0.saturating_mul(UNDO_COOLDOWNS));
        let opposite = match (last, change) {
            (Change::Add { side: a }, Change::Remove { side: b }) => a == b,
            (Change::Role { .. } | Change::Add { .. } | Change::Remove { .. }, _) => false,
        };
        soon && opposite
    }
}

/// They turn to the same side, however many nodes.
fn goes_with(a: Change, b: Change) -> bool {
    match (a, b) {
        (Change::Role { to: a, .. }, Change::Role { to: b, .. }) => a == b,
        (a, b) => a == b,
    }
}

fn target((prefill, decode): (usize, usize), change: Change) -> (usize, usize) {
    match change {
        Change::Role {
            to: Side::Prefill,
            nodes,
        } => (prefill + nodes, decode - nodes),
        Change::Role {
            to: Side::Decode,
            nodes,
        } => (prefill - nodes, decode + nodes),
        Change::Add { side: Side::Prefill } => (prefill + 1, decode),
        Change::Add { side: Side::Decode } => (prefill, decode + 1),
        Change::Remove { side: Side::Prefill } => (prefill - 1, decode),
        Change::Remove { side: Side::Decode } => (prefill, decode - 1),
    }
}

/// Those with the least to finish, or one that is away.
fn nodes_for(seen: &Observation, change: Change) -> Vec<usize> {
    let nodes = seen.nodes.iter().enumerate();
    let least = |side, count| {
        let ready = nodes
            .clone()
            .filter(|(_, node)| node.state == State::Ready && node.side == side);
        let mut ready: Vec<_> = ready
            .map(|(number, node)| (node.queued_tokens, node.requests, number))
            .collect();
        ready.sort_unstable();
        ready.into_iter().take(count).map(|(_, _, number)| number).collect()
    };
    match change {
        Change::Role { to, nodes } => least(other(to), nodes),
        Change::Remove { side } => least(side, 1),
        Change::Add { .. } => {
            let away = nodes.clone().find(|(_, node)| node.state == State::Away);
            away.map(|(number, _)| number).into_iter().collect()
        }
    }
}

/// Without a rehearsal: the side that the figures blame gets a node of the other one.
fn by_figures(signals: &Signals) -> Option<Change> {
    let blames = |reason: &Reason| match reason {
        Reason::Missed { metric, .. } => match metric {
            crate::slo::Metric::Ttft => Some(Side::Prefill),
            crate::slo::Metric::Itl | crate::slo::Metric::Tpot => Some(Side::Decode),
            crate::slo::Metric::E2e => None,
        },
        Reason::Backlog { .. } => Some(Side::Prefill),
        Reason::Kv { .. } => Some(Side::Decode),
        Reason::Mix { .. } => None,
    };
    let blamed: Vec<Side> = signals.reasons.iter().filter_map(blames).collect();
    let first = *blamed.first()?;
    // Both sides are short: no change of role helps.
    blamed
        .iter()
        .all(|side| *side == first)
        .then_some(Change::Role { to: first, nodes: 1 })
}
