//! The controller in a live cluster: a record of the last requests, a look at it by the coordinator that leads, and its advice,
//! which is published and, where that was asked for, followed. What is decided, and how, is in `baton_planner::control`.

mod advice;
mod flags;
mod handle;
mod nodes;
mod record;
mod runner;
mod target;

pub(crate) use flags::ControlPlan;
pub use flags::{ControlFlags, ControlMode};
use handle::Shared;
pub(crate) use handle::{Control, ControlStatus};
pub(crate) use record::{Record, Recording};
