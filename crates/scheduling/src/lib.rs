//! Decisions, nothing else: which nodes serve a request, whether it is let in, what a node computes next. Pure functions
//! of what they are given: no IO, no clock, no randomness.

#![warn(missing_docs)]

mod admission;
mod digest;
mod fair;
mod fleet;
mod index;
mod load;
mod rate;
mod regression;
mod route;
pub mod step;
mod table;
mod times;

pub use admission::{Admission, AdmissionLimits, AdmissionLoad, Refusal, admit};
pub use fair::{Entry, FairQueue, Priority, QUANTUM_TOKENS};
pub use fleet::{Fleet, FleetNode, Place, Side};
pub use index::{BlockIndex, Held};
pub use load::{Figures, Load, Placed, Reported};
pub use rate::RateLimit;
pub use route::{
    CANDIDATES_MAX, Candidate, Decision, HORIZON_TOKENS, HoldReason, NodeView, PROBE_TURNS, Policy, Prediction,
    RefuseReason, RouteRequest, Routed, Slo, route,
};
pub use times::{HandoverTimes, StepModel, StepTimes};
