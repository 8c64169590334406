//! What all keys share: where a cluster's keys begin, and what is wrong with a value that cannot be read.

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
