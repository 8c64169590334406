//! The members and the models, as one state under one short lock. Nothing here waits.
//!
//! Of several nodes that name the same model, those that fit together serve: the first that came sets fingerprint and KV
//! geometry, and keeps them for the model as long as a node of that kind answers. Others are refused by name of the field.

use super::load::{Beat, Claim, Placed};
use super::{Model, channel};
use crate::ModelInfo;
use crate::core::Node;
use baton_cluster_state::NodeRecord;
use baton_node_runtime::{CancellationToken, Clock, Moment};
use baton_proto::{convert, v1};
use baton_scheduling::NodeView;
use baton_types::{Instance, KvGeometry, ModelFingerprint, NodeId, NodeRole, NodeState, NumericsId};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tonic::transport::Channel;

/// The members. Clones share them.
#[derive(Clone)]
pub(crate) struct Members {
    state: Arc<Mutex<State>>,
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

#[derive(Default)]
struct State {
    members: BTreeMap<NodeId, Member>,
    models: HashMap<String, ModelEntry>,
    arrivals: u64,
}

struct Member {
    record: NodeRecord,
    channel: Channel,
    heart: Heart,
    placed: Arc<Placed>,
    /// Order of coming: the eldest sets what a model is.
    arrival: u64,
    inhibited_until: Option<Moment>,
    /// It refused for want of place and has not spoken since.
    full: bool,
    /// Why it serves nobody: it does not fit the others of its model.
    refused: Option<String>,
    /// What this coordinator last saw go wrong with it.
    fault: Option<(Moment, String)>,
    unlisted_since: Option<Moment>,
    /// Ends its heartbeat when the member is dropped.
    cancel: CancellationToken,
}

enum Heart {
    Connecting,
    Beating {
        beat: Box<Beat>,
        state: NodeState,
        at: Moment,
    },
    Lost {
        beat: Option<Box<Beat>>,
        at: Moment,
    },
}

struct ModelEntry {
    fingerprint: ModelFingerprint,
    geometry: KvGeometry,
    model: Option<Arc<Model>>,
}

/// A node that takes work, with what a request needs of it.
#[derive(Clone)]
pub(crate) struct Candidate {
    pub(crate) node: Node,
    pub(crate) channel: Channel,
    pub(crate) numerics: NumericsId,
    placed: Arc<Placed>,
    changed: watch::Sender<u64>,
}

impl Candidate {
    /// Counts a request of so many tokens as placed there.
    pub(crate) fn claim(&self, tokens: u64) -> Claim {
        Claim::new(Arc::clone(&self.placed), self.changed.clone(), tokens)
    }
}

/// A card that somebody should fetch.
pub(super) struct CardWanted {
    pub(super) model: String,
    pub(super) digest: String,
    pub(super) fingerprint: ModelFingerprint,
    pub(super) channel: Channel,
}

/// What operators see of a member.
pub(crate) struct MemberStatus {
    pub(crate) record: NodeRecord,
    pub(crate) state: &'static str,
    pub(crate) load: Option<v1::NodeLoad>,
    pub(crate) heartbeat_age: Option<Duration>,
    /// Newest first: age and text of what this coordinator saw.
    pub(crate) faults: Vec<(Duration, String)>,
    pub(crate) channel: Channel,
}

/// A member whose heartbeat is to be listened to.
pub(super) struct NewMember {
    pub(super) node: Node,
    pub(super) channel: Channel,
    pub(super) cancel: CancellationToken,
}

impl Members {
    pub(crate) fn new(clock: Clock, grace: Duration, inhibit: Duration) -> Self {
        let options = Options { grace, inhibit };
        Self {
            state: Arc::default(),
            changed: watch::Sender::new(0),
            clock,
            options,
        }
    }

    /// Rises with every change of who is there and how loaded they are.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State, Moment) -> T) -> T {
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

impl State {
    /// The longest context that a decode node which takes work has room for; `None` where there is no such node.
    fn context_tokens(&self, model: &str) -> Option<u32> {
        let members = self.members.values().filter(|member| member.record.model == model);
        let decode = members.filter(|member| member.record.role == NodeRole::Decode && member.serves());
        decode.map(|member| member.record.context_tokens).max()
    }

    fn member_mut(&mut self, node: &Node) -> Option<&mut Member> {
        self.members
            .get_mut(&node.id)
            .filter(|member| member.record.instance == node.instance)
    }

    fn put(&mut self, record: NodeRecord) -> Option<NewMember> {
        if let Some(member) = self.members.get_mut(&record.node_id)
            && member.record.instance == record.instance
            && member.record.grpc_address == record.grpc_address
        {
            member.unlisted_since = None;
            member.record = record;
            return None;
        }
        let channel = match channel::open(&record.grpc_address) {
            Ok(channel) => channel,
            Err(error) => {
                let address = &record.grpc_address;
                tracing::error!(node_id = %record.node_id, address, %error, "node record has no usable address");
                return None;
            }
        };
        let node = Node {
            id: record.node_id.clone(),
            instance: record.instance,
        };
        let (role, model) = (record.role, &record.model);
        tracing::info!(node_id = %node.id, %role, model, address = record.grpc_address, "node joined");
        let cancel = CancellationToken::new();
        let new = NewMember {
            node,
            channel: channel.clone(),
            cancel: cancel.clone(),
        };
        self.arrivals += 1;
        let member = Member {
            channel,
            heart: Heart::Connecting,
            placed: Arc::default(),
            arrival: self.arrivals,
            inhibited_until: None,
            full: false,
            refused: None,
            fault: None,
            unlisted_since: None,
            cancel,
            record,
        };
        self.members.insert(member.record.node_id.clone(), member);
        Some(new)
    }

