//! `baton validate`: what was predicted first, against what a cluster then did.

mod command;
mod division;
mod report;
mod runs;
mod speed;
mod stored;

pub use command::Validate;
