//! Skeleton.
use crate::{NodeRecord, Store};
use baton_types::{Instance, NodeId};
/// A change of membership.
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
/// A watch over the members.
pub struct NodeWatch;
impl Store {
    /// Watches the members.
    pub fn watch_nodes(&self) -> NodeWatch { todo!() }
}
impl NodeWatch {
    /// The next change. Cancel-safe. Pending for ever once the process shuts down.
    pub async fn next(&mut self) -> MembershipEvent { todo!() }
}
