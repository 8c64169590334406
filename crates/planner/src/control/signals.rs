//! What is wrong, from what was seen.

use super::observe::differs;
use super::{ControlOptions, Observation, Past};
use crate::Nanos;
use crate::sim::State;
use crate::slo::{Clause, Metric};
use baton_scheduling::Side;

/// Above this a decode side is short of blocks.
const KV_HIGH: f64 = 0.85;

/// Why a controller looks closer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reason {
    /// Fewer values than the SLO asks for were within a clause's bound.
    Missed {
        /// Which metric.
        metric: Metric,
        /// Share that was within.
        share: f64,
        /// Share that should be.
        wanted: f64,
    },
    /// Prompts that wait take longer than the bound on TTFT.
    Backlog {
        /// Seconds.
        wait_s: f64,
    },
    /// Decode nodes are short of blocks.
    Kv {
        /// Share of their blocks in use.
        used: f64,
    },
    /// Prompt tokens per answer token are not what they were.
    Mix {
        /// Now.
        now: f64,
        /// When it was last looked at.
        before: f64,
    },
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missed { metric, share, wanted } => write!(
                f,
                "{}: {:.1}% within the bound, {:.1}% wanted",
                metric.name(),
                share * 100.0,
                wanted * 100.0
            ),
            Self::Backlog { wait_s } => write!(f, "prompts that wait take {wait_s:.1} s"),
            Self::Kv { used } => write!(f, "{:.0}% of the decode nodes' KV blocks are in use", used * 100.0),
            Self::Mix { now, before } => {
                write!(f, "{now:.1} prompt tokens per answer token, {before:.1} before")
            }
        }
    }
}

/// What the window shows.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Signals {
    /// What is wrong; nothing where this is empty.
    pub reasons: Vec<Reason>,
    /// Share of the requests that are judged which were within all bounds.
    pub good: f64,
    /// Requests that are judged: over, or late already, and not cold.
    pub judged: usize,
    /// Prompt tokens per answer token.
    pub mix: Option<f64>,
}

impl Signals {
    /// `mix_before`: at the last look that led to a rehearsal.
    pub fn of(seen: &Observation, options: &ControlOptions, mix_before: Option<f64>) -> Self {
        let warm: Vec<&Past> = seen.past.iter().filter(|past| is_warm(past, seen, options)).collect();
        let mut reasons = Vec::new();
        for clause in &options.slo.clauses {
            let known: Vec<bool> = warm.iter().filter_map(|past| within(past, clause, seen.now)).collect();
            let share = known.iter().filter(|is| **is).count() as f64 / known.len().max(1) as f64;
            if known.len() >= options.requests_min && share < clause.share() {
                reasons.push(Reason::Missed {
                    metric: clause.metric,
                    share,
                    wanted: clause.share(),
                });
            }
        }
        reasons.extend(backlog(seen, options));
        reasons.extend(kv(seen));
        let mix = Observation::mix(&seen.past);
        if let (Some(now), Some(before)) = (mix, mix_before)
            && differs(now, before)
        {
            reasons.push(Reason::Mix { now, before });
        }
        let judged: Vec<bool> = warm
            .iter()
            .filter_map(|past| is_good(past, options, seen.now))
            .collect();
        let good = judged.iter().filter(|is| **is).count() as f64 / judged.len().max(1) as f64;
        Self {
            reasons,
            good,
            judged: judged.len(),
            mix,
        }
    }
}

/// It came while all nodes were there, and warm.
fn is_warm(past: &Past, seen: &Observation, options: &ControlOptions) -> bool {
    let started_late = |since: Nanos| since > Nanos::ZERO && past.at < since + options.warm_up;
    let ready = seen.nodes.iter().filter(|node| node.state == State::Ready);
    !ready.map(|node| node.ready_since).any(started_late)
}

/// None while it is not known.
fn within(past: &Past, clause: &Clause, now: Nanos) -> Option<bool> {
    if past.lost {
        return Some(false);
    }
    let so_far = now.saturating_sub(past.at);
    let bounded = |time: Option<Nanos>| match time {
        Some(time) => Some(time <= clause.bound),
        None => (so_far > clause.bound).then_some(false),
    };
    match clause.metric {
        Metric::Ttft => bounded(past.ttft),
        Metric::E2e => bounded(past.e2e),
        Metric::Tpot => {
            let (ttft, e2e, tokens) = (past.ttft?, past.e2e?, past.output?);
            let gaps = u64::from(tokens.saturating_sub(1)).max(1);
            Some(e2e.saturating_sub(ttft).0 / gaps <= clause.bound.0)
        }
        Metric::Itl => past.e2e.map(|_| past.late_gaps <= 1.0 - clause.share() + 1e-9),
    }
}

fn is_good(past: &Past, options: &ControlOptions, now: Nanos) -> Option<bool> {
    let all: Vec<Option<bool>> = options
        .slo
        .clauses
        .iter()
        .map(|clause| within(past, clause, now))
        .collect();
    if all.contains(&Some(false)) {
        return Some(false);
    }
    (!all.contains(&None)).then_some(true)
}

fn backlog(seen: &Observation, options: &ControlOptions) -> Option<Reason> {
    let bound = options.slo.on(Metric::Ttft)?.bound.seconds();
    let ready = seen
        .nodes
        .iter()
        .filter(|node| node.state == State::Ready && node.side == Side::Prefill);
    let speed: f64 = ready.clone().map(|node| f64::from(node.prefill_tokens_per_s)).sum();
    let tokens: f64 = ready.map(|node| node.queued_tokens as f64).sum();
    let wait_s = tokens / speed.max(1.0);
    (speed > 0.0 && wait_s > bound).then_some(Reason::Backlog { wait_s })
}

fn kv(seen: &Observation) -> Option<Reason> {
    let ready = seen
        .nodes
        .iter()
        .filter(|node| node.state == State::Ready && node.side == Side::Decode);
    let used: Vec<f64> = ready.map(|node| node.kv_used).collect();
    let mean = used.iter().sum::<f64>() / used.len().max(1) as f64;
    (mean > KV_HIGH).then_some(Reason::Kv { used: mean })
}