    /// Decides anew what each model is and who fits it.
    fn regroup(&mut self) {
        let mut eldest: Vec<&Member> = self
            .members
            .values()
            .filter(|member| !member.is_lost() && member.names_a_model())
            .collect();
        eldest.sort_by_key(|member| member.arrival);
        for member in &eldest {
            let same_kind = |entry: &ModelEntry| {
                eldest
                    .iter()
                    .any(|other| other.record.model == member.record.model && entry.fits(&other.record).is_ok())
            };
            if !self.models.get(&member.record.model).is_some_and(same_kind) {
                let (fingerprint, geometry) = (member.record.fingerprint, member.record.geometry);
                self.models.insert(
                    member.record.model.clone(),
                    ModelEntry {
                        fingerprint,
                        geometry,
                        model: None,
                    },
                );
            }
        }
        for member in self.members.values_mut().filter(|member| member.names_a_model()) {
            let verdict = self
                .models
                .get(&member.record.model)
                .map_or(Ok(()), |entry| entry.fits(&member.record));
            let refused = verdict.err();
            if refused.is_some() && refused != member.refused {
                let reason = refused.as_deref().unwrap_or_default();
                tracing::warn!(node_id = %member.record.node_id, model = member.record.model, reason, "node refused");
            }
            member.refused = refused;
        }
    }
}

impl ModelEntry {
    /// Whether a node can be paired with the others of its model; else the field in which it differs.
    fn fits(&self, record: &NodeRecord) -> Result<(), String> {
        if self.fingerprint != record.fingerprint {
            let (ours, theirs) = (self.fingerprint, record.fingerprint);
            return Err(format!(
                "model fingerprint differs: {ours} is served, {theirs} is this node's"
            ));
        }
        self.geometry
            .check_same(&record.geometry)
            .map_err(|mismatch| mismatch.to_string())
    }
}

impl Member {
    fn is_lost(&self) -> bool {
        matches!(self.heart, Heart::Lost { .. })
    }

    /// A node that is still loading has registered its name only.
    fn names_a_model(&self) -> bool {
        self.record.state != NodeState::Starting && !self.record.model.is_empty()
    }

    /// It takes work, if maybe not just now.
    fn serves(&self) -> bool {
        matches!(
            self.heart,
            Heart::Beating {
                state: NodeState::Ready,
                ..
            }
        ) && self.record.state == NodeState::Ready
            && self.refused.is_none()
    }

    /// It takes work now.
    fn is_usable(&self, now: Moment) -> bool {
        self.serves() && self.inhibited_until.is_none_or(|until| until <= now)
    }

    fn view(&self) -> Option<NodeView> {
        let Heart::Beating { beat, .. } = &self.heart else {
            return None;
        };
        let estimate = beat.estimate(self.placed.figures());
        let capacity = if beat.load.queue_capacity > 0 {
            beat.load.queue_capacity
        } else {
            self.record.queue_capacity
        };
        Some(NodeView {
            instance: self.record.instance,
            queued_requests: if self.full { capacity } else { estimate.queued_requests },
            queue_capacity: capacity,
            queued_tokens: estimate.queued_tokens,
            running_requests: estimate.running_requests,
            prefill_tokens_per_s: beat.load.prefill_tokens_per_s,
            decode_step_us: beat.load.decode_step_us,
            blocks: estimate.blocks,
            block_tokens: self.record.geometry.block_tokens,
            held_tokens: 0,
        })
    }

    fn candidate(&self, changed: &watch::Sender<u64>) -> Candidate {
        Candidate {
            node: Node {
                id: self.record.node_id.clone(),
                instance: self.record.instance,
            },
            channel: self.channel.clone(),
            numerics: self.record.numerics.clone(),
            placed: Arc::clone(&self.placed),
            changed: changed.clone(),
        }
    }

    fn status(&self, now: Moment) -> MemberStatus {
        let (state, beat, at) = match &self.heart {
            Heart::Connecting => ("starting", None, None),
            Heart::Beating { beat, state, at } => (state_name(*state), Some(beat), Some(*at)),
            Heart::Lost { beat, at } => ("lost", beat.as_ref(), Some(*at)),
        };
        let fault = self
            .fault
            .as_ref()
            .map(|(at, text)| (now.saturating_since(*at), text.clone()));
        let refused = self
            .refused
            .as_ref()
            .map(|reason| (Duration::ZERO, format!("refused: {reason}")));
        MemberStatus {
            record: self.record.clone(),
            state: if self.refused.is_some() && !self.is_lost() {
                "refused"
            } else {
                state
            },
            load: beat.map(|beat| beat.load.clone()),
            heartbeat_age: at.map(|at| now.saturating_since(at)),
            faults: refused.into_iter().chain(fault).collect(),
            channel: self.channel.clone(),
        }
    }
}

fn state_name(state: NodeState) -> &'static str {
    match state {
        NodeState::Starting => "starting",
        NodeState::Ready => "ready",
        NodeState::Draining => "draining",
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}
