//! The simulator: a whole cluster as events, deterministic by its workload and options. Who serves a request, who is let in and
//! what a node computes next is decided by `baton-scheduling`, the code that runs in clusters. What is modelled here is
//! time and memory: steps take what the node's profile says, hand-overs share links, blocks run out.

mod cluster;
mod decoding;
mod engine;
mod event;
mod frames;
mod handover;
mod histogram;
mod life;
mod look;
mod moving;
mod options;
mod outcome;
mod pool;
mod record;
mod recovery;
mod request;
mod run;
mod turn;

pub use histogram::Histogram;
pub use life::{Order, State};
pub use look::{Looked, NodeLook, RequestLook};
pub use options::{SimError, SimOptions};
pub use outcome::{Fate, NodeUse, Outcome, Served};
pub use run::{Director, simulate, simulate_directed};
