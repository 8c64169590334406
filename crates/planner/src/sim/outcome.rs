//! What a simulation gives.

use super::histogram::Histogram;
use super::life::Order;
use crate::Nanos;
use crate::slo::{Clause, Metric, Slo};

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// With all its tokens.
    Served,
    /// It was refused: too many there already, too late, or too large.
    Refused,
    /// Its nodes failed, or gave it up, more often than it is tried again.
    Failed,
}

/// One request, as its client saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    /// When it came.
    pub at: Nanos,
    /// From its arrival to its first token; none where it was refused.
    pub ttft: Option<Nanos>,
    /// From its arrival to its last token.
    pub e2e: Option<Nanos>,
    /// Tokens of its answer.
    pub tokens: u32,
    /// Gaps beyond the bound on ITL.
    pub late_gaps: u32,
    /// It was prefilled where it was decoded.
    pub local: bool,
    /// Within all bounds.
    pub good: bool,
    /// How it ended; none where the simulation was given up before.
    pub fate: Option<Fate>,
    /// Attempts that were given up: a node failed, or did not become empty in time.
    pub retries: u32,
}

impl Served {
    /// Mean gap between its tokens; none where it has one token or none.
    pub fn tpot(&self) -> Option<Nanos> {
        let (ttft, e2e) = (self.ttft?, self.e2e?);
        (self.tokens > 1).then(|| Nanos(e2e.saturating_sub(ttft).0 / u64::from(self.tokens - 1)))
    }

    /// Says whether it is good.
    pub fn judge(&mut self, slo: &Slo) {
        let within = |clause: &Clause| match clause.metric {
            Metric::Ttft => self.ttft.is_some_and(|time| time <= clause.bound),
            Metric::E2e => self.e2e.is_some_and(|time| time <= clause.bound),
            Metric::Tpot => self.e2e.is_some() && self.tpot().is_none_or(|time| time <= clause.bound),
            Metric::Itl => {
                let gaps = self.tokens.saturating_sub(1);
                self.e2e.is_some() && f64::from(self.late_gaps) <= (1.0 - clause.share()) * f64::from(gaps) + 1e-9
            }
        };
        self.good = slo.clauses.iter().all(within);
    }
}

/// How one node was used.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct NodeUse {
    /// Share of the time that its steps computed prompts.
    pub prefilling: f64,
    /// Share of the time that it only decoded.
    pub decoding: f64,
    /// The most of its KV blocks that were in use, as a share.
    pub kv_peak: f64,
    /// Sequences that gave way to others.
    pub preemptions: u64,
    /// Sequences that it handed on to other decode nodes.
    pub handed_on: u64,
    /// For how long it was paid: from its start until it was stopped, or failed.
    pub paid: Nanos,
}

/// What a simulation gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// In the order in which they came.
    pub requests: Vec<Served>,
    /// All gaps between tokens.
    pub itl: Histogram,
    /// Of these, how many were beyond the bound.
    pub late_gaps: u64,
    /// Prefill nodes, then decode nodes.
    pub nodes: Vec<NodeUse>,
    /// How many of these are prefill nodes.
    pub prefill_nodes: usize,
    /// From the first arrival to the last.
    pub span: Nanos,
    /// Until the last token.
    pub ended: Nanos,
    /// Events that happened.
    pub events: u64,
    /// Prompt tokens that were computed.
    pub tokens_computed: u64,
    /// It was given up: the SLO could not be met any more, and the figures are those until then.
    pub given_up: bool,
    /// Orders that were carried out, and when they were given. Those that did not fit the node's state are not here.
    pub orders: Vec<(Nanos, Order)>,
}

impl Outcome {
    pub(super) fn judge(&mut self, slo: &Slo) {
        self.requests.iter_mut().for_each(|request| request.judge(slo));
    }

    /// Share of a clause's values that are within its bound: of requests (those refused count as beyond), or of gaps.
    pub fn attainment(&self, clause: &Clause) -> f64 {
        let share = |within: usize| within as f64 / self.requests.len().max(1) as f64;
        let count = |time: fn(&Served) -> Option<Nanos>| {
            let within = self
                .requests
                .iter()
                .filter(|r| time(r).is_some_and(|time| time <= clause.bound));
            share(within.count())
        };
        match clause.metric {
            Metric::Ttft => count(|r| r.ttft),
            Metric::E2e => count(|r| r.e2e),
            Metric::Tpot => count(|r| match (r.tpot(), r.e2e) {
                (None, Some(_)) => Some(Nanos::ZERO),
                (tpot, _) => tpot,
            }),
            Metric::Itl => 1.0 - self.late_gaps as f64 / self.itl.total().max(1) as f64,
        }
    }

    /// Every percentile is within its bound.
    pub fn meets(&self, slo: &Slo) -> bool {
        !self.given_up
            && slo
                .clauses
                .iter()
                .all(|clause| self.attainment(clause) >= clause.share())
    }

    /// Share of the requests that were within all bounds.
    pub fn good_share(&self) -> f64 {
        self.requests.iter().filter(|r| r.good).count() as f64 / self.requests.len().max(1) as f64
    }

    /// Requests per second that came.
    pub fn offered(&self) -> f64 {
        (self.requests.len().saturating_sub(1)) as f64 / self.span.seconds().max(1e-9)
    }

    /// Requests per second that were within all bounds.
    pub fn goodput(&self) -> f64 {
        self.good_share() * self.offered()
    }

    /// The time within which this share of the requests was (of the gaps, for ITL). Requests that were refused were not.
    pub fn percentile(&self, metric: Metric, share: f64) -> Option<Nanos> {
        let time = |request: &Served| match metric {
            Metric::Ttft => request.ttft,
            Metric::Tpot => request.tpot(),
            Metric::E2e | Metric::Itl => request.e2e,
        };
        if metric == Metric::Itl {
            return Some(self.itl.percentile(share));
        }
        let mut times: Vec<Nanos> = self.requests.iter().filter_map(time).collect();
        let rank = ((self.requests.len() as f64 * share).ceil() as usize).max(1);
        if rank > times.len() {
            return None;
        }
        Some(*times.select_nth_unstable(rank - 1).1)
    }

    /// Requests that were served.
    pub fn served(&self) -> usize {
        self.requests.iter().filter(|r| r.e2e.is_some()).count()
    }

    /// Requests that were refused.
    pub fn refused(&self) -> usize {
        self.count(Fate::Refused)
    }

    /// Requests that were tried as often as live ones are, and failed.
    pub fn failed(&self) -> usize {
        self.count(Fate::Failed)
    }

    fn count(&self, fate: Fate) -> usize {
        self.requests.iter().filter(|r| r.fate == Some(fate)).count()
    }

    /// Hours of nodes that were paid.
    pub fn node_hours(&self) -> f64 {
        self.nodes.iter().map(|node| node.paid.seconds()).sum::<f64>() / 3600.0
    }
}
