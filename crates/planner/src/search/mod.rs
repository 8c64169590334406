//! How many nodes of which kind: rate matching in closed form to begin with, simulation to decide.

mod budget;
mod demand;
mod error;
mod matching;
mod parallel;
mod plan;
mod trial;

pub use error::PlanError;
pub use matching::{Limit, RateMatch};
pub use plan::{Answer, Bottleneck, Given, Plan, Prices, Regret, Rival, plan};
pub use trial::{Question, Split};
