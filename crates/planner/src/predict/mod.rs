//! What one cluster will do under one load, in the figures that a replay measures; and how far off that was.

mod compare;
mod figures;
mod forecast;

pub use compare::{Comparison, Tolerance, compare};
pub use figures::Figures;
pub use forecast::{Case, Forecast, expect, highest_rate, predict};
