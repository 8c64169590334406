//! `baton plan`: how many prefill nodes and how many decode nodes a workload needs.

mod command;
mod given;
mod nodes;
mod print;

pub use command::Plan;
pub use given::parse_rate;
