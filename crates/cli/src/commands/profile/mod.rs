//! `baton profile`: what a node can do on this machine.

mod command;
mod engine;
mod live;
mod neighbour;
mod tables;

pub use command::{Profile, one_token_a_step};
pub use live::{ask, prompt_seconds};
pub use tables::median;
