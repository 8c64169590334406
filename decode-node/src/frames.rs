//! Tokens on their way to the coordinator: frames of at most 8 tokens or 20 ms of them. Pure; the caller has the clock.

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
}

impl Frame {
    pub fn new() -> Self {
        Self {
            tokens: v1::Tokens::default(),
            sent: None,
        }
    }

    pub fn push(&mut self, drawn: Drawn) {
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

    /// When it must go; none while it is empty. A frame that follows a pause goes at once.
    pub fn due(&self, now: Moment) -> Option<Moment> {
        let waiting = self.tokens.tokens.len();
        match self.sent {
            _ if waiting == 0 => None,
            Some(sent) if waiting < FRAME_TOKENS => Some(sent + FRAME_TIME),
            Some(_) | None => Some(now),
        }
    }

    /// Empties it.
    pub fn take(&mut self, now: Moment) -> Option<v1::Tokens> {
        if self.tokens.tokens.is_empty() {
            return None;
        }
        self.sent = Some(now);
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

    #[test]
    fn a_frame_goes_at_eight_tokens_or_after_20_ms_or_at_once_after_a_pause() {
        let now = Clock::new().now();
        let mut frame = Frame::new();
        assert_eq!(frame.due(now), None);
        frame.push(drawn(3));
        assert_eq!(frame.due(now), Some(now));
        assert_eq!(frame.take(now).map(|t| (t.first_index, t.tokens)), Some((3, vec![103])));
        frame.push(drawn(4));
        assert_eq!(frame.due(now), Some(now + FRAME_TIME));
        for index in 5..12 {
            frame.push(drawn(index));
        }
        assert_eq!(frame.due(now), Some(now));
        assert_eq!(frame.take(now).map(|t| t.tokens.len()), Some(8));
        frame.push(drawn(12));
        let later = now + Duration::from_millis(30);
        assert!(frame.due(later).is_some_and(|due| due <= later));
    }
}
