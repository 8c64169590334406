//! Percentiles and goodput of a run.

use crate::{Failure, Observed, Run};
use baton_planner::Nanos;
use baton_planner::sim::{Fate, Served};
use baton_planner::slo::{Clause, Metric, Slo};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How a figure is distributed; seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Percentiles {
    /// How many values.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// Half are at most this. None here and below: so many requests failed that the percentile falls on one of them.
    pub p50: Option<f64>,
    /// 90% are.
    pub p90: Option<f64>,
    /// 99% are.
    pub p99: Option<f64>,
    /// 99.9% are.
    pub p999: Option<f64>,
    /// The largest.
    pub max: Option<f64>,
}

impl Percentiles {
    /// Of values, and of so many more that are beyond every bound because their requests failed. A percentile is the smallest value
    /// that at least this share is within, as in the planner.
    pub fn of(values: impl IntoIterator<Item = f64>, failed: usize) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_unstable_by(f64::total_cmp);
        let all = values.len() + failed;
        let at = |share: f64| {
            let rank = ((all as f64 * share).ceil() as usize).max(1);
            values.get(rank - 1).copied()
        };
        Self {
            count: values.len() as u64,
            mean: values.iter().sum::<f64>() / values.len().max(1) as f64,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: values.last().copied(),
        }
    }
}

/// One clause of an SLO.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attained {
    /// As it was written.
    pub clause: String,
    /// Share of the values within its bound: of requests (those that failed are beyond), or of gaps.
    pub share: f64,
    /// It is large enough.
    pub met: bool,
}

/// How an SLO was kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Goodput {
    /// Requests per second that were within all bounds.
    pub rps: f64,
    /// Share of the requests.
    pub share: f64,
    /// By clause.
    pub attained: Vec<Attained>,
}

/// A run in figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Requests that ended.
    pub requests: usize,
    /// Those with a whole answer.
    pub served: usize,
    /// Those that were refused.
    pub refused: usize,
    /// Those that failed otherwise.
    pub errors: usize,
    /// Those that had not ended, or were not sent, when the run was stopped.
    pub unfinished: usize,
    /// What the errors said, each once, at most 5.
    pub said: Vec<String>,
    /// Requests per second that came: gaps between them over the time from the first to the last.
    pub offered_rps: f64,
    /// Requests per second that were served, over the whole time.
    pub served_rps: f64,
    /// Tokens of prompts, of requests that were served.
    pub prompt_tokens: u64,
    /// Tokens of answers.
    pub tokens: u64,
    /// Of answers, per second.
    pub tokens_per_s: f64,
    /// From start to end, seconds.
    pub took_s: f64,
    /// How late requests were sent: the generator's own delay, a part of TTFT and E2E.
    pub dispatch_delay: Percentiles,
    /// From when a request was due to its first token.
    pub ttft: Percentiles,
    /// Gaps between tokens: a frame of n tokens after a gap of g counts as n gaps of g/n.
    pub itl: Percentiles,
    /// Gaps between frames, as they came.
    pub frame_gap: Percentiles,
    /// Mean gap of a request.
    pub tpot: Percentiles,
    /// From when a request was due to its last token.
    pub e2e: Percentiles,
    /// Where there was an SLO.
    pub goodput: Option<Goodput>,
}

