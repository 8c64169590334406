//! What the engine thread tells about its load. Written by it alone, read by heartbeats and by refusals.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Weight of the newest measurement in the moving averages.
const NEWEST: f64 = 0.2;

/// The engine's load at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct EngineLoad {
    /// Sequences that wait for blocks or for a reservation.
    pub queued: usize,
    /// Tokens that wait to be computed before first tokens can be drawn.
    pub queued_tokens: u64,
    /// Sequences that are being computed.
    pub running: usize,
    /// Moving average; 0 while nothing was measured.
    pub prefill_tokens_per_s: f64,
    /// Moving average; 0 while nothing was measured.
    pub decode_step_us: f64,
}

impl EngineLoad {
    /// When the queue will have moved on, for whoever is refused now.
    pub fn retry_after(&self) -> Duration {
        let rate = if self.prefill_tokens_per_s > 0.0 {
            self.prefill_tokens_per_s
        } else {
            500.0
        };
        let share = self.queued_tokens as f64 / self.queued.max(1) as f64;
        Duration::from_secs_f64((share / rate).clamp(0.1, 30.0))
    }
}

#[derive(Debug, Default)]
pub(crate) struct Gauges(Mutex<EngineLoad>);

impl Gauges {
    pub fn load(&self) -> EngineLoad {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_queue(&self, queued: usize, queued_tokens: u64, running: usize) {
        let mut load = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (load.queued, load.queued_tokens, load.running) = (queued, queued_tokens, running);
        drop(load);
        metrics::gauge!("baton_node_queued_requests").set(queued as f64);
        metrics::gauge!("baton_node_queued_tokens").set(queued_tokens as f64);
        metrics::gauge!("baton_node_running_requests").set(running as f64);
    }

    /// Of `drafted` draft tokens, `right` were.
    pub fn drafted(&self, drafted: usize, right: usize) {
        if drafted > 0 {
            metrics::counter!("baton_node_draft_tokens_total").increment(drafted as u64);
            metrics::counter!("baton_node_draft_tokens_accepted_total").increment(right as u64);
        }
    }

    /// A step of `prompt` prompt tokens and of `decoding` sequences, for which `drawn` tokens were drawn, took `took`. A mixed
    /// step says little about either, so that only pure ones count. Where several tokens were drawn from one step, its time
    /// counts by what a token took.
    pub fn step_took(&self, prompt: usize, (decoding, drawn): (usize, usize), took: Duration) {
        metrics::histogram!("baton_node_step_seconds").record(took.as_secs_f64());
        metrics::counter!("baton_node_prefill_tokens_total").increment(prompt as u64);
        metrics::counter!("baton_node_decode_tokens_total").increment(drawn as u64);
        let mut load = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = took.as_secs_f64().max(1e-9);
        if decoding == 0 {
            // A chunk of a few tokens measures overhead: it counts by its size.
            let weight = NEWEST * (prompt as f64 / 64.0).min(1.0);
            mix(&mut load.prefill_tokens_per_s, prompt as f64 / seconds, weight);
        } else if prompt == 0 {
            let per_token = seconds * decoding as f64 / drawn.max(1) as f64;
            mix(&mut load.decode_step_us, per_token * 1e6, NEWEST);
        }
    }
}

fn mix(average: &mut f64, newest: f64, weight: f64) {
    *average = if *average == 0.0 {
        newest
    } else {
        *average + weight * (newest - *average)
    };
}
