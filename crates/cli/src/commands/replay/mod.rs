//! `baton replay`: a trace against a live endpoint, open loop.

mod command;
mod figures;
mod print;

pub use command::{Replay, offered};
pub use figures::figures;
