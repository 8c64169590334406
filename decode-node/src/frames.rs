//! Tokens on their way to the coordinator: frames of at most 8 tokens or 20 ms of them. A frame goes with the last token that fits:
//! one waits for others only where another is to be expected in time. Pure; the caller has the clock.

use baton_node_host::engine::{Drawn, PrefillDone};
use baton_node_runtime::Moment;
use baton_proto::v1;
use std::time::Duration;

/// Tokens of one frame.
const FRAME_TOKENS: usize = 8;
/// Tokens wait no longer than this for others of their frame.
const FRAME_TIME: Duration = Duration::from_millis(20);

/// What a locally computed prompt adds to the first frame.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LocalPrefill {
    pub queued: Duration,
    pub cached_tokens: usize,
    pub done: Option<PrefillDone>,
}

/// The frame that is being filled.
pub(crate) struct Frame {
    tokens: v1::Tokens,
    /// When the one before was sent; none: never.
    sent: Option<Moment>,
    /// When its last token came, and the longest wait for any of its tokens: the next may take as long. Not the last wait: several
    /// tokens of one step come together.
    last: Option<Moment>,
    wait: Duration,
}

impl Frame {
    pub fn new() -> Self {
        Self {
            tokens: v1::Tokens::default(),
            sent: None,
            last: None,
            wait: Duration::ZERO,
        }
    }

    pub fn push(&mut self, drawn: Drawn, now: Moment) {
        if let Some(last) = self.last.replace(now) {
            self.wait = self.wait.max(now.saturating_since(last));
        }
        if self.tokens.tokens.is_empty() {
            self.tokens.first_index = drawn.index;
        }
        self.tokens.tokens.push(drawn.token);
        self.tokens.logprobs.extend(drawn.logprobs.map(v1::TokenLogprobs::from));
    }

    pub fn add_prefill(&mut self, local: &LocalPrefill) {
        let us = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        self.tokens.queue_us = Some(us(local.queued));
        self.tokens.cached_tokens = Some(count(local.cached_tokens));
        self.tokens.prefill_us = local.done.map(|done| us(done.took));
        self.tokens.prefill_tokens = local.done.map(|done| count(done.tokens));
    }

    /// When it must go; none while it is empty. A frame that follows a pause goes with its first token.
    pub fn due(&self) -> Option<Moment> {
        let last = self.last.filter(|_| !self.tokens.tokens.is_empty())?;
        let until = self.sent.map_or(last, |sent| sent + FRAME_TIME);
        Some(if self.is_full() || last + self.wait > until {
            last
        } else {
            until
        })
    }

    /// It takes no more. The first one goes with its first token.
    pub fn is_full(&self) -> bool {
        let waiting = self.tokens.tokens.len();
        waiting >= FRAME_TOKENS || self.sent.is_none() && waiting > 0
    }

    /// Empties it.
    pub fn take(&mut self, now: Moment) -> Option<v1::Tokens> {
        if self.tokens.tokens.is_empty() {
            return None;
        }
        (self.sent, self.wait) = (Some(now), Duration::ZERO);
        Some(std::mem::take(&mut self.tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_node_runtime::Clock;

    fn drawn(index: u32) -> Drawn {
        Drawn {
            index,
            token: index + 100,
            logprobs: None,
            finish: None,
        }
    }

    /// What goes when, in ms, of tokens that come at these times: by the rule, and by the timer where the next token is later.
    fn sent(times: &[u64]) -> Vec<(u64, usize)> {
        let start = Clock::new().now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let ms = |moment: Moment| u64::try_from(moment.saturating_since(start).as_millis()).unwrap();
        let (mut frame, mut sent) = (Frame::new(), Vec::new());
        for (index, time) in times.iter().enumerate() {
            frame.push(drawn(u32::try_from(index).unwrap()), at(*time));
            let due = frame.due().unwrap();
            let next = times.get(index + 1).map_or(u64::MAX, |next| *next);
            if ms(due) < next {
                let due = due.max(at(*time));
                sent.extend(frame.take(due).map(|tokens| (ms(due), tokens.tokens.len())));
            }
        }
        sent
    }

    #[test]
    fn a_frame_goes_with_the_last_token_that_fits_into_20_ms() {
        assert_eq!(Frame::new().due(), None);
        // Steps of 6 ms: three fit.
        assert_eq!(sent(&[0, 6, 12, 18, 24, 30, 36]), [(0, 1), (18, 3), (36, 3)]);
        // Slow steps wait for nothing, fast ones fill frames.
        assert_eq!(sent(&[0, 12, 24, 60]), [(0, 1), (12, 1), (24, 1), (60, 1)]);
        assert_eq!(sent(&[0, 1, 2, 3, 4, 5, 6, 7, 8]), [(0, 1), (8, 8)]);
    }

    #[test]
    fn a_frame_whose_next_token_is_late_goes_after_20_ms() {
        assert_eq!(sent(&[0, 6, 50, 51]), [(0, 1), (20, 1), (50, 1), (70, 1)]);
    }

    #[test]
    fn tokens_of_one_step_go_together_and_do_not_pass_for_short_steps() {
        assert_eq!(sent(&[0, 11, 11, 11, 22]), [(0, 1), (11, 3), (22, 1)]);
    }

    #[test]
    fn a_frame_tells_its_first_index() {
        let now = Clock::new().now();
        let mut frame = Frame::new();
        frame.push(drawn(3), now);
        frame.push(drawn(4), now);
        assert_eq!(
            frame.take(now).map(|t| (t.first_index, t.tokens)),
            Some((3, vec![103, 104]))
        );
        assert_eq!(frame.take(now), None);
    }

    #[test]
    fn the_first_frame_takes_one_token_later_ones_eight() {
        let now = Clock::new().now();
        let mut frame = Frame::new();
        for most in [1, 8, 8] {
            for _ in 0..most {
                assert!(!frame.is_full());
                frame.push(drawn(0), now);
            }
            assert!(frame.is_full());
            assert!(frame.take(now).is_some());
        }
    }
}
