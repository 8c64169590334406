//! Every key that Baton writes, one file each: its place, codec, lifetime and writer.
//!
//! All stand under `/baton/v1/{cluster}/`, save [`embedded_owner`], which belongs to a store and not to a cluster.

pub mod embedded_owner;
pub mod nodes;
pub mod store_id;

/// A value that its key's codec cannot read: written by another version, or by hand.
#[derive(Debug, thiserror::Error)]
#[error("the value of {key} cannot be read: {problem}")]
pub struct UnreadableValue {
    /// Which key.
    pub key: String,
    /// Why.
    pub problem: String,
}

/// Where a cluster's keys begin.
pub fn cluster_prefix(cluster: &str) -> String {
    format!("/baton/v1/{cluster}/")
}
