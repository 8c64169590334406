//! What a choice is predicted to be like, and what it costs.
//!
//! The cost is in seconds, and counts everybody: the time until the request has its first [`HORIZON_TOKENS`] tokens, and
//! the time by which it delays those of the others on the decode node. A decode node that prefills stalls its sequences for
//! as long; at least one is counted, since one that comes meanwhile is stalled as well. Hence a prompt is prefilled where it
//! is decoded when that takes less than queueing elsewhere and handing over: what is *short* follows from the predictions.

use super::{Candidate, NodeView, RouteRequest};
use std::time::Duration;

/// Tokens of an answer that a choice is judged by. How many there will be nobody knows yet.
pub const HORIZON_TOKENS: u32 = 64;

/// What a choice is predicted to be like.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Prediction {
    /// Wait before the prefill begins.
    pub queue: Duration,
    /// Prefill of the tokens that the node does not hold.
    pub prefill: Duration,
    /// Hand-over time that compute does not hide. The first token does not wait for it, the second does.
    pub handover: Duration,
    /// One step of the decode node with this sequence added; where it prefills, with its share of such stalls.
    pub itl: Duration,
    /// What all of that costs, this request and others, in seconds.
    pub cost: f64,
}

impl Prediction {
    /// Time to the first token that others follow: what bounds on TTFT are held against.
    pub fn ttft(&self) -> Duration {
        self.queue.saturating_add(self.prefill).saturating_add(self.handover)
    }
}

fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

/// Seconds until a node that prefills has computed the request's prompt: its queue, and the prompt itself.
pub(super) fn prefill_seconds(request: &RouteRequest<'_>, node: &NodeView) -> (f64, f64) {
    let lacking = node.lacking(request);
    let queue = node.times.queue(node.queued_requests, node.queued_tokens);
    let held = u64::from(request.context_tokens - lacking);
    (queue, node.times.prefill(lacking.into(), held))
}

/// What decoding there costs, and its step.
pub(super) fn decode_seconds(request: &RouteRequest<'_>, node: &NodeView) -> (f64, f64) {
    let (others, horizon) = (node.sequences(), f64::from(HORIZON_TOKENS));
    let itl = node.times.decode_step(others.saturating_add(1));
    let slower = itl - node.times.decode_step(others);
    // Without room it waits for another sequence to end: about a whole answer.
    let room = if node.has_room(request) { 0.0 } else { horizon * itl };
    (room + horizon * (itl + slower * f64::from(others)), itl)
}

/// One node prefills, the other decodes.
pub(super) fn pair(request: &RouteRequest<'_>, prefill: &NodeView, decode: &NodeView) -> Candidate {
    let (queue, compute) = prefill_seconds(request, prefill);
    let (decoding, itl) = decode_seconds(request, decode);
    let handover_tokens = decode.lacking(request);
    let handover = request
        .handovers
        .exposed(prefill.instance, decode.instance, handover_tokens.into());
    Candidate {
        prefill: Some(prefill.instance),
        decode: decode.instance,
        prefill_tokens: prefill.lacking(request),
        handover_tokens,
        room: decode.has_room(request),
        measured: prefill.times.prefill_is_measured(),
        idle: prefill.sequences() == 0,
        predicted: Prediction {
            queue: duration(queue),
            prefill: duration(compute),
            handover: duration(handover),
            itl: duration(itl),
            cost: queue + compute + handover + decoding,
        },
    }
}

/// Seconds of one decode node's doing both: its queue, the prompt, a step, and what all of it costs.
fn alone_seconds(request: &RouteRequest<'_>, decode: &NodeView) -> (f64, f64, f64, f64) {
    let (queue, compute) = prefill_seconds(request, decode);
    // Those that wait there for another node's KV do not wait for compute.
    let queue = if decode.queued_tokens == 0 { 0.0 } else { queue };
    let (decoding, itl) = decode_seconds(request, decode);
    let stalled = compute * f64::from(decode.running_requests.max(1));
    let cost = queue + compute + stalled + decoding;
    // While a sequence gets its tokens, about as many others come as there are. Where each is prefilled there, each stalls it.
    let stalls = compute * f64::from(decode.sequences()) / f64::from(HORIZON_TOKENS);
    (queue, compute, itl + stalls, cost)
}

/// What one decode node's doing both costs.
pub(super) fn alone_cost(request: &RouteRequest<'_>, decode: &NodeView) -> f64 {
    alone_seconds(request, decode).3
}

/// One decode node does both.
pub(super) fn alone(request: &RouteRequest<'_>, decode: &NodeView) -> Candidate {
    let (queue, compute, itl, cost) = alone_seconds(request, decode);
    Candidate {
        prefill: None,
        decode: decode.instance,
        prefill_tokens: decode.lacking(request),
        handover_tokens: 0,
        room: decode.has_room(request),
        measured: decode.times.prefill_is_measured(),
        idle: decode.sequences() == 0,
        predicted: Prediction {
            queue: duration(queue),
            prefill: duration(compute),
            handover: Duration::ZERO,
            itl: duration(itl),
            cost,
        },
    }
}
