//! Who is a member, as a watch sees it. Pure: what the store said becomes events; every call is told the time.
//!
//! After a wipe the store knows nobody, though the nodes still live and will register again. So members that fresh data
//! lacks are *doubted* and not gone: they stay for one more lease, and go only where the store, reachable all that time,
//! did not see them come back.

use crate::NodeRecord;
use crate::watch::MembershipEvent;
use baton_node_runtime::Moment;
use baton_types::NodeId;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Default)]
pub(crate) struct Membership {
    members: BTreeMap<NodeId, NodeRecord>,
    doubted: BTreeSet<NodeId>,
    doubt_ends: Option<Moment>,
}

impl Membership {
    /// The store's whole contents, of the same data as before.
    pub(crate) fn snapshot(&mut self, records: Vec<NodeRecord>) -> MembershipEvent {
        self.members = records
            .into_iter()
            .map(|record| (record.node_id.clone(), record))
            .collect();
        self.doubted.clear();
        self.doubt_ends = None;
        MembershipEvent::Snapshot(self.members.values().cloned().collect())
    }

    /// The whole contents of other data than before.
    pub(crate) fn fresh_data(&mut self, records: Vec<NodeRecord>, doubt_ends: Moment) -> MembershipEvent {
        self.doubted = self.members.keys().cloned().collect();
        for record in records {
            self.doubted.remove(&record.node_id);
            self.members.insert(record.node_id.clone(), record);
        }
        self.doubt_ends = Some(doubt_ends).filter(|_| !self.doubted.is_empty());
        MembershipEvent::Snapshot(self.members.values().cloned().collect())
    }

    /// A record was written.
    pub(crate) fn put(&mut self, record: NodeRecord) -> MembershipEvent {
        self.doubted.remove(&record.node_id);
        self.members.insert(record.node_id.clone(), record.clone());
        MembershipEvent::Put(record)
    }

    /// A record was deleted.
    pub(crate) fn gone(&mut self, node_id: &NodeId) -> Option<MembershipEvent> {
        self.doubted.remove(node_id);
        let record = self.members.remove(node_id)?;
        Some(MembershipEvent::Gone {
            node_id: record.node_id,
            instance: record.instance,
        })
    }

    /// The store was away: time in which nobody could register does not count.
    pub(crate) fn extend_doubt(&mut self, until: Moment) {
        self.doubt_ends = Some(until).filter(|_| !self.doubted.is_empty());
    }

    /// When doubted members go.
    pub(crate) fn doubt_ends(&self) -> Option<Moment> {
        self.doubt_ends
    }

    /// Drops the members that are still doubted.
    pub(crate) fn end_doubt(&mut self) -> Vec<MembershipEvent> {
        self.doubt_ends = None;
        let doubted = std::mem::take(&mut self.doubted);
        doubted.iter().filter_map(|node_id| self.gone(node_id)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_node_runtime::Clock;
    use baton_types::{Instance, KvDtype, KvGeometry, ModelFingerprint, NodeRole, NodeState, NumericsId};

    fn record(name: &str, instance: u64) -> NodeRecord {
        NodeRecord {
            node_id: NodeId::new(name),
            instance: Instance(instance),
            role: NodeRole::Decode,
            state: NodeState::Ready,
            grpc_address: String::new(),
            transfer: Vec::new(),
            model: String::new(),
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
            blocks: 0,
            queue_capacity: 0,
            context_tokens: 0,
        }
    }

    fn gone(name: &str, instance: u64) -> MembershipEvent {
        MembershipEvent::Gone {
            node_id: NodeId::new(name),
            instance: Instance(instance),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_wipe_only_casts_doubt() {
        let now = Clock::new().now();
        let mut members = Membership::default();
        members.snapshot(vec![record("a", 1), record("b", 2), record("c", 3)]);
        let event = members.fresh_data(vec![record("b", 2), record("d", 4)], now);
        let all = vec![record("a", 1), record("b", 2), record("c", 3), record("d", 4)];
        assert_eq!(event, MembershipEvent::Snapshot(all));
        members.put(record("a", 9));
        assert_eq!(members.doubt_ends(), Some(now));
        assert_eq!(members.end_doubt(), [gone("c", 3)]);
        assert_eq!(members.doubt_ends(), None);
        assert_eq!(members.gone(&NodeId::new("a")), Some(gone("a", 9)));
        assert_eq!(members.gone(&NodeId::new("a")), None);
        members.extend_doubt(now);
        assert_eq!(members.doubt_ends(), None);
    }

    #[test]
    fn a_snapshot_of_the_same_data_is_the_truth() {
        let mut members = Membership::default();
        members.snapshot(vec![record("a", 1), record("b", 2)]);
        assert_eq!(
            members.snapshot(vec![record("b", 3)]),
            MembershipEvent::Snapshot(vec![record("b", 3)])
        );
        assert_eq!(members.gone(&NodeId::new("a")), None);
    }
}
