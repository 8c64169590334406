//! What happened to each request, and all gaps between tokens.

use super::frames::TokenTimes;
use super::histogram::Histogram;
use crate::Nanos;
use crate::profile::{DecodeRow, OutOfRange};
use crate::slo::{Metric, Slo};
use crate::workload::Workload;

/// One request, as its client sees it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    pub first: Option<Nanos>,
    pub last: Nanos,
    pub drawn: u32,
    /// Gaps beyond the bound on ITL.
    pub late: u32,
}

/// Decode steps that were done.
pub(super) struct Run<'a> {
    pub began: Nanos,
    pub took: Nanos,
    /// How long its steps took; none where it is one step that also computed prompts.
    pub row: Option<&'a DecodeRow>,
    /// Tokens that the first attended to.
    pub start: u64,
    pub steps: u64,
    pub batch: u32,
}

#[derive(Debug)]
pub(super) struct Record {
    pub seen: Vec<Seen>,
    /// When each token came, where frames are wanted.
    pub tokens: TokenTimes,
    pub itl: Histogram,
    /// Gaps beyond the bound on ITL, and first tokens beyond the one on TTFT.
    pub late_gaps: u64,
    pub late_firsts: u64,
    itl_bound: f64,
    ttft_bound: Nanos,
    arrivals: Vec<Nanos>,
    budget: Nanos,
    overhead: Nanos,
}

impl Record {
    pub fn new(workload: &Workload, slo: &Slo, budget: Nanos, overhead: Nanos) -> Self {
        let bound = |metric| slo.on(metric).map(|clause| clause.bound);
        Self {
            seen: vec![Seen::default(); workload.len()],
            tokens: TokenTimes::default(),
            itl: Histogram::default(),
            late_gaps: 0,
            late_firsts: 0,
            itl_bound: bound(Metric::Itl).map_or(f64::INFINITY, Nanos::seconds),
            ttft_bound: bound(Metric::Ttft).unwrap_or(Nanos(u64::MAX)),
            arrivals: workload.requests().iter().map(|request| request.at).collect(),
            budget,
            overhead,
        }
    }

    pub fn deadline(&self, request: u32) -> Nanos {
        self.arrivals[request as usize] + self.budget
    }

    pub fn drawn(&self, request: u32) -> u32 {
        self.seen[request as usize].drawn
    }

    /// It gets a token that no decode step drew: the first, or the first after it gave way.
    pub fn draws(&mut self, request: u32, now: Nanos) {
        self.tokens.draws(request, now);
        let arrived = self.arrivals[request as usize];
        let seen = &mut self.seen[request as usize];
        seen.drawn += 1;
        if seen.first.is_none() {
            seen.first = Some(now - arrived + self.overhead);
            self.late_firsts += u64::from(now - arrived + self.overhead > self.ttft_bound);
        } else {
            let gap = (now - seen.last).seconds();
            let late = gap > self.itl_bound;
            self.itl.add(gap, 1);
            seen.late += u32::from(late);
            self.late_gaps += u64::from(late);
        }
        seen.last = now;
    }

    /// Decode steps are over. `fresh` sequences were in them for the first time: the first gap of each began with its last token.
    /// Gives how many of the steps took longer than the bound.
    pub fn run(&mut self, run: &Run<'_>, fresh: &[u32]) -> Result<u64, OutOfRange> {
        let (mut late, mut first) = (0, run.took.seconds());
        let batch = u64::from(run.batch);
        self.tokens.steps(run)?;
        match run.row {
            Some(row) => {
                let mut begun = false;
                row.segments(run.start, run.steps, |segment| {
                    if !std::mem::replace(&mut begun, true) {
                        first = segment.first;
                    }
                    self.itl.add_rising(&segment, batch);
                    late += segment.steps - segment.within(self.itl_bound);
                    true
                })?;
            }
            None => {
                self.itl.add(first, batch);
                late = u64::from(first > self.itl_bound);
            }
        }
        self.late_gaps += late * batch;
        let ends = run.began + Nanos::from_seconds(first);
        for request in fresh {
            let seen = &mut self.seen[*request as usize];
            let gap = ends.saturating_sub(seen.last).seconds();
            self.itl.replace(first, gap);
            let (was, is) = (first > self.itl_bound, gap > self.itl_bound);
            if is && !was {
                seen.late += 1;
                self.late_gaps += 1;
            }
        }
        Ok(late)
    }

    /// It is decoded no more: it got so many tokens, the last of them now.
    pub fn leaves(&mut self, request: u32, drawn: u32, late: u32, now: Nanos) {
        self.tokens.leaves(request, drawn);
        let seen = &mut self.seen[request as usize];
        seen.drawn += drawn;
        seen.late += late;
        if drawn > 0 {
            seen.last = now;
        }
    }
}
