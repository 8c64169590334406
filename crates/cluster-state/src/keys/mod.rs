//! Every key that Baton writes, one file each: its place, codec, lifetime and writer.
//!
//! All stand under `/baton/v1/{cluster}/`, save [`embedded_owner`], which belongs to a store and not to a cluster.

pub mod blocks;
mod common;
pub mod embedded_owner;
pub mod nodes;
pub mod plan;
pub mod store_id;

pub use common::{UnreadableValue, cluster_prefix};
