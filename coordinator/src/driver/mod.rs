//! Performs what `core` decides: one supervised task per request, streams to its nodes, text, time. The front end lets
//! requests in and hands them over.

mod decisions;
mod frontend;
mod legs;
mod line;
mod placement;
mod prepare;
mod registry;
mod task;
mod text;

pub(crate) use decisions::{Choice, Explanation};
pub(crate) use frontend::{Coordinator, CoordinatorOptions};
pub(crate) use placement::RoutingOptions;
