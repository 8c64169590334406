//! Hand-overs between real processes: very many of them, and some whose other end is killed or stopped.
//!
//! `BATON_TEST_LONG=1` for the long campaigns; `BATON_TEST_SEED` for one to be run again.

#![allow(clippy::unwrap_used)]

#[path = "../nodes/mod.rs"]
mod nodes;

mod kills;
mod many;
mod peer;
mod plan;
mod process;
