//! Who is there, how each is, and what each model is.
//!
//! Of several nodes that name the same model, those that fit together serve: the first that came sets fingerprint and KV
//! geometry, and keeps them for the model as long as a node of that kind answers. Others are refused by name of the field.

use super::changes::Changes;
use super::load::{Beat, Claim};
use super::{Connect, Model};
use crate::core::Node;
use baton_cluster_state::NodeRecord;
use baton_node_runtime::{CancellationToken, Moment};
use baton_proto::v1;
use baton_scheduling::{Fleet, FleetNode, HandoverTimes, NodeView, Place, Placed, Side, StepModel};
use baton_types::{Instance, KvGeometry, ModelFingerprint, NodeId, NodeRole, NodeState, NumericsId};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::Channel;

/// Pairs of nodes whose hand-overs are told apart. At most 300 bytes each.
const PAIRS_MAX: usize = 65_536;

/// All members and models.
pub(super) struct Roster {
    pub(super) members: BTreeMap<NodeId, Member>,
    pub(super) models: HashMap<String, ModelEntry>,
    pub(super) handovers: HandoverTimes,
    /// Who has this instance.
    names: HashMap<Instance, NodeId>,
    /// Who takes work, by model; as of the last change that is not `stale`.
    working: HashMap<String, Working>,
    stale: bool,
    /// When the next one that is left alone takes work again.
    release: Option<Moment>,
    arrivals: u64,
    connect: Connect,
}

/// The nodes of one model that take work.
#[derive(Default)]
pub(super) struct Working {
    pub(super) fleet: Fleet,
    /// The kinds of arithmetic among all the model's nodes.
    pub(super) numerics: Vec<NumericsId>,
    /// The longest context that a decode node has room for, those that are left alone just now included; `None` where
    /// there is no decode node.
    pub(super) context_tokens: Option<u32>,
}

/// One node, as the store and itself tell of it.
pub(super) struct Member {
    pub(super) record: NodeRecord,
    pub(super) channel: Channel,
    pub(super) heart: Heart,
    pub(super) placed: Arc<Placed>,
    /// How fast it was so far.
    pub(super) speed: StepModel,
    /// Order of coming: the eldest sets what a model is.
    arrival: u64,
    pub(super) inhibited_until: Option<Moment>,
    /// It refused for want of place and has not spoken since.
    pub(super) full: bool,
    /// Why it serves nobody: it does not fit the others of its model.
    pub(super) refused: Option<String>,
    /// What this coordinator last saw go wrong with it.
    pub(super) fault: Option<(Moment, String)>,
    pub(super) unlisted_since: Option<Moment>,
    /// Where it stands among those that take work.
    pub(super) place: Option<Place>,
    /// Ends its heartbeat when the member is dropped.
    cancel: CancellationToken,
}

/// What a node's heartbeat says of it.
pub(super) enum Heart {
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

/// What a model is, and its card once that is read.
pub(super) struct ModelEntry {
    pub(super) fingerprint: ModelFingerprint,
    geometry: KvGeometry,
    pub(super) model: Option<Arc<Model>>,
}

/// A node that takes work, with what a request needs of it.
#[derive(Clone)]
pub(crate) struct Candidate {
    pub(crate) node: Node,
    pub(crate) channel: Channel,
    pub(crate) numerics: NumericsId,
    placed: Arc<Placed>,
    changed: Changes,
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
    /// Requests there that this coordinator did not place, as of its last heartbeat.
    pub(crate) foreign_requests: u32,
    pub(crate) heartbeat_age: Option<Duration>,
    /// Newest first: age and text of what this coordinator saw.
    pub(crate) faults: Vec<(Duration, String)>,
}

/// A member whose heartbeat is to be listened to.
pub(super) struct NewMember {
    pub(super) node: Node,
    pub(super) channel: Channel,
    pub(super) cancel: CancellationToken,
}

impl Roster {
    pub(super) fn new(connect: Connect) -> Self {
        Self {
            members: BTreeMap::new(),
            models: HashMap::new(),
            handovers: HandoverTimes::new(PAIRS_MAX),
            names: HashMap::new(),
            working: HashMap::new(),
            stale: false,
            release: None,
            arrivals: 0,
            connect,
        }
    }

    pub(super) fn remove(&mut self, node_id: &NodeId) {
        if let Some(member) = self.members.remove(node_id) {
            self.forget(member.record.instance);
        }
    }

    fn forget(&mut self, instance: Instance) {
        self.handovers.forget(instance);
        self.names.remove(&instance);
    }

    pub(super) fn name_of(&self, instance: Instance) -> Option<&NodeId> {
        self.names.get(&instance)
    }

    pub(super) fn member_of(&mut self, instance: Instance) -> Option<&mut Member> {
        self.members.get_mut(self.names.get(&instance)?)
    }

    /// Who takes work for a model, and how long hand-overs take.
    pub(super) fn working(&mut self, model: &str, now: Moment) -> (Option<&mut Working>, &HandoverTimes) {
        if self.stale || self.release.is_some_and(|release| release <= now) {
            self.gather(now);
        }
        (self.working.get_mut(model), &self.handovers)
    }

    /// Who takes work is to be found out anew.
    pub(super) fn has_changed(&mut self) {
        self.stale = true;
    }

