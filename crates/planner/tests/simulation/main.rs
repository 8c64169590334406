//! The simulator as a whole.

#![allow(clippy::unwrap_used)]

mod control;
mod life;
mod plain;
mod planning;
mod properties;
mod report;
mod truths;
