//! A watch over the members without a gap. That the store does not answer changes no membership.

use crate::feed::{self, Follower};
use crate::keys::nodes;
use crate::membership::Membership;
use crate::{NodeRecord, Store};
use baton_node_runtime::Moment;
use baton_types::{Instance, NodeId};
use etcd_client::KeyValue;
use std::time::Duration;
use tokio::sync::mpsc;

/// What doubted members have beyond a lease: the time of one unanswered call, which a store that starts may cost.
const DOUBT_GRACE: Duration = Duration::from_secs(2);

/// A change of membership.
// Few exist at a time, and a box would stand in every match on them.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MembershipEvent {
    /// These are all members; forget others.
    Snapshot(Vec<NodeRecord>),
    /// A member came or changed.
    Put(NodeRecord),
    /// A member's lease ended.
    Gone {
        /// Its name.
        node_id: NodeId,
        /// Its last instance.
        instance: Instance,
    },
}

/// A watch over the members. Begins with a snapshot. Dropping it ends it.
pub struct NodeWatch {
    events: mpsc::Receiver<MembershipEvent>,
}

impl Store {
    /// Watches the members for as long as the process lives.
    pub fn watch_nodes(&self) -> NodeWatch {
        let follower = Nodes {
            cluster: self.options().cluster.clone(),
            doubt: self.options().lease_ttl + DOUBT_GRACE,
            membership: Membership::default(),
            snapshot: Vec::new(),
            is_fresh: false,
        };
        NodeWatch {
            events: feed::follow(self, follower),
        }
    }
}

impl NodeWatch {
    /// The next change. May be dropped without losing one. Never returns once the process shuts down.
    pub async fn next(&mut self) -> MembershipEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}

struct Nodes {
    cluster: String,
    /// How long a member that fresh data lacks may take to come back.
    doubt: Duration,
    membership: Membership,
    /// The snapshot that is being read.
    snapshot: Vec<NodeRecord>,
    is_fresh: bool,
}

impl Nodes {
    /// A record that cannot be read is no member: it was written by hand or by another version.
    fn read(&self, kv: &KeyValue) -> Option<NodeRecord> {
        match nodes::decode(&self.cluster, kv.key(), kv.value()) {
            Ok(record) => Some(record),
            Err(error) => {
                tracing::warn!(%error, "node record is ignored");
                None
            }
        }
    }
}

impl Follower for Nodes {
    type Event = MembershipEvent;

    const TASK: &'static str = "node-watch";
    /// About 700 KB.
    const PAGE_KEYS: i64 = 1000;

    fn prefix(cluster: &str) -> String {
        nodes::prefix(cluster)
    }

    fn connected(&mut self, now: Moment) {
        self.membership.extend_doubt(now + self.doubt);
    }

    fn begin_snapshot(&mut self, is_fresh: bool, _out: &mut Vec<MembershipEvent>) {
        self.snapshot.clear();
        self.is_fresh = is_fresh;
    }

    fn page(&mut self, page: &[KeyValue], _out: &mut Vec<MembershipEvent>) {
        let records: Vec<NodeRecord> = page.iter().filter_map(|kv| self.read(kv)).collect();
        self.snapshot.extend(records);
    }

    fn end_snapshot(&mut self, now: Moment, out: &mut Vec<MembershipEvent>) {
        let records = std::mem::take(&mut self.snapshot);
        out.push(if self.is_fresh {
            self.membership.fresh_data(records, now + self.doubt)
        } else {
            self.membership.snapshot(records)
        });
    }

    fn put(&mut self, kv: &KeyValue, out: &mut Vec<MembershipEvent>) {
        if let Some(record) = self.read(kv) {
            out.push(self.membership.put(record));
        }
    }

    fn delete(&mut self, key: &[u8], out: &mut Vec<MembershipEvent>) {
        if let Some(node_id) = nodes::node_of(&self.cluster, key) {
            out.extend(self.membership.gone(&node_id));
        }
    }

    fn due(&self) -> Option<Moment> {
        self.membership.doubt_ends()
    }

    fn overdue(&mut self, out: &mut Vec<MembershipEvent>) {
        out.extend(self.membership.end_doubt());
    }
}
