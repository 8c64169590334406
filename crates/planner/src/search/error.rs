//! Why there is no plan.

use crate::profile::OutOfRange;
use crate::sim::SimError;
use crate::workload::WorkloadError;

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// It could not be simulated.
    #[error(transparent)]
    Sim(#[from] SimError),
    /// The workload could not be scaled.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// The workload is outside the profile.
    #[error("the profile does not cover this workload: {0}")]
    OutOfRange(#[from] OutOfRange),
    /// Nothing was asked for.
    #[error("the budget is {nodes} nodes: prefill and decode need at least 2")]
    Budget {
        /// What was given.
        nodes: usize,
    },
    /// No kind of node, or too many.
    #[error("{count} kinds of nodes: between 1 and {most} can be planned")]
    Classes {
        /// How many were given.
        count: usize,
        /// How many there may be.
        most: usize,
    },
    /// KV of one kind of node means nothing to another.
    #[error("{one} and {other} cannot hand KV over to each other: {why}")]
    Unlike {
        /// A kind of node.
        one: String,
        /// Another.
        other: String,
        /// What differs.
        why: String,
    },
    /// Nodes without a bound cannot all be used.
    #[error("{class} has no count: say how many there are, or give a rate to serve")]
    Unbounded {
        /// The kind of node.
        class: String,
    },
    /// Nobody decodes, or there are no nodes.
    #[error("no combination of these nodes has a decode node")]
    NoNodes,
    /// Too many to look at.
    #[error("{combinations} combinations of nodes might serve this rate: bound the counts of some kinds")]
    Combinations {
        /// How many.
        combinations: usize,
    },
    /// All requests come at once, so that there is no rate to scale.
    #[error("the trace has no duration: at least two requests at different times are needed")]
    NoDuration,
}

impl PlanError {
    /// The same would be planned again.
    pub fn is_retryable(&self) -> bool {
        false
    }
}
