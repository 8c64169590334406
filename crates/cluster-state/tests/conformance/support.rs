//! Records to register, and waiting for what must come.

use baton_cluster_state::{MembershipEvent, NodeRecord, NodeWatch};
use baton_types::{Instance, KvDtype, KvGeometry, ModelFingerprint, NodeId, NodeRole, NodeState, NumericsId};
use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

/// Long enough for a machine that compiles meanwhile; what must come comes much sooner.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn record(name: &str) -> NodeRecord {
    NodeRecord {
        node_id: NodeId::new(name),
        instance: Instance::random(),
        role: NodeRole::Decode,
        state: NodeState::Starting,
        grpc_address: "127.0.0.1:1".to_owned(),
        transfer: vec!["tcp://127.0.0.1:2".to_owned()],
        model: "stub".to_owned(),
        card_digest: "d".to_owned(),
        fingerprint: ModelFingerprint([7; 32]),
        numerics: NumericsId("n".to_owned()),
        geometry: KvGeometry {
            layers: 2,
            kv_heads: 2,
            head_dim: 8,
            block_tokens: 16,
            dtype: KvDtype::F16,
        },
        host_id: "h".to_owned(),
        build: "b".to_owned(),
        stub: true,
        blocks: 0,
        queue_capacity: 4,
        context_tokens: 128,
    }
}

/// Waits for a future that must come.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited {PATIENCE:?} in vain for: {what}"),
    }
}

/// Waits until a condition holds.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    soon(what, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// Members as a watch tells them, and all that it ever said.
pub struct View {
    watch: NodeWatch,
    pub members: BTreeMap<String, NodeRecord>,
    pub events: Vec<MembershipEvent>,
}

impl View {
    pub fn new(watch: NodeWatch) -> Self {
        Self {
            watch,
            members: BTreeMap::new(),
            events: Vec::new(),
        }
    }

    pub async fn step(&mut self) -> MembershipEvent {
        let event = soon("the next event", self.watch.next()).await;
        self.fold(&event);
        event
    }

    fn fold(&mut self, event: &MembershipEvent) {
        self.events.push(event.clone());
        let name = |node_id: &NodeId| node_id.as_str().to_owned();
        match event {
            MembershipEvent::Snapshot(records) => {
                self.members = records
                    .iter()
                    .map(|record| (name(&record.node_id), record.clone()))
                    .collect();
            }
            MembershipEvent::Put(record) => {
                self.members.insert(name(&record.node_id), record.clone());
            }
            MembershipEvent::Gone { node_id, .. } => {
                self.members.remove(node_id.as_str());
            }
        }
    }

    /// Follows until the members are as wanted.
    pub async fn follow_until(&mut self, what: &str, wanted: impl Fn(&BTreeMap<String, NodeRecord>) -> bool) {
        soon(what, async {
            while !wanted(&self.members) {
                let event = self.watch.next().await;
                self.fold(&event);
            }
        })
        .await;
    }

    /// Takes in what there is to hear for a while in which nothing may be lost.
    pub async fn drain_for(&mut self, duration: Duration) {
        let _ = tokio::time::timeout(duration, async {
            loop {
                let event = self.watch.next().await;
                self.fold(&event);
            }
        })
        .await;
    }

    pub fn names(&self) -> Vec<&str> {
        self.members.keys().map(String::as_str).collect()
    }

    pub fn gone(&self) -> usize {
        self.events
            .iter()
            .filter(|event| matches!(event, MembershipEvent::Gone { .. }))
            .count()
    }

    pub fn snapshots(&self) -> usize {
        self.events
            .iter()
            .filter(|event| matches!(event, MembershipEvent::Snapshot(_)))
            .count()
    }
}
