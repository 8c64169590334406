//! Decisions, nothing else: which nodes serve a request, whether it is let in, what a node computes next. Pure functions
//! of what they are given: no IO, no clock, no randomness.

#![warn(missing_docs)]

mod admission;
mod index;
mod route;
pub mod step;

pub use admission::{Admission, AdmissionLimits, AdmissionLoad, Refusal, admit};
pub use index::BlockIndex;
pub use route::{Decision, NodeView, Prediction, RefuseReason, RouteRequest, route};
