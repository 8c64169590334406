//! What is simulated.

use super::life::Order;
use crate::Nanos;
use crate::profile::{NodeModel, OutOfRange};
use crate::slo::Slo;
use baton_scheduling::{AdmissionLimits, Policy, Slo as RouteSlo};
use std::sync::Arc;

/// As `baton drain` has it.
const DRAIN: Nanos = Nanos(120_000_000_000);

/// A cluster and how it decides. The defaults are those of the live processes.
#[derive(Debug, Clone)]
pub struct SimOptions {
    /// Prefill nodes.
    pub prefill: Vec<Arc<NodeModel>>,
    /// Decode nodes.
    pub decode: Vec<Arc<NodeModel>>,
    /// Nodes that are not there at first, and may be started.
    pub spare: Vec<Arc<NodeModel>>,
    /// What is done to nodes, and when. Nodes are counted through: prefill nodes, decode nodes, spare ones.
    pub orders: Vec<(Nanos, Order)>,
    /// How long a node that is to be empty waits for its requests, as `baton drain` and `baton role` have it. What is left
    /// then is done anew elsewhere.
    pub drain: Nanos,
    /// How nodes are chosen.
    pub policy: Policy,
    /// Bounds that routing keeps to.
    pub route_slo: RouteSlo,
    /// Bounds of the coordinator.
    pub admission: AdmissionLimits,
    /// Nodes keep prompts' blocks for later ones, as far as the workload says which they share.
    pub prefix_cache: bool,
    /// What requests are judged by.
    pub slo: Slo,
    /// Gaps are counted as clients see them: tokens come in frames, as decode nodes send them. Costs a time per token. Else they
    /// are those between steps.
    pub frames: bool,
    /// The nodes share a machine: a step takes what it takes beside what the others compute at the time. Costs events whenever a
    /// node begins or ends to compute.
    pub neighbours: bool,
    /// Ends as soon as the SLO cannot be met any more.
    pub give_up: bool,
}

impl SimOptions {
    /// So many equal nodes.
    pub fn new(node: &Arc<NodeModel>, prefill: usize, decode: usize, slo: Slo) -> Self {
        Self {
            prefill: vec![Arc::clone(node); prefill],
            decode: vec![Arc::clone(node); decode],
            spare: Vec::new(),
            orders: Vec::new(),
            drain: DRAIN,
            policy: Policy::default(),
            route_slo: RouteSlo::default(),
            admission: AdmissionLimits {
                requests_max: 4096,
                queued_max: 1024,
            },
            prefix_cache: true,
            slo,
            frames: false,
            neighbours: false,
            give_up: false,
        }
    }
}

/// Why there is no outcome.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SimError {
    /// A node did what its profile does not cover.
    #[error("the profile {profile} does not cover this: {source}")]
    OutOfRange {
        /// Which profile.
        profile: String,
        /// What it does not cover.
        source: OutOfRange,
    },
    /// Requests wait for each other without end.
    #[error("{open} requests wait for each other: the cluster stands still")]
    Stalled {
        /// How many.
        open: u32,
    },
    /// Without decode nodes nothing can be served.
    #[error("a cluster needs at least one decode node")]
    NoDecodeNode,
    /// An order is about a node that is none of the cluster's.
    #[error("an order is for node {node}, and there are {nodes}, counted from 0")]
    NoSuchNode {
        /// Which.
        node: usize,
        /// Nodes there are.
        nodes: usize,
    },
    /// The trace's blocks are no multiple of the nodes'.
    #[error(
        "the trace's prefix blocks have {trace} tokens, which is no multiple of the profile's block_tokens of {node}"
    )]
    BlockTokens {
        /// Of the trace.
        trace: u32,
        /// Of the node.
        node: u32,
    },
}

impl SimError {
    /// The same is simulated again.
    pub fn is_retryable(&self) -> bool {
        false
    }
}
