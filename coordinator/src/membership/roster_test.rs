//! Who serves, as records, heartbeats and failures come and go.

use super::model::Model;
use super::{Members, network};
use crate::core::Node;
use baton_cluster_state::NodeRecord;
use baton_node_runtime::Clock;
use baton_proto::v1;
use baton_scheduling::{BlockIndex, Decision, NodeView, RefuseReason, Routed};
use baton_text::{EngineFacts, ModelCard};
use baton_types::{
    BlockHash, Instance, KvDtype, KvGeometry, ModelFingerprint, NodeId, NodeRole, NodeState, NumericsId,
};
use std::time::Duration;

const GRACE: Duration = Duration::from_secs(10);
const INHIBIT: Duration = Duration::from_secs(2);

fn card(fingerprint: u8) -> ModelCard {
    let engine = EngineFacts {
        fingerprint: ModelFingerprint([fingerprint; 32]),
        numerics: NumericsId("test".into()),
        block_tokens: 16,
        kv_dtype: KvDtype::F16,
    };
    ModelCard::stub("m", 512, engine)
}

fn record(name: &str, instance: u64, fingerprint: u8) -> NodeRecord {
    let card = card(fingerprint);
    NodeRecord {
        node_id: NodeId::new(name),
        instance: Instance(instance),
        role: if name.starts_with('p') {
            NodeRole::Prefill
        } else {
            NodeRole::Decode
        },
        state: NodeState::Ready,
        grpc_address: "127.0.0.1:9".into(),
        transfer: Vec::new(),
        model: "m".into(),
        card_digest: card.digest(),
        fingerprint: card.fingerprint,
        numerics: card.numerics,
        geometry: KvGeometry {
            layers: 1,
            kv_heads: 1,
            head_dim: 8,
            block_tokens: 16,
            dtype: KvDtype::F16,
        },
        host_id: "h".into(),
        build: "b".into(),
        stub: true,
        blocks: 100,
        queue_capacity: 4,
        context_tokens: 300,
    }
}

fn node(name: &str, instance: u64) -> Node {
    Node {
        id: NodeId::new(name),
        instance: Instance(instance),
    }
}

fn beat(members: &Members, name: &str, instance: u64, state: &str) {
    let blocks = Some(v1::BlockCounts {
        total: 100,
        free: 100,
        ..Default::default()
    });
    let heartbeat = v1::HeartbeatResponse {
        state: state.into(),
        load: Some(v1::NodeLoad {
            blocks,
            ..Default::default()
        }),
        ..Default::default()
    };
    members.beat(&node(name, instance), heartbeat);
}

fn members() -> Members {
    Members::new(Clock::new(), GRACE, INHIBIT, BlockIndex::new(100), network())
}

/// Of a node that has joined and beats.
fn join(members: &Members, name: &str, instance: u64, fingerprint: u8) {
    assert!(members.put(record(name, instance, fingerprint)).is_some());
    beat(members, name, instance, "ready");
}

fn state_of(members: &Members, name: &str) -> Option<&'static str> {
    let status = members.status().into_iter().find(|m| m.record.node_id.as_str() == name);
    status.map(|member| member.state)
}

fn usable(members: &Members) -> Vec<String> {
    let views = views(members, &[]);
    let candidates = views.iter().filter_map(|view| members.candidate(view.instance));
    candidates.map(|candidate| candidate.node.id.to_string()).collect()
}

/// What routing is told of each node, prefill nodes first.
fn views(members: &Members, chains: &[Vec<BlockHash>]) -> Vec<NodeView> {
    let mut all = Vec::new();
    members.route("m", chains, |_, prefill, decode| {
        all = [prefill, decode].concat();
        Routed {
            decision: Decision::Refuse {
                reason: RefuseReason::NoDecodeNode,
                retry_after: Duration::ZERO,
            },
            candidates: Vec::new(),
        }
    });
    all
}

#[tokio::test(start_paused = true)]
async fn a_node_serves_while_it_beats_and_is_ready() {
    let members = members();
    assert!(
        members
            .put(NodeRecord {
                state: NodeState::Starting,
                model: String::new(),
                ..record("d", 1, 1)
            })
            .is_some()
    );
    // It does not answer while it loads, which is no fault.
    members.lost(&node("d", 1), "refused");
    assert_eq!((state_of(&members, "d"), usable(&members).len()), (Some("starting"), 0));
    assert!(
        members.put(record("d", 1, 1)).is_none(),
        "the same process is no new member"
    );
    assert!(members.served().is_empty());
    beat(&members, "d", 1, "ready");
    assert_eq!(usable(&members), ["d"]);
    assert!(members.served().is_empty(), "without its card no model is served");
    members.set_model("m", Model::new(card(1), 7).unwrap());
    // The node's arena has room for less than the model's context.
    assert_eq!(members.served()[0].context_tokens, 300);
    beat(&members, "d", 1, "draining");
    assert_eq!((state_of(&members, "d"), usable(&members).len()), (Some("draining"), 0));
    assert!(members.served().is_empty());
    members.lost(&node("d", 1), "gone");
    assert_eq!(state_of(&members, "d"), Some("lost"));
    members.gone(&NodeId::new("d"), Instance(1));
    assert_eq!(state_of(&members, "d"), None);
}

