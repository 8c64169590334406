//! The figures of a request's timeline, gathered as they come. Moments are microseconds since the request's arrival.

use super::event::{Handover, LocalPrefill};
use crate::Timeline;

/// What is known so far.
#[derive(Debug, Default)]
pub(super) struct Times {
    timeline: Timeline,
    /// When the node that prefills was asked.
    asked_us: u64,
    first_token_us: Option<u64>,
    last_token_us: u64,
    /// Of the decode node, where it told: tokens and the time between them.
    decoded: Option<(u32, u64)>,
}

impl Times {
    /// An attempt begins; figures of the hand-over before are void.
    pub(super) fn attempt(&mut self) {
        self.timeline.attempts += 1;
        self.handed_over(Handover::default());
        self.timeline.held_tokens = 0;
        self.decoded = None;
    }

    /// An attempt that found no place is none.
    pub(super) fn attempt_was_refused(&mut self) {
        self.timeline.attempts = self.timeline.attempts.saturating_sub(1);
    }

    pub(super) fn attempts(&self) -> u32 {
        self.timeline.attempts
    }

    pub(super) fn fallback(&mut self, why: String) {
        self.timeline.fallbacks.push(why);
    }

    /// Another node goes on with the sequence; how it came to the first one stays told.
    pub(super) fn moved(&mut self, node: &str, why: String) {
        self.decode_chosen(node);
        self.decoded = None;
        self.timeline.fallbacks.push(why);
    }

    pub(super) fn last_fallback(&self) -> Option<&str> {
        self.timeline.fallbacks.last().map(String::as_str)
    }

    pub(super) fn decode_chosen(&mut self, node: &str) {
        node.clone_into(&mut self.timeline.decode_node);
    }

    pub(super) fn prefill_asked(&mut self, node: &str, now_us: u64) {
        node.clone_into(&mut self.timeline.prefill_node);
        self.asked_us = now_us;
    }

    pub(super) fn prefill_started(&mut self, queue_us: u64, cached_tokens: u32) {
        self.timeline.queue_us = self.asked_us + queue_us;
        self.timeline.cached_tokens = cached_tokens;
    }

    pub(super) fn prefilled(&mut self, prefill_us: u64, prefill_tokens: u32) {
        self.timeline.prefill_us = prefill_us;
        self.timeline.prefill_tokens = prefill_tokens;
    }

    pub(super) fn prefilled_locally(&mut self, local: LocalPrefill) {
        self.prefill_started(local.queue_us, local.cached_tokens);
        self.prefilled(local.prefill_us, local.prefill_tokens);
        "local".clone_into(&mut self.timeline.handover_path);
    }

    /// As the receiver counted.
    pub(super) fn committed(&mut self, bytes: u64, held_tokens: u32) {
        self.timeline.handover_bytes = bytes;
        self.timeline.held_tokens = held_tokens;
    }

    pub(super) fn handed_over(&mut self, handover: Handover) {
        let Handover {
            path,
            fallbacks,
            bytes,
            exposed_us,
            reserve_us,
            busy_us,
        } = handover;
        self.timeline.handover_path = path;
        self.timeline.path_fallbacks = fallbacks;
        self.timeline.handover_bytes = bytes;
        self.timeline.exposed_us = exposed_us;
        self.timeline.reserve_us = reserve_us;
        let rate = (u128::from(bytes) * 1_000_000).checked_div(u128::from(busy_us));
        self.timeline.handover_bytes_per_second = u64::try_from(rate.unwrap_or(0)).unwrap_or(u64::MAX);
    }

    pub(super) fn delivered(&mut self, now_us: u64) {
        if self.first_token_us.is_none() {
            self.first_token_us = Some(now_us);
            self.timeline.ttft_us = now_us;
        }
        self.last_token_us = now_us;
    }

    pub(super) fn decoded(&mut self, tokens: u32, us: u64) {
        self.decoded = Some((tokens, us));
    }

    pub(super) fn cached_tokens(&self) -> u32 {
        self.timeline.cached_tokens
    }

    /// All of it. Where the decode node gave no figures (it was cut short), those seen from here stand in.
    pub(super) fn finish(&mut self, tokens: usize) -> Timeline {
        let mut timeline = std::mem::take(&mut self.timeline);
        timeline.decode_us_per_token = match (self.decoded, self.first_token_us) {
            (Some((decoded, us)), _) if decoded > 0 => us / u64::from(decoded),
            (_, Some(first)) if tokens > 1 => (self.last_token_us - first) / (tokens as u64 - 1),
            _ => 0,
        };
        if timeline.handover_path.is_empty() {
            let path = if timeline.handover_bytes == 0 {
                "local"
            } else {
                "unknown"
            };
            path.clone_into(&mut timeline.handover_path);
        }
        timeline
    }
}
