//! What clients see of tokens: decode nodes send them in frames (`decode-node/src/frames.rs`), so gaps are those between frames, and
//! a frame of n tokens after a gap of g counts as n gaps of g/n, as replays measure it.

use super::cluster::Cluster;
use super::histogram::Histogram;
use super::outcome::Outcome;
use super::record::Run;
use crate::Nanos;
use crate::profile::OutOfRange;
use crate::slo::Metric;

/// As decode nodes have it: tokens of one frame, and how long they wait for others of it.
const FRAME_TOKENS: u32 = 8;
const FRAME_TIME: Nanos = Nanos(20_000_000);
/// Timers count whole milliseconds and round up: live frames that a timer ends, their next token being late, are 20.8 ms apart.
const TIMER_LATE: Nanos = Nanos(800_000);

/// When each request's tokens came.
#[derive(Debug, Default)]
pub(super) struct TokenTimes {
    /// Ends of decode steps, by node. A sequence that leaves a batch was in its last steps.
    steps: Vec<Vec<Nanos>>,
    /// By request.
    times: Vec<Vec<Nanos>>,
    node: usize,
}

impl TokenTimes {
    /// From now on; without it nothing is kept.
    pub fn keep(&mut self, nodes: usize, requests: usize) {
        self.steps = vec![Vec::new(); nodes];
        self.times = vec![Vec::new(); requests];
    }

    /// What follows happens at this node.
    pub fn at_node(&mut self, node: u32) {
        self.node = node as usize;
    }

    pub fn draws(&mut self, request: u32, now: Nanos) {
        if let Some(times) = self.times.get_mut(request as usize) {
            times.push(now);
        }
    }

    pub fn steps(&mut self, run: &Run<'_>) -> Result<(), OutOfRange> {
        let Some(steps) = self.steps.get_mut(self.node) else {
            return Ok(());
        };
        let Some(row) = run.row else {
            steps.push(run.began + run.took);
            return Ok(());
        };
        let mut passed = 0.0;
        row.segments(run.start, run.steps, |segment| {
            for step in 0..segment.steps {
                passed += segment.first + segment.rise * step as f64;
                steps.push(run.began + Nanos::from_seconds(passed));
            }
            true
        })
    }

    pub fn leaves(&mut self, request: u32, drawn: u32) {
        let (Some(steps), Some(times)) = (self.steps.get(self.node), self.times.get_mut(request as usize)) else {
            return;
        };
        times.extend_from_slice(&steps[steps.len().saturating_sub(drawn as usize)..]);
    }
}

/// The frames of one request: when each is sent, and its tokens. Where it was handed over, the second token is the decode node's first,
/// which waits for no others.
fn frames(times: &[Nanos], handed_over: bool) -> Vec<(Nanos, u32)> {
    let alone = if handed_over { 2 } else { 1 };
    let (alone, later) = times.split_at(alone.min(times.len()));
    let mut frames: Vec<(Nanos, u32)> = alone.iter().map(|at| (*at, 1)).collect();
    let mut last = alone.last().copied().unwrap_or(Nanos::ZERO);
    let (mut sent, mut waiting, mut wait) = (last, 0, Nanos::ZERO);
    for (index, time) in later.iter().enumerate() {
        let due = sent + FRAME_TIME + TIMER_LATE;
        if waiting > 0 && due < *time {
            frames.push((due, waiting));
            (sent, waiting, wait) = (due, 0, Nanos::ZERO);
        }
        wait = wait.max(*time - last);
        last = *time;
        waiting += 1;
        let fits = waiting < FRAME_TOKENS && *time + wait <= sent + FRAME_TIME;
        if !fits || index + 1 == later.len() {
            frames.push((*time, waiting));
            (sent, waiting, wait) = (*time, 0, Nanos::ZERO);
        }
    }
    frames
}

/// Counts the gaps anew.
pub(super) fn reframe(outcome: &mut Outcome, cluster: &Cluster<'_>) {
    let slo = &cluster.options.slo;
    let bound = slo
        .on(Metric::Itl)
        .map_or(f64::INFINITY, |clause| clause.bound.seconds());
    let mut itl = Histogram::default();
    outcome.late_gaps = 0;
    let times = &cluster.record.tokens.times;
    for ((served, times), journey) in outcome.requests.iter_mut().zip(times).zip(&cluster.journeys) {
        served.late_gaps = 0;
        let handed_over = journey.committed && journey.prefill.is_some();
        for pair in frames(times, handed_over).windows(2) {
            let ((before, _), (at, tokens)) = (pair[0], pair[1]);
            let gap = (at - before).seconds() / f64::from(tokens);
            itl.add(gap, u64::from(tokens));
            if gap > bound {
                served.late_gaps += tokens;
            }
        }
        outcome.late_gaps += u64::from(served.late_gaps);
    }
    outcome.itl = itl;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(frames: &[(Nanos, u32)]) -> Vec<(u64, u32)> {
        frames.iter().map(|(at, tokens)| (at.0 / 1_000_000, *tokens)).collect()
    }

    fn at(ms: &[u64]) -> Vec<Nanos> {
        ms.iter().map(|ms| Nanos(ms * 1_000_000)).collect()
    }

    #[test]
    fn tokens_wait_for_others_of_their_frame_as_live_ones_do() {
        // Steps of 8 ms on one node: two fit into 20 ms.
        let local = frames(&at(&[100, 108, 116, 124, 132, 140]), false);
        assert_eq!(ms(&local), [(100, 1), (116, 2), (132, 2), (140, 1)]);
        // Handed over: the first token of the second node goes at once.
        let handed = frames(&at(&[100, 113, 121, 129, 137]), true);
        assert_eq!(ms(&handed), [(100, 1), (113, 1), (129, 2), (137, 1)]);
        assert_eq!(ms(&frames(&at(&[100]), true)), [(100, 1)]);
        // Slow steps are not held up, fast ones fill frames of eight.
        assert_eq!(ms(&frames(&at(&[0, 12, 24]), false)), [(0, 1), (12, 1), (24, 1)]);
        let fast: Vec<u64> = (0..=9).collect();
        assert_eq!(ms(&frames(&at(&fast), false)), [(0, 1), (8, 8), (9, 1)]);
        // Where the next token is late, a timer ends the wait, a little late as well.
        assert_eq!(
            ms(&frames(&at(&[0, 6, 50, 51]), false)),
            [(0, 1), (20, 1), (50, 1), (51, 1)]
        );
        assert!(frames(&[], false).is_empty());
    }
}
