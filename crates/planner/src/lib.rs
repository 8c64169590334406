//! How many prefill nodes and how many decode nodes a workload needs: profiles of nodes, a simulator that runs the live
//! decisions of `baton-scheduling`, and the search over counts. No clock, no network; chance comes from seeds alone.

#![warn(missing_docs)]

pub mod control;
mod nanos;
pub mod predict;
pub mod profile;
pub mod report;
pub mod search;
pub mod sim;
pub mod slo;
pub mod stats;
pub mod workload;

pub use baton_scheduling::Policy;
pub use nanos::Nanos;
