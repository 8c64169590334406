//! What the controller came to, as the wire has it.

use crate::control::ControlStatus;
use baton_cluster_state::{AdviceRecord, ChangeRecord, NodeCounts, RehearsedRecord, Standing};
use baton_node_runtime::Clock;
use baton_proto::v1;
use baton_types::Instance;

/// `own` is this coordinator.
pub(super) fn advise(known: Option<ControlStatus>, own: Instance) -> v1::AdviseResponse {
    let Some(known) = known else {
        return v1::AdviseResponse {
            mode: "off".to_owned(),
            ..v1::AdviseResponse::default()
        };
    };
    let (standing, leader) = match known.standing {
        Standing::Leads { .. } => ("leads", Some(own)),
        Standing::Follows(leader) => ("follows", Some(leader)),
        Standing::Unknown => ("unknown", None),
    };
    let now = Clock::new().unix_seconds();
    v1::AdviseResponse {
        mode: known.mode.to_string(),
        standing: standing.to_owned(),
        leader_instance: leader.map(|leader| leader.to_string()).unwrap_or_default(),
        advice: known.advice.map(|advice| wire(advice, now)),
    }
}

fn wire(advice: AdviceRecord, now: u64) -> v1::ControlAdvice {
    let last = advice.last.map(|last| v1::ControlDecision {
        change: Some(change(last.change)),
        outcome: last.outcome,
        age_s: now.saturating_sub(last.unix_s),
        rehearsed: last.rehearsed.map(rehearsal),
    });
    v1::ControlAdvice {
        age_s: now.saturating_sub(advice.unix_s),
        leader_instance: advice.leader.to_string(),
        mode: advice.mode,
        model: advice.model,
        slo: advice.slo,
        ready: Some(counts(advice.ready)),
        target: Some(counts(advice.target)),
        requests: advice.requests,
        judged: advice.judged,
        attainment: advice.attainment,
        reasons: advice.reasons,
        change: advice.change.map(change),
        hold: advice.hold.unwrap_or_default(),
        rehearsed: advice.rehearsed.into_iter().map(rehearsal).collect(),
        last,
    }
}

fn counts(counts: NodeCounts) -> v1::NodeCounts {
    v1::NodeCounts {
        prefill: counts.prefill,
        decode: counts.decode,
    }
}

fn change(change: ChangeRecord) -> v1::ControlChange {
    v1::ControlChange {
        kind: change.kind,
        text: change.text,
        nodes: change.nodes,
    }
}

fn rehearsal(tried: RehearsedRecord) -> v1::ControlRehearsal {
    v1::ControlRehearsal {
        kind: tried.kind,
        text: tried.text,
        without: tried.without,
        with: tried.with,
        better: tried.better,
    }
}
