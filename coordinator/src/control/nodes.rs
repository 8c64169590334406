//! The nodes, as a controller wants to know them, from what their records and heartbeats say.

use crate::membership::MemberStatus;
use baton_planner::Nanos;
use baton_planner::control::NodeSeen;
use baton_planner::sim::State;
use baton_proto::v1;
use baton_scheduling::Side;
use baton_types::{BlockCounts, Instance, NodeId, NodeRole, NodeState};
use std::collections::HashMap;

/// How much of the past the share of foreign requests keeps with each look.
const KEPT: f64 = 0.8;
/// Fewer requests than this say nothing of whose they are.
const REQUESTS_MIN: f64 = 4.0;

/// Follows the nodes from look to look.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    /// In which role each is ready, and since when; those of the first look were ready before anybody looked.
    since: HashMap<Instance, (NodeRole, Nanos)>,
    looked: bool,
    /// Requests on decode nodes that this coordinator did not place there, and all; both fade.
    foreign: f64,
    all: f64,
}

impl Nodes {
    /// The nodes of a model with their names, in the same order.
    pub(super) fn look(&mut self, members: &[MemberStatus], model: &str, now: Nanos) -> (Vec<NodeSeen>, Vec<NodeId>) {
        let before = std::mem::take(&mut self.since);
        let first = !std::mem::replace(&mut self.looked, true);
        let (mut seen, mut names) = (Vec::new(), Vec::new());
        (self.foreign, self.all) = (self.foreign * KEPT, self.all * KEPT);
        for member in members {
            let Some(state) = state(member, model) else { continue };
            let (role, instance) = (member.record.role, member.record.instance);
            let load = member.load.clone().unwrap_or_default();
            let known = before.get(&instance).filter(|(known, _)| *known == role);
            let ready_since = match known {
                Some((_, since)) => *since,
                None if first => Nanos::ZERO,
                None => now,
            };
            if state == State::Ready {
                self.since.insert(instance, (role, ready_since));
                if role == NodeRole::Decode {
                    self.foreign += f64::from(member.foreign_requests);
                    self.all += f64::from(load.queued_requests + load.running_requests);
                }
            }
            seen.push(NodeSeen {
                side: side(role),
                state,
                ready_since,
                queued_tokens: load.queued_tokens,
                requests: load.queued_requests + load.running_requests,
                prefill_tokens_per_s: load.prefill_tokens_per_s,
                kv_used: kv_used(&load),
            });
            names.push(member.record.node_id.clone());
        }
        (seen, names)
    }

    /// Share of the decode nodes' requests that other coordinators placed there, lately.
    pub(super) fn foreign(&self) -> f64 {
        if self.all < REQUESTS_MIN {
            0.0
        } else {
            self.foreign / self.all
        }
    }
}

/// None: it is no node of this model, or not there.
pub(super) fn state(member: &MemberStatus, model: &str) -> Option<State> {
    // One that still loads has registered its name only.
    if member.record.state == NodeState::Starting {
        let mine = member.record.model.is_empty() || member.record.model == model;
        return mine.then_some(State::Coming);
    }
    if member.record.model != model {
        return None;
    }
    match (member.state, member.record.state) {
        ("ready", NodeState::Ready) => Some(State::Ready),
        ("starting", _) => Some(State::Coming),
        ("ready" | "draining", _) => Some(State::Draining),
        // Lost, or refused: it serves nobody.
        _ => None,
    }
}

pub(super) fn side(role: NodeRole) -> Side {
    match role {
        NodeRole::Prefill => Side::Prefill,
        NodeRole::Decode => Side::Decode,
    }
}

