//! An explanation as a message.

use super::convert::timeline;
use crate::driver::{Choice, Explanation};
use baton_proto::v1;
use baton_scheduling::{Candidate, Decision};
use baton_types::Instance;
use std::time::Duration;

/// The whole of it.
pub(super) fn explanation(known: Explanation) -> v1::ExplainResponse {
    v1::ExplainResponse {
        decisions: known.choices.iter().map(decision).collect(),
        outcome: known.outcome.to_owned(),
        timeline: known.timeline.map(timeline),
    }
}

fn decision(choice: &Choice) -> v1::RoutingDecision {
    let (word, reason, chosen) = match &choice.routed.decision {
        Decision::Place(chosen) => ("place", String::new(), Some(chosen)),
        Decision::Hold { reason } => ("hold", reason.to_string(), None),
        Decision::Refuse { reason, .. } => ("refuse", reason.to_string(), None),
    };
    let candidates = choice.routed.candidates.iter();
    v1::RoutingDecision {
        at_us: choice.at_us,
        policy: choice.policy.name().to_owned(),
        context_tokens: choice.context_tokens,
        decision: word.to_owned(),
        reason,
        candidates: candidates.map(|c| candidate(choice, c, chosen == Some(c))).collect(),
    }
}

fn candidate(choice: &Choice, candidate: &Candidate, chosen: bool) -> v1::RoutingCandidate {
    // A node that left meanwhile is told by its process.
    let name = |instance: Instance| {
        let known = choice.names.iter().find(|(known, _)| *known == instance);
        known.map_or_else(|| instance.to_string(), |(_, node)| node.to_string())
    };
    let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let predicted = &candidate.predicted;
    v1::RoutingCandidate {
        prefill_node: candidate.prefill.map(name).unwrap_or_default(),
        decode_node: name(candidate.decode),
        chosen,
        prefill_tokens: candidate.prefill_tokens,
        handover_tokens: candidate.handover_tokens,
        room: candidate.room,
        measured: candidate.measured,
        queue_us: us(predicted.queue),
        prefill_us: us(predicted.prefill),
        handover_us: us(predicted.handover),
        itl_us: us(predicted.itl),
        cost_s: predicted.cost,
    }
}
