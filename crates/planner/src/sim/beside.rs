//! What nodes of one machine do at the same time: how long a node computes while another one does, and what either of them computes.

use crate::Nanos;
use crate::profile::Beside;

/// A time in which a node computed without a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    began: Nanos,
    ended: Nanos,
    /// It only decoded.
    decoding: bool,
}

/// All of one node's, in order.
#[derive(Debug, Default)]
pub(super) struct Spans(Vec<Span>);

impl Spans {
    pub fn push(&mut self, began: Nanos, ended: Nanos, decoding: bool) {
        match self.0.last_mut() {
            Some(last) if last.ended == began && last.decoding == decoding => last.ended = ended,
            _ => self.0.push(Span { began, ended, decoding }),
        }
    }

    /// Seconds of each kind.
    fn seconds(&self) -> [f64; 2] {
        let mut seconds = [0.0; 2];
        for span in &self.0 {
            seconds[usize::from(span.decoding)] += (span.ended - span.began).seconds();
        }
        seconds
    }

    /// Seconds in which both computed: by its own kind, and by the other's.
    fn with(&self, other: &Self) -> Beside {
        let mut seconds = Beside::default();
        let mut others = other.0.iter().peekable();
        for span in &self.0 {
            while let Some(there) = others.peek() {
                let (from, until) = (span.began.max(there.began), span.ended.min(there.ended));
                if from < until {
                    let both = &mut seconds[usize::from(span.decoding)][usize::from(there.decoding)];
                    *both += (until - from).seconds();
                }
                if there.ended > span.ended {
                    break;
                }
                others.next();
            }
        }
        seconds
    }

    /// What the others do while it computes, as shares of its own time; on average where there are several.
    pub fn beside<'a>(&self, others: impl Iterator<Item = &'a Self>) -> Beside {
        let mut shares = Beside::default();
        let (own, mut count) = (self.seconds(), 0.0);
        for other in others {
            count += 1.0;
            for (kind, both) in self.with(other).into_iter().enumerate() {
                for (theirs, seconds) in both.into_iter().enumerate() {
                    shares[kind][theirs] += seconds / own[kind].max(1e-12);
                }
            }
        }
        shares.map(|kind| kind.map(|share| share / f64::max(count, 1.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_own_time_by_what_either_computes() {
        let spans = |all: &[(u64, u64, bool)]| {
            let mut spans = Spans::default();
            for (began, ended, decoding) in all {
                spans.push(Nanos(*began), Nanos(*ended), *decoding);
            }
            spans
        };
        let one = spans(&[(0, 10, false), (10, 20, false), (20, 40, true), (50, 60, true)]);
        assert_eq!(one.0.len(), 3, "what goes on without a pause is one");
        let other = spans(&[
            (5, 15, true),
            (18, 30, false),
            (35, 36, true),
            (39, 55, true),
            (58, 59, false),
        ]);
        // While it prefilled, 0 to 20: 2 beside prompts, 10 beside decoding. While it decoded, 30 in all: 10 and 1, 1 and 1 + 5.
        let close = |a: Beside, b: Beside| {
            for (a, b) in a.iter().flatten().zip(b.iter().flatten()) {
                assert!((a - b).abs() < 1e-9, "{a} is not {b}");
            }
        };
        close(
            one.beside([&other].into_iter()),
            [[0.1, 0.5], [11.0 / 30.0, 7.0 / 30.0]],
        );
        let idle = Spans::default();
        close(
            one.beside([&other, &idle].into_iter()),
            [[0.05, 0.25], [11.0 / 60.0, 7.0 / 60.0]],
        );
        close(idle.beside([&one].into_iter()), Beside::default());
    }
}