fn kv_used(load: &v1::NodeLoad) -> f64 {
    let blocks = load.blocks.map(BlockCounts::from).unwrap_or_default();
    let used = blocks.referenced + blocks.reserved + blocks.quarantined;
    f64::from(used) / f64::from(load.blocks.map_or(1, |blocks| blocks.total.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_cluster_state::NodeRecord;
    use baton_types::{KvDtype, KvGeometry, ModelFingerprint, NumericsId};

    fn member(name: &str, role: NodeRole, state: &'static str) -> MemberStatus {
        let load = v1::NodeLoad {
            running_requests: 10,
            blocks: Some(v1::BlockCounts {
                total: 100,
                free: 50,
                cached: 20,
                referenced: 25,
                reserved: 5,
                quarantined: 0,
            }),
            ..v1::NodeLoad::default()
        };
        MemberStatus {
            record: NodeRecord {
                node_id: NodeId::new(name),
                instance: Instance(name.len() as u64),
                role,
                state: NodeState::Ready,
                grpc_address: String::new(),
                transfer: Vec::new(),
                model: "m".to_owned(),
                card_digest: String::new(),
                fingerprint: ModelFingerprint([0; 32]),
                numerics: NumericsId(String::new()),
                geometry: KvGeometry {
                    layers: 1,
                    kv_heads: 1,
                    head_dim: 1,
                    block_tokens: 16,
                    dtype: KvDtype::F16,
                },
                host_id: String::new(),
                build: String::new(),
                stub: true,
                blocks: 100,
                queue_capacity: 0,
                context_tokens: 0,
            },
            state,
            load: Some(load),
            foreign_requests: 0,
            heartbeat_age: None,
            faults: Vec::new(),
        }
    }

    #[test]
    fn who_is_ready_since_when_and_who_is_not_there() {
        let mut nodes = Nodes::default();
        let (first, second) = (Nanos(5), Nanos(9));
        let mut members = vec![
            member("p", NodeRole::Prefill, "ready"),
            member("de", NodeRole::Decode, "ready"),
            member("lost", NodeRole::Decode, "lost"),
            member("wrong", NodeRole::Decode, "refused"),
        ];
        let (seen, names) = nodes.look(&members, "m", first);
        assert_eq!(names, [NodeId::new("p"), NodeId::new("de")]);
        assert!(
            seen.iter()
                .all(|node| node.ready_since == Nanos::ZERO && node.state == State::Ready)
        );
        assert!((seen[1].kv_used - 0.3).abs() < 1e-9);
        assert!(nodes.look(&members, "other", first).0.is_empty());

        members[1].state = "draining";
        let mut loads = member("loading", NodeRole::Decode, "starting");
        loads.record.state = NodeState::Starting;
        loads.record.model.clear();
        members.push(loads);
        let (seen, _) = nodes.look(&members, "m", first);
        let states: Vec<State> = seen.iter().map(|node| node.state).collect();
        assert_eq!(states, [State::Ready, State::Draining, State::Coming]);
        // It took up the other role meanwhile.
        members[1] = member("de", NodeRole::Prefill, "ready");
        let (seen, _) = nodes.look(&members, "m", second);
        assert_eq!((seen[1].side, seen[1].ready_since), (Side::Prefill, second));
        assert_eq!(nodes.look(&members, "m", Nanos(12)).0[1].ready_since, second);
    }

    #[test]
    fn requests_of_other_coordinators_are_told_apart() {
        let mut nodes = Nodes::default();
        let mut members = vec![
            member("p", NodeRole::Prefill, "ready"),
            member("de", NodeRole::Decode, "ready"),
        ];
        members[0].foreign_requests = 10;
        nodes.look(&members, "m", Nanos(1));
        assert!(nodes.foreign() < 0.01, "prompts are counted where they are decoded");
        members[1].foreign_requests = 5;
        (0..30).for_each(|at| drop(nodes.look(&members, "m", Nanos(at))));
        assert!((nodes.foreign() - 0.5).abs() < 0.01, "{}", nodes.foreign());
        members[1].load = None;
        (0..30).for_each(|at| drop(nodes.look(&members, "m", Nanos(at))));
        assert!(nodes.foreign() < 0.01, "nobody is there");
    }
}
