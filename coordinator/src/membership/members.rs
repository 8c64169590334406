//! The members and the models, as one state under one short lock, for everyone who asks or tells. Nothing here waits.

use super::changes::Changes;
use super::load::Beat;
use super::roster::{Heart, Roster};
use super::{Candidate, CardWanted, Connect, Listener, MemberStatus, Model, NewMember};
use crate::core::Node;
use crate::{ApiCode, ApiError, ModelInfo};
use baton_cluster_state::NodeRecord;
use baton_node_runtime::{Clock, Moment};
use baton_proto::v1::node_client::NodeClient;
use baton_proto::{convert, v1};
use baton_scheduling::{BlockIndex, HandoverTimes, Held, NodeView, Routed};
use baton_types::{BlockHash, Instance, NodeId, NodeRole, NodeState, NumericsId};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;
use tonic::transport::Channel;

/// The members. Clones share them.
#[derive(Clone)]
pub(crate) struct Members {
    roster: Arc<Mutex<Roster>>,
    /// Which node holds which blocks. Not under the roster's lock: many blocks come at once.
    index: Arc<RwLock<BlockIndex>>,
    changed: Changes,
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
    /// `index` is filled by whoever learns where blocks are.
    pub(crate) fn new(clock: Clock, grace: Duration, inhibit: Duration, index: BlockIndex, connect: Connect) -> Self {
        let options = Options { grace, inhibit };
        Self {
            roster: Arc::new(Mutex::new(Roster::new(connect))),
            index: Arc::new(RwLock::new(index)),
            changed: Changes::default(),
            clock,
            options,
        }
    }

    /// Rises with every change of who is there and how loaded they are.
    pub(crate) fn changes(&self) -> Listener {
        self.changed.listen()
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
            state.has_changed();
            result
        };
        self.changed.tell();
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
                state.remove(node_id);
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

    /// A node spoke. Most often nothing but its load has changed.
    pub(super) fn beat(&self, node: &Node, heartbeat: v1::HeartbeatResponse) {
        if !self.beat_again(node, &heartbeat) {
            self.beat_anew(node, heartbeat);
        }
    }

    /// False: more than the load of a node has changed, and nothing is done yet.
    fn beat_again(&self, node: &Node, heartbeat: &v1::HeartbeatResponse) -> bool {
        let now = self.clock.now();
        {
            let mut state = self.lock();
            let Some(member) = state.member_mut(node).filter(|member| member.unlisted_since.is_none()) else {
                return false;
            };
            let said = convert::node_state(&heartbeat.state).unwrap_or(NodeState::Starting);
            let Heart::Beating { beat, state: known, at } = &mut member.heart else {
                return false;
            };
            if *known != said {
                return false;
            }
            let load = heartbeat.load.clone().unwrap_or_default();
            member
                .speed
                .reported(load.prefill_tokens_per_s, load.decode_step_us, load.running_requests);
            **beat = Beat::new(load, member.placed.figures());
            *at = now;
            member.full = false;
            state.spoke(node.instance);
        }
        self.changed.tell();
        true
    }