impl Summary {
    /// Of a run, judged by an SLO where there is one.
    pub fn of(run: &Run, slo: Option<&Slo>) -> Self {
        let (requests, count) = (&run.requests, |failed: fn(&Failure) -> bool| {
            run.requests
                .iter()
                .filter(|r| r.failure.as_ref().is_some_and(failed))
                .count()
        });
        let served = requests.iter().filter(|r| r.is_served()).count();
        let failed = requests.len() - served;
        let took = run.took.as_secs_f64().max(1e-9);
        let times = |of: fn(&Observed) -> Option<Duration>| {
            let served = requests.iter().filter(|r| r.is_served());
            served.filter_map(of).map(|time| time.as_secs_f64())
        };
        let whole = || requests.iter().filter(|r| r.is_served());
        let tokens: u64 = whole().map(|r| u64::from(r.tokens())).sum();
        Self {
            requests: requests.len(),
            served,
            refused: count(|failure| matches!(failure, Failure::Refused { .. })),
            errors: count(|failure| matches!(failure, Failure::Error(_))),
            unfinished: run.unfinished + run.unsent,
            said: said(requests),
            offered_rps: offered(requests),
            served_rps: served as f64 / took,
            prompt_tokens: whole().map(|r| u64::from(r.prompt_tokens)).sum(),
            tokens,
            tokens_per_s: tokens as f64 / took,
            took_s: run.took.as_secs_f64(),
            dispatch_delay: Percentiles::of(requests.iter().map(|r| r.dispatch_delay.as_secs_f64()), 0),
            ttft: Percentiles::of(times(Observed::ttft), failed),
            itl: Percentiles::of(whole().flat_map(Observed::token_gaps), 0),
            frame_gap: Percentiles::of(whole().flat_map(Observed::frame_gaps), 0),
            tpot: Percentiles::of(times(Observed::tpot), 0),
            e2e: Percentiles::of(times(Observed::e2e), failed),
            goodput: slo.map(|slo| goodput(requests, slo)),
        }
    }
}

fn offered(requests: &[Observed]) -> f64 {
    let span = match (requests.first(), requests.last()) {
        (Some(first), Some(last)) => (last.at - first.at).as_secs_f64(),
        (_, _) => 0.0,
    };
    requests.len().saturating_sub(1) as f64 / span.max(1e-9)
}

fn said(requests: &[Observed]) -> Vec<String> {
    let mut said: Vec<String> = Vec::new();
    for failure in requests.iter().filter_map(|r| r.failure.as_ref()) {
        let (Failure::Refused { reason: text, .. } | Failure::Error(text)) = failure;
        if said.len() < 5 && !said.contains(text) {
            said.push(text.clone());
        }
    }
    said
}

/// A request as the planner judges its simulated ones.
fn judged(observed: &Observed, slo: &Slo) -> Served {
    let nanos = |time: Duration| Nanos(time.as_nanos() as u64);
    let bound = slo
        .on(Metric::Itl)
        .map_or(f64::INFINITY, |clause| clause.bound.seconds());
    let served = observed.is_served();
    let mut request = Served {
        at: nanos(observed.at),
        ttft: observed.ttft().filter(|_| served).map(nanos),
        e2e: observed.e2e().map(nanos),
        tokens: observed.tokens(),
        late_gaps: observed.token_gaps().filter(|gap| *gap > bound).count() as u32,
        local: false,
        good: false,
        fate: Some(match &observed.failure {
            None => Fate::Served,
            Some(Failure::Refused { .. }) => Fate::Refused,
            Some(Failure::Error(_)) => Fate::Failed,
        }),
        retries: 0,
    };
    request.judge(slo);
    request
}

fn goodput(requests: &[Observed], slo: &Slo) -> Goodput {
    let judged: Vec<Served> = requests.iter().map(|observed| judged(observed, slo)).collect();
    let all = judged.len().max(1) as f64;
    let within = |clause: &Clause| -> f64 {
        let share = |time: fn(&Served) -> Option<Nanos>| {
            let within = |request: &&Served| time(request).is_some_and(|time| time <= clause.bound);
            judged.iter().filter(within).count() as f64 / all
        };
        match clause.metric {
            Metric::Ttft => share(|r| r.ttft),
            Metric::E2e => share(|r| r.e2e),
            Metric::Tpot => share(|r| r.e2e.map(|_| r.tpot().unwrap_or(Nanos::ZERO))),
            Metric::Itl => {
                let (mut gaps, mut late) = (0_u64, 0_u64);
                for (observed, request) in requests.iter().zip(&judged).filter(|(o, _)| o.is_served()) {
                    gaps += observed.token_gaps().count() as u64;
                    late += u64::from(request.late_gaps);
                }
                1.0 - late as f64 / gaps.max(1) as f64
            }
        }
    };
    let share = judged.iter().filter(|request| request.good).count() as f64 / all;
    let attained = slo.clauses.iter().map(|clause| {
        let share = within(clause);
        Attained {
            clause: clause.to_string(),
            share,
            met: share >= clause.share(),
        }
    });
    Goodput {
        rps: share * offered(requests),
        share,
        attained: attained.collect(),
    }
}
