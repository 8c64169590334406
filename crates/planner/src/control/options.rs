//! How a controller decides.

use crate::Nanos;
use crate::profile::NodeModel;
use crate::slo::Slo;
use baton_scheduling::{Policy, Slo as RouteSlo};
use std::sync::Arc;

/// The bounds of one controller.
#[derive(Debug, Clone)]
pub struct ControlOptions {
    /// What was promised.
    pub slo: Slo,
    /// How fast the nodes are; without it nothing is rehearsed, and advice is from live figures alone.
    pub node: Option<Arc<NodeModel>>,
    /// The last requests that it looks at.
    pub window: Nanos,
    /// Fewer requests than this in the window say nothing.
    pub requests_min: usize,
    /// From one change, once it is complete, to the next.
    pub cooldown: Nanos,
    /// Requests that came so soon after a node became ready, or while one was not, are no evidence: it was cold.
    pub warm_up: Nanos,
    /// How long a node that changes waits for its requests, before they are done anew elsewhere. Prompts that wait for KV at
    /// an overloaded decode side would hold up the very change that helps them.
    pub drain: Nanos,
    /// So many looks in a row must say that nodes turn to the same side.
    pub confirmations: u32,
    /// Share of the requests that a change must bring within the SLO in the rehearsal, beyond chance.
    pub margin: f64,
    /// It may also say how many nodes there should be.
    pub scale: bool,
    /// The budget: no more nodes than this, whatever is missed.
    pub nodes_max: usize,
    /// How the coordinator chooses nodes.
    pub policy: Policy,
    /// Bounds that its routing keeps to.
    pub route_slo: RouteSlo,
}

impl ControlOptions {
    /// The defaults, for an SLO.
    pub fn new(slo: Slo, node: Option<Arc<NodeModel>>) -> Self {
        Self {
            slo,
            node,
            window: Nanos::from_seconds(300.0),
            requests_min: 60,
            cooldown: Nanos::from_seconds(120.0),
            warm_up: Nanos::from_seconds(10.0),
            drain: Nanos::from_seconds(15.0),
            confirmations: 2,
            margin: 0.02,
            scale: false,
            nodes_max: usize::MAX,
            policy: Policy::default(),
            route_slo: RouteSlo::default(),
        }
    }
}
