//! The controller: watches a cluster and proposes, or orders, a change of role or a scale target. Pure: state and observation in,
//! decision out; whoever runs it (the coordinator, the simulator) observes and acts.
//!
//! It looks at shares and percentiles, never at means, acts only behind a rehearsal: the last requests again, with the change and
//! without it, the better in the first half of the time and in the second; and at most once per cooldown.

mod controller;
mod direct;
mod observe;
mod options;
mod rehearse;
mod signals;

pub use controller::{Advice, Change, Controller, Hold};
pub use direct::Directed;
pub use observe::{NodeSeen, Observation, Past};
pub use options::ControlOptions;
pub use rehearse::{Rehearsal, Rehearsed};
pub use signals::{Reason, Signals};
