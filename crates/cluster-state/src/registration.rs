//! Skeleton.
use crate::{NodeRecord, RegisterError, Store};
/// A node's place in the cluster, kept until it is dropped (the lease then runs out) or given back.
pub struct Registration;
impl Store {
    /// Registers.
    pub async fn register(&self, _record: NodeRecord) -> Result<Registration, RegisterError> { todo!() }
}
impl Registration {
    /// Changes the record; true: published, false: will be once the store answers again.
    pub async fn update(&self, _change: impl FnOnce(&mut NodeRecord)) -> bool { todo!() }
    /// The record as it should stand.
    pub fn record(&self) -> NodeRecord { todo!() }
    /// The record stands in the store as far as is known.
    pub fn is_published(&self) -> bool { todo!() }
    /// Revokes the lease.
    pub async fn deregister(self) { todo!() }
}
