//! Which nodes serve a request. [`route`] takes what is known of every node and gives the choice with the candidates it was
//! made from, so that each choice can be explained.

mod choose;
mod decision;
mod node;
mod predict;
mod shortlist;

#[cfg(test)]
mod tests;

pub use choose::route;
pub use decision::{
    CANDIDATES_MAX, Candidate, Decision, HoldReason, PROBE_TURNS, RefuseReason, RouteRequest, Routed, Slo,
};
pub use node::NodeView;
pub use predict::{HORIZON_TOKENS, Prediction};
pub use shortlist::Policy;