#[tokio::test(start_paused = true)]
async fn a_member_that_the_store_lost_is_used_for_a_lease() {
    let members = members();
    join(&members, "d", 1, 1);
    assert!(members.snapshot(Vec::new()).is_empty());
    beat(&members, "d", 1, "ready");
    assert_eq!(usable(&members), ["d"]);
    // It registers again: all is well.
    assert!(members.put(record("d", 1, 1)).is_none());
    tokio::time::advance(GRACE * 2).await;
    beat(&members, "d", 1, "ready");
    assert_eq!(usable(&members), ["d"]);
    // It does not: its time ends.
    members.gone(&NodeId::new("d"), Instance(1));
    tokio::time::advance(GRACE / 2).await;
    beat(&members, "d", 1, "ready");
    assert_eq!(usable(&members), ["d"]);
    tokio::time::advance(GRACE).await;
    beat(&members, "d", 1, "ready");
    assert_eq!(state_of(&members, "d"), None);
    // One that fell silent meanwhile is gone at once.
    join(&members, "d", 2, 1);
    members.gone(&NodeId::new("d"), Instance(2));
    members.lost(&node("d", 2), "reset");
    assert_eq!(state_of(&members, "d"), None);
}

#[tokio::test(start_paused = true)]
async fn another_life_replaces_the_one_before() {
    let members = members();
    let old = members.put(record("d", 1, 1)).unwrap();
    join(&members, "d", 2, 1);
    assert!(old.cancel.is_cancelled(), "nobody listens to the dead");
    members.lost(&node("d", 1), "late word of the dead");
    members.gone(&NodeId::new("d"), Instance(1));
    assert_eq!(usable(&members), ["d"]);
}

#[tokio::test(start_paused = true)]
async fn nodes_that_differ_are_refused_until_the_others_are_gone() {
    let members = members();
    join(&members, "d1", 1, 1);
    join(&members, "d2", 2, 2);
    assert_eq!(usable(&members), ["d1"]);
    assert_eq!(state_of(&members, "d2"), Some("refused"));
    let refused = members.status().into_iter().find(|m| m.state == "refused").unwrap();
    assert!(refused.faults[0].1.contains("fingerprint"), "{:?}", refused.faults);
    members.set_model("m", Model::new(card(1), 7).unwrap());
    assert_eq!(members.served().len(), 1);
    // The first kind dies out: the other becomes the model, and its card is wanted anew.
    members.lost(&node("d1", 1), "reset");
    assert_eq!(usable(&members), ["d2"]);
    assert!(members.served().is_empty() && members.card_wanted(&node("d2", 2)).is_some());
    // A card of the old kind comes too late.
    members.set_model("m", Model::new(card(1), 7).unwrap());
    assert!(members.served().is_empty());
    members.set_model("m", Model::new(card(2), 7).unwrap());
    assert_eq!(members.served().len(), 1);
    beat(&members, "d1", 1, "ready");
    assert_eq!(
        (usable(&members), state_of(&members, "d1")),
        (vec!["d2".to_owned()], Some("refused"))
    );
}

#[tokio::test(start_paused = true)]
async fn a_node_that_failed_is_left_alone_for_a_moment() {
    let members = members();
    join(&members, "d", 1, 1);
    members.set_model("m", Model::new(card(1), 7).unwrap());
    members.inhibit(&node("d", 1), "oh");
    assert!(usable(&members).is_empty() && members.next_release("m").is_some());
    assert_eq!(members.served().len(), 1, "it is still served, if not this moment");
    tokio::time::advance(INHIBIT).await;
    assert_eq!(usable(&members), ["d"]);
    assert!(members.next_release("m").is_none());
    // One without a place is full until it speaks again.
    members.full(&node("d", 1));
    let full = |members: &Members| {
        let view = views(members, &[]).remove(0);
        view.queued_requests >= view.queue_capacity
    };
    assert!(full(&members));
    beat(&members, "d", 1, "ready");
    assert!(!full(&members));
}

#[tokio::test(start_paused = true)]
async fn routing_is_told_what_nodes_hold_and_how_fast_they_were() {
    let members = members();
    join(&members, "d", 1, 1);
    join(&members, "p", 2, 1);
    assert!(members.numerics_with_known_blocks("m").is_empty());
    let chain: Vec<BlockHash> = (0..4).map(|byte| BlockHash([byte; 16])).collect();
    members.index(|index| index.add(Instance(2), &chain[..3]));
    assert_eq!(members.numerics_with_known_blocks("m"), [NumericsId("test".into())]);
    let told = |members: &Members| views(members, std::slice::from_ref(&chain));
    let held: Vec<u32> = told(&members).iter().map(|view| view.held_tokens).collect();
    assert_eq!(held, [48, 0]);
    assert!(!told(&members)[1].times.prefill_is_measured());
    members.prefilled(Instance(2), 100, 0, Duration::from_millis(1));
    let times: Vec<_> = told(&members).iter().map(|view| view.times).collect();
    assert!(times[0].prefill_is_measured());
    assert_eq!(
        times[1].or_prefill_of(&times[0]),
        times[1],
        "the other's figures stand in"
    );
    // What it held and how fast it was goes with the process.
    assert!(members.put(record("p", 3, 1)).is_some());
    beat(&members, "p", 3, "ready");
    assert_eq!(told(&members)[0].held_tokens, 0);
    // Its locations go when the store says so, and only then: the store's two watches are not in step.
    assert!(!members.numerics_with_known_blocks("m").is_empty());
    members.index(|index| index.drop_node(Instance(2)));
    assert!(members.numerics_with_known_blocks("m").is_empty());
}
