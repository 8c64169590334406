//! A cluster on this machine: the roles as child processes of this one, which re-executes itself with them. This module
//! owns the processes: none of them outlives it.

mod child;
mod plan;
mod running;

pub use plan::{ClusterOptions, Shape};
pub use running::Cluster;
