//! Skeleton.
use crate::{ClaimError, StoreError, StoreId, StoreOptions};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::Instance;
/// A connection to the store. Cheap to clone.
#[derive(Clone)]
pub struct Store;
impl Store {
    /// Connects.
    pub async fn connect(_options: StoreOptions, _clock: Clock, _supervisor: Supervisor) -> Result<Self, StoreError> { todo!() }
    /// Which data this is.
    pub fn store_id(&self) -> StoreId { todo!() }
    /// The last call was answered.
    pub fn reachable(&self) -> bool { todo!() }
    /// A coordinator calls this before it uses the store: an embedded one serves exactly one coordinator.
    pub async fn claim_coordinator(&self, _instance: Instance) -> Result<(), ClaimError> { todo!() }
}
