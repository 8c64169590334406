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
