//! Who serves: the nodes that the store names, what their heartbeats say, and the models that they serve together.
//! The store steers new placement only; whether a node answers is learnt from the node itself.

mod channel;
mod heartbeat;
mod load;
mod model;
mod state;
mod watch;

pub(crate) use load::Claim;
pub(crate) use model::Model;
pub(crate) use state::{Candidate, MemberStatus, Members};
pub(crate) use watch::{WatchOptions, watch};
