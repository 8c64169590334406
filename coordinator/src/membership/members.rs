//! The members and the models, as one state under one short lock, for everyone who asks or tells. Nothing here waits.

use super::load::Beat;
use super::roster::{Heart, Roster};
use super::{Candidate, CardWanted, MemberStatus, Model, NewMember};
use crate::ModelInfo;
use crate::core::Node;
use baton_cluster_state::NodeRecord;
use baton_node_runtime::{Clock, Moment};
use baton_proto::{convert, v1};
use baton_scheduling::NodeView;
use baton_types::{Instance, NodeId, NodeRole, NodeState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// The members. Clones share them.
#[derive(Clone)]
pub(crate) struct Members {
    roster: Arc<Mutex<Roster>>,
    changed: watch::Sender<u64>,
    clock: Clock,
    options: Options,
}

#[derive(Clone, Copy)]
struct Options {
    /// A member that left the store but still answers is used for so long: the store may have lost it, not the node.
    grace: Duration,
    /// A node that failed is left alone for so long.
    inhibit: Duration,
}

impl Members {
    pub(crate) fn new(clock: Clock, grace: Duration, inhibit: Duration) -> Self {
        let options = Options { grace, inhibit };
        Self {
            roster: Arc::default(),
            changed: watch::Sender::new(0),
            clock,
            options,
        }
    }

    /// Rises with every change of who is there and how loaded they are.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Roster> {
        self.roster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Roster, Moment) -> T) -> T {
        let now = self.clock.now();
        let result = {
            let mut state = self.lock();
            let result = change(&mut state, now);
            state.regroup();
            result
        };
        self.changed.send_modify(|version| *version += 1);
        result
    }

    /// A record came or changed. Gives what to listen to where the process is a new one.
    pub(super) fn put(&self, record: NodeRecord) -> Option<NewMember> {
        self.change(|state, _| state.put(record))
    }

    /// A record is gone from the store.
    pub(super) fn gone(&self, node_id: &NodeId, instance: Instance) {
        self.change(|state, now| {
            let Some(member) = state.members.get_mut(node_id).filter(|m| m.record.instance == instance) else {
                return;
            };
            if matches!(member.heart, Heart::Beating { .. }) {
                member.unlisted_since.get_or_insert(now);
            } else {
                state.members.remove(node_id);
            }
        });
    }

    /// These are all records. Gives the new processes among them.
    pub(super) fn snapshot(&self, records: Vec<NodeRecord>) -> Vec<NewMember> {
        let known: Vec<(NodeId, Instance)> = self
            .lock()
            .members
            .values()
            .map(|m| (m.record.node_id.clone(), m.record.instance))
            .collect();
        for (node_id, instance) in known {
            if !records
                .iter()
                .any(|record| record.node_id == node_id && record.instance == instance)
            {
                self.gone(&node_id, instance);
            }
        }
        records.into_iter().filter_map(|record| self.put(record)).collect()
    }

    /// A node spoke.
    pub(super) fn beat(&self, node: &Node, heartbeat: v1::HeartbeatResponse) {
        let grace = self.options.grace;
        self.change(|state, now| {
            let Some(member) = state.member_mut(node) else { return };
            if member
                .unlisted_since
                .is_some_and(|since| now.saturating_since(since) > grace)
            {
                state.members.remove(&node.id);
                return;
            }
            let beat = Box::new(Beat::new(heartbeat.load.unwrap_or_default(), member.placed.figures()));
            let node_state = convert::node_state(&heartbeat.state).unwrap_or(NodeState::Starting);
            member.full = false;
            if matches!(member.heart, Heart::Lost { .. }) {
                tracing::info!(node_id = %node.id, "node answers again");
            }
            member.heart = Heart::Beating {
                beat,
                state: node_state,
                at: now,
            };
        });
    }

    /// A node's heartbeat broke.
    pub(super) fn lost(&self, node: &Node, error: &str) {
        self.change(|state, now| {
            let Some(member) = state.member_mut(node) else { return };
            if member.unlisted_since.is_some() {
                state.members.remove(&node.id);
                return;
            }
            if member.record.state == NodeState::Starting {
                return;
            }
            let beat = match std::mem::replace(&mut member.heart, Heart::Connecting) {
                Heart::Beating { beat, .. } => {
                    tracing::warn!(node_id = %node.id, error, "node lost");
                    metrics::counter!("baton_coordinator_nodes_lost_total").increment(1);
                    member.fault = Some((now, format!("lost: {error}")));
                    Some(beat)
                }
                Heart::Lost { beat, .. } => beat,
                Heart::Connecting => {
                    member.fault = Some((now, format!("unreachable: {error}")));
                    None
                }
            };
            member.heart = Heart::Lost { beat, at: now };
        });
    }

    /// A request failed on a node: others leave it alone for a moment.
    pub(crate) fn inhibit(&self, node: &Node, message: &str) {
        let inhibit = self.options.inhibit;
        self.change(|state, now| {
            let Some(member) = state.member_mut(node) else { return };
            member.inhibited_until = Some(now + inhibit);
            member.fault = Some((now, message.to_owned()));
        });
    }

    /// A node had no place; it is left alone until its next heartbeat.
    pub(crate) fn full(&self, node: &Node) {
        self.change(|state, _| {
            if let Some(member) = state.member_mut(node) {
                member.full = true;
            }
        });
    }

    /// The nodes of one role that take work for a model, and routing's view of each.
    pub(crate) fn candidates(&self, model: &str, role: NodeRole) -> Vec<(NodeView, Candidate)> {
        let now = self.clock.now();
        let state = self.lock();
        let usable = state
            .members
            .values()
            .filter(|member| member.record.model == model && member.record.role == role && member.is_usable(now));
        usable
            .filter_map(|member| Some((member.view()?, member.candidate(&self.changed))))
            .collect()
    }

    /// When the next decode node of a model comes back from being left alone, if any will.
    pub(crate) fn next_release(&self, model: &str) -> Option<Moment> {
        let now = self.clock.now();
        let state = self.lock();
        let decode = state
            .members
            .values()
            .filter(|m| m.record.model == model && m.record.role == NodeRole::Decode && m.serves());
        decode
            .filter_map(|m| m.inhibited_until)
            .filter(|until| *until > now)
            .min()
    }

    /// The model, where its card is known.
    pub(crate) fn model(&self, name: &str) -> Option<Arc<Model>> {
        self.lock().models.get(name)?.model.clone()
    }

    /// The longest context that the model's nodes have room for now: its own, or less where their arenas are small.
    pub(crate) fn context_tokens(&self, model: &Model) -> u32 {
        let room = self.lock().context_tokens(&model.card.name);
        room.unwrap_or(u32::MAX).min(model.card.context_tokens)
    }

    /// Models for which a request would be taken now, by name.
    pub(crate) fn served(&self) -> Vec<ModelInfo> {
        let state = self.lock();
        let mut served: Vec<ModelInfo> = state
            .models
            .iter()
            .filter_map(|(name, entry)| {
                let model = entry.model.as_ref()?;
                let context_tokens = state.context_tokens(name)?.min(model.card.context_tokens);
                Some(ModelInfo {
                    id: name.clone(),
                    context_tokens,
                    stub: model.card.stub,
                    created: model.created,
                })
            })
            .collect();
        served.sort_by(|a, b| a.id.cmp(&b.id));
        served
    }

    /// All members, for operators.
    pub(crate) fn status(&self) -> Vec<MemberStatus> {
        let now = self.clock.now();
        self.lock().members.values().map(|member| member.status(now)).collect()
    }

    /// The card that this node could give, where its model still wants one.
    pub(super) fn card_wanted(&self, node: &Node) -> Option<CardWanted> {
        let mut state = self.lock();
        let member = state.member_mut(node)?;
        let wanted = CardWanted {
            model: member.record.model.clone(),
            digest: member.record.card_digest.clone(),
            fingerprint: member.record.fingerprint,
            channel: member.channel.clone(),
        };
        let fits = member.refused.is_none() && member.names_a_model();
        (fits && state.models.get(&wanted.model)?.model.is_none()).then_some(wanted)
    }

    /// The card of this node's model is known.
    pub(super) fn has_model_of(&self, node: &Node) -> bool {
        let mut state = self.lock();
        let name = state.member_mut(node).map(|member| member.record.model.clone());
        name.and_then(|name| state.models.get(&name))
            .is_some_and(|entry| entry.model.is_some())
    }

    /// A card came; it stands unless the model has become another one meanwhile.
    pub(super) fn set_model(&self, name: &str, model: Model) {
        self.change(|state, _| {
            if let Some(entry) = state.models.get_mut(name)
                && entry.fingerprint == model.card.fingerprint
            {
                entry.model.get_or_insert(Arc::new(model));
            }
        });
    }

    /// Something is wrong with a node that operators should see.
    pub(super) fn note_fault(&self, node: &Node, message: String) {
        self.change(|state, now| {
            if let Some(member) = state.member_mut(node) {
                member.fault = Some((now, message));
            }
        });
    }
}
