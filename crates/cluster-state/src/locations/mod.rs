//! Which node holds which KV blocks: how a node writes it, and a watch over what all nodes wrote.

mod log;
mod publisher;
mod watch;

pub use publisher::LocationBudget;
pub use watch::{LocationEvent, LocationWatch};