    fn gather(&mut self, now: Moment) {
        self.working.clear();
        (self.stale, self.release) = (false, None);
        for member in self.members.values_mut() {
            member.place = None;
            if !member.names_a_model() {
                continue;
            }
            if !self.working.contains_key(&member.record.model) {
                self.working.insert(member.record.model.clone(), Working::default());
            }
            let Some(working) = self.working.get_mut(&member.record.model) else {
                continue;
            };
            if !working.numerics.contains(&member.record.numerics) {
                working.numerics.push(member.record.numerics.clone());
            }
            if member.serves() && member.record.role == NodeRole::Decode {
                working.context_tokens = working.context_tokens.max(Some(member.record.context_tokens));
            }
            if member.is_usable(now) {
                let node = member.fleet_node();
                member.place = node.map(|node| working.fleet.add(side(member.record.role), node));
            } else if let Some(until) = member.inhibited_until.filter(|until| member.serves() && *until > now) {
                self.release = Some(self.release.map_or(until, |release| release.min(until)));
            }
        }
    }

    /// The longest context that a decode node which takes work has room for; `None` where there is no such node.
    pub(super) fn context_tokens(&mut self, model: &str, now: Moment) -> Option<u32> {
        self.working(model, now).0?.context_tokens
    }

    /// Changes what is known of a node that takes work where it stands, if it does.
    fn in_place(&mut self, instance: Instance, change: impl FnOnce(&mut Fleet, Place, &mut Member)) {
        let Some(member) = self.names.get(&instance).and_then(|name| self.members.get_mut(name)) else {
            return;
        };
        if !self.stale
            && let Some(place) = member.place
            && let Some(working) = self.working.get_mut(&member.record.model)
        {
            change(&mut working.fleet, place, member);
        }
    }

    /// The node's load or speed is known anew, and nothing else changed.
    pub(super) fn spoke(&mut self, instance: Instance) {
        self.in_place(instance, |fleet, place, member| {
            if let Heart::Beating { beat, .. } = &member.heart {
                fleet.spoke(place, beat.known, member.queue_capacity(beat));
                fleet.set_times(place, member.speed.times());
            }
        });
    }

    /// The node's speed is known better.
    pub(super) fn learned(&mut self, instance: Instance) {
        self.in_place(instance, |fleet, place, member| {
            fleet.set_times(place, member.speed.times());
        });
    }

    /// The node refused for want of place.
    pub(super) fn is_full(&mut self, instance: Instance) {
        if let Some(member) = self.member_of(instance) {
            member.full = true;
        }
        self.in_place(instance, |fleet, place, _| fleet.is_full(place));
    }

    pub(super) fn member_mut(&mut self, node: &Node) -> Option<&mut Member> {
        self.members
            .get_mut(&node.id)
            .filter(|member| member.record.instance == node.instance)
    }

    pub(super) fn put(&mut self, record: NodeRecord) -> Option<NewMember> {
        if let Some(member) = self.members.get_mut(&record.node_id)
            && member.record.instance == record.instance
            && member.record.grpc_address == record.grpc_address
        {
            member.unlisted_since = None;
            member.record = record;
            return None;
        }
        let channel = match (self.connect)(&record.grpc_address) {
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
            speed: StepModel::default(),
            arrival: self.arrivals,
            inhibited_until: None,
            full: false,
            refused: None,
            fault: None,
            unlisted_since: None,
            place: None,
            cancel,
            record,
        };
        let name = member.record.node_id.clone();
        if let Some(before) = self.members.insert(name.clone(), member) {
            self.forget(before.record.instance);
        }
        self.names.insert(new.node.instance, name);
        Some(new)
    }

    /// Decides anew what each model is and who fits it.
    pub(super) fn regroup(&mut self) {
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
    pub(super) fn names_a_model(&self) -> bool {
        self.record.state != NodeState::Starting && !self.record.model.is_empty()
    }

    /// It takes work, if maybe not just now.
    pub(super) fn serves(&self) -> bool {
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
    pub(super) fn is_usable(&self, now: Moment) -> bool {
        self.serves() && self.inhibited_until.is_none_or(|until| until <= now)
    }

    fn queue_capacity(&self, beat: &Beat) -> u32 {
        if beat.load.queue_capacity > 0 {
            beat.load.queue_capacity
        } else {
            self.record.queue_capacity
        }
    }

    fn fleet_node(&self) -> Option<FleetNode> {
        let Heart::Beating { beat, .. } = &self.heart else {
            return None;
        };
        let view = NodeView {
            instance: self.record.instance,
            queued_requests: 0,
            queue_capacity: self.queue_capacity(beat),
            queued_tokens: 0,
            running_requests: 0,
            times: self.speed.times(),
            blocks: beat.known.blocks(),
            block_tokens: self.record.geometry.block_tokens,
            held_tokens: 0,
        };
        Some(FleetNode {
            view,
            load: beat.known,
            placed: Arc::clone(&self.placed),
            full: self.full,
        })
    }

    pub(super) fn candidate(&self, changed: &Changes) -> Candidate {
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

    pub(super) fn status(&self, now: Moment) -> MemberStatus {
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
            foreign_requests: beat.map_or(0, |beat| beat.foreign_requests()),
            heartbeat_age: at.map(|at| now.saturating_since(at)),
            faults: refused.into_iter().chain(fault).collect(),
        }
    }
}

fn side(role: NodeRole) -> Side {
    match role {
        NodeRole::Prefill => Side::Prefill,
        NodeRole::Decode => Side::Decode,
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
