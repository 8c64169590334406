//! What a look came to, in words and figures: as a record for the store and as metrics.

use super::nodes;
use crate::membership::MemberStatus;
use baton_cluster_state::{AdviceRecord, ChangeRecord, NodeCounts, RehearsedRecord};
use baton_planner::control::{Advice, Change, Rehearsed};
use baton_planner::sim::State;
use baton_scheduling::Side;
use baton_types::{NodeId, NodeRole};

/// All kinds of changes, as [`kind`] names them.
const KINDS: [&str; 6] = [
    "to_prefill",
    "to_decode",
    "add_prefill",
    "add_decode",
    "remove_prefill",
    "remove_decode",
];

/// A change's kind, as labels and JSON have it.
pub(super) fn kind(change: Change) -> &'static str {
    match change {
        Change::Role { to: Side::Prefill, .. } => "to_prefill",
        Change::Role { to: Side::Decode, .. } => "to_decode",
        Change::Add { side: Side::Prefill } => "add_prefill",
        Change::Add { side: Side::Decode } => "add_decode",
        Change::Remove { side: Side::Prefill } => "remove_prefill",
        Change::Remove { side: Side::Decode } => "remove_decode",
    }
}

/// A pair of counts.
pub(super) fn counts((prefill, decode): (usize, usize)) -> NodeCounts {
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    NodeCounts {
        prefill: count(prefill),
        decode: count(decode),
    }
}

/// Nodes of a model that take work.
pub(super) fn ready(members: &[MemberStatus], model: &str) -> NodeCounts {
    let of = |role| {
        let ready =
            |member: &&MemberStatus| member.record.role == role && nodes::state(member, model) == Some(State::Ready);
        members.iter().filter(ready).count()
    };
    counts((of(NodeRole::Prefill), of(NodeRole::Decode)))
}

/// Fills in what the controller saw and came to; `names` are those of the nodes that it saw, in order.
pub(super) fn fill(record: &mut AdviceRecord, advice: &Advice, names: &[NodeId]) {
    let signals = &advice.signals;
    record.judged = u32::try_from(signals.judged).unwrap_or(u32::MAX);
    record.attainment = (signals.judged > 0).then_some(signals.good);
    record.reasons = signals.reasons.iter().map(ToString::to_string).collect();
    record.change = advice.change.as_ref().map(|(change, nodes)| ChangeRecord {
        kind: kind(*change).to_owned(),
        text: change.to_string(),
        nodes: nodes
            .iter()
            .filter_map(|node| Some(names.get(*node)?.to_string()))
            .collect(),
    });
    record.hold = advice.hold.as_ref().map(ToString::to_string);
    record.rehearsed = advice.rehearsed.iter().map(rehearsed).collect();
}

fn rehearsed(tried: &Rehearsed) -> RehearsedRecord {
    RehearsedRecord {
        kind: kind(tried.change).to_owned(),
        text: tried.change.to_string(),
        without: tried.without,
        with: tried.with,
        better: tried.better.words().to_owned(),
    }
}

/// Shows what the leader came to, on each coordinator whose controller runs.
pub(super) fn show(record: &AdviceRecord) {
    // Nobody should follow a target that was never known.
    if record.target != NodeCounts::default() {
        for (role, count) in [("prefill", record.target.prefill), ("decode", record.target.decode)] {
            metrics::gauge!("baton_control_target_nodes", "role" => role).set(f64::from(count));
        }
    }
    let advised = record.change.as_ref().map(|change| change.kind.as_str());
    for kind in KINDS {
        metrics::gauge!("baton_control_advice", "change" => kind).set(f64::from(u8::from(advised == Some(kind))));
    }
    if let Some(attainment) = record.attainment {
        metrics::gauge!("baton_control_attainment_ratio").set(attainment);
    }
}

/// Says what the metrics are.
pub(super) fn describe() {
    metrics::describe_gauge!("baton_control_leads", "1 on the coordinator whose controller leads");
    metrics::describe_gauge!("baton_control_target_nodes", "Nodes that there should be, by role");
    metrics::describe_gauge!("baton_control_advice", "1 for the change that is advised");
    metrics::describe_gauge!(
        "baton_control_attainment_ratio",
        "Share of the requests within the SLO, of those that could be judged"
    );
    metrics::describe_counter!("baton_control_changes_total", "Changes decided, by kind and outcome");
    metrics::describe_histogram!("baton_control_look_seconds", "One look, with its rehearsals");
}
