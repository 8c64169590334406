//! Who is in the cluster, which blocks each node holds and whose controller leads: records under leases, watches over them
//! without a gap, and the store that holds them, which is etcd or the embedded one that speaks the same protocol. Only this
//! crate names `etcd-client`.

#![warn(missing_docs)]

mod backoff;
mod candidacy;
pub mod embedded;
mod error;
mod feed;
pub mod keys;
mod lease;
mod locations;
mod membership;
mod options;
mod publication;
mod registration;
mod store;
mod watch;

pub use candidacy::{Candidacy, Standing};
pub use error::{ClaimError, RegisterError, StoreError};
pub use keys::blocks::BlockSegment;
pub use keys::nodes::NodeRecord;
pub use keys::plan::{AdviceRecord, ChangeRecord, DecidedRecord, NodeCounts, RehearsedRecord};
pub use keys::store_id::StoreId;
pub use locations::{LocationBudget, LocationEvent, LocationWatch};
pub use options::{Credentials, InvalidAddress, StoreAddress, StoreOptions};
pub use registration::Registration;
pub use store::Store;
pub use watch::{MembershipEvent, NodeWatch};