    fn beat_anew(&self, node: &Node, heartbeat: v1::HeartbeatResponse) {
        let grace = self.options.grace;
        self.change(|state, now| {
            let Some(member) = state.member_mut(node) else { return };
            if member
                .unlisted_since
                .is_some_and(|since| now.saturating_since(since) > grace)
            {
                state.remove(&node.id);
                return;
            }
            if let Some(load) = &heartbeat.load {
                member
                    .speed
                    .reported(load.prefill_tokens_per_s, load.decode_step_us, load.running_requests);
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
                state.remove(&node.id);
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
        self.lock().is_full(node.instance);
        self.changed.tell();
    }

    /// Changes which node holds which blocks.
    pub(crate) fn index(&self, change: impl FnOnce(&mut BlockIndex)) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut index);
    }

    /// Shows what the index takes. Costs time in proportion to it.
    pub(super) fn show_index(&self) {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        metrics::gauge!("baton_coordinator_indexed_blocks").set(index.locations() as f64);
        metrics::gauge!("baton_coordinator_index_bytes").set(index.bytes() as f64);
        metrics::counter!("baton_coordinator_unindexed_blocks_total").absolute(index.refused());
    }

    fn held(&self, chains: &[Vec<BlockHash>]) -> Held {
        let Some((first, others)) = chains.split_first() else {
            return Held::default();
        };
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        let mut held = index.held(first);
        others.iter().for_each(|chain| held.join(index.held(chain)));
        held
    }

    /// Chooses among the nodes that take work for a model: `choose` gets the hand-over times, the prefill and the decode
    /// nodes. `chains` are the context's blocks, once for each arithmetic.
    pub(crate) fn route(
        &self,
        model: &str,
        chains: &[Vec<BlockHash>],
        choose: impl FnOnce(&HandoverTimes, &[NodeView], &[NodeView]) -> Routed,
    ) -> Routed {
        let (now, held) = (self.clock.now(), self.held(chains));
        let mut state = self.lock();
        match state.working(model, now) {
            (Some(working), handovers) => working
                .fleet
                .choose(&held, |prefill, decode| choose(handovers, prefill, decode)),
            (None, handovers) => choose(handovers, &[], &[]),
        }
    }

    /// A node that takes work, to place a request on it.
    pub(crate) fn candidate(&self, instance: Instance) -> Option<Candidate> {
        let mut state = self.lock();
        state.member_of(instance).map(|member| member.candidate(&self.changed))
    }

    /// The names of these processes, as far as they are members.
    pub(crate) fn names(&self, instances: impl Iterator<Item = Instance>) -> Vec<(Instance, NodeId)> {
        let mut instances: Vec<Instance> = instances.collect();
        instances.sort_unstable();
        instances.dedup();
        let state = self.lock();
        let named = |instance: Instance| Some((instance, state.name_of(instance)?.clone()));
        instances.into_iter().filter_map(named).collect()
    }

    /// The kinds of arithmetic among a model's nodes; none while no node's blocks are known.
    pub(crate) fn numerics_with_known_blocks(&self, model: &str) -> Vec<NumericsId> {
        let locations = {
            let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
            index.locations()
        };
        if locations == 0 {
            return Vec::new();
        }
        let mut state = self.lock();
        let working = state.working(model, self.clock.now()).0;
        working.map(|working| working.numerics.clone()).unwrap_or_default()
    }

    /// A node has computed a prompt: `tokens` of it, behind `held` that it had.
    pub(crate) fn prefilled(&self, instance: Instance, tokens: u32, held: u32, took: Duration) {
        let mut state = self.lock();
        if let Some(member) = state.member_of(instance) {
            member.speed.prefilled(tokens, held, took);
            state.learned(instance);
        }
    }

    /// A hand-over was committed, and compute did not hide `exposed` of it.
    pub(crate) fn handed_over(&self, from: Instance, to: Instance, bytes: u64, exposed: Duration) {
        let mut state = self.lock();
        let Some(geometry) = state.member_of(from).map(|member| member.record.geometry) else {
            return;
        };
        let tokens = bytes / (geometry.token_bytes() as u64).max(1);
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        state.handovers.handed_over(from, to, tokens, exposed);
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
        let room = self.lock().context_tokens(&model.card.name, self.clock.now());
        room.unwrap_or(u32::MAX).min(model.card.context_tokens)
    }

    /// Models for which a request would be taken now, by name.
    pub(crate) fn served(&self) -> Vec<ModelInfo> {
        let mut state = self.lock();
        let known = state
            .models
            .iter()
            .filter_map(|(name, entry)| Some((name.clone(), entry.model.clone()?)));
        let known: Vec<(String, Arc<Model>)> = known.collect();
        let now = self.clock.now();
        let info = |(name, model): (String, Arc<Model>)| {
            let context_tokens = state.context_tokens(&name, now)?;
            Some(ModelInfo {
                id: name,
                context_tokens: context_tokens.min(model.card.context_tokens),
                stub: model.card.stub,
                created: model.created,
            })
        };
        let mut served: Vec<ModelInfo> = known.into_iter().filter_map(info).collect();
        served.sort_by(|a, b| a.id.cmp(&b.id));
        served
    }

    /// All members, for operators.
    pub(crate) fn status(&self) -> Vec<MemberStatus> {
        let now = self.clock.now();
        self.lock().members.values().map(|member| member.status(now)).collect()
    }

    /// Whom to ask to do something to a node: itself.
    ///
    /// # Errors
    /// There is no such node.
    pub(crate) fn client(&self, node_id: &str) -> Result<NodeClient<Channel>, ApiError> {
        let state = self.lock();
        let members = &state.members;
        if let Some(member) = members
            .values()
            .find(|member| member.record.node_id.as_str() == node_id)
        {
            return Ok(NodeClient::new(member.channel.clone()));
        }
        let names: Vec<&str> = members.keys().map(NodeId::as_str).collect();
        let message = format!("node_id: no node `{node_id}`; there are: {}", names.join(", "));
        Err(ApiError {
            field: Some("node_id".into()),
            ..ApiError::new(ApiCode::NotFound, message)
        })
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
    pub(crate) fn set_model(&self, name: &str, model: Model) {
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
