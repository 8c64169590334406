//! Who serves: the nodes that the store names, what their heartbeats say, and the models that they serve together.
//! The store steers new placement only; whether a node answers is learnt from the node itself.

mod changes;
mod channel;
mod heartbeat;
mod load;
mod locations;
mod members;
mod model;
mod roster;
#[cfg(test)]
mod roster_test;
mod watch;

pub(crate) use changes::Listener;
pub(crate) use channel::{Connect, network};
pub(crate) use load::Claim;
pub(crate) use locations::watch_locations;
pub(crate) use members::Members;
pub(crate) use model::Model;
pub(crate) use roster::{Candidate, MemberStatus};
use roster::{CardWanted, NewMember};
pub(crate) use watch::{WatchOptions, watch};
#[cfg(test)]
pub(crate) use {changes::Changes, channel::endpoint};
