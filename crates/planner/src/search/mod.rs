//! How many nodes of which kind: rate matching in closed form to begin with, simulation to decide.

mod bottleneck;
mod budget;
mod demand;
mod error;
mod matching;
mod parallel;
mod plan;
mod regret;
mod split;
mod trial;

pub use bottleneck::{Bottleneck, Fix};
pub use error::PlanError;
pub use matching::{Limit, Matched, RateMatch};
pub use plan::{Answer, Given, Nearest, Plan, Prices, Rival, plan};
pub use regret::{Regret, Shifted};
pub use split::{CLASSES_MAX, NodeClass, Side, Split};
pub use trial::Question;
