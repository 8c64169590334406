//! The engine thread: the one place of a node that computes.
//!
//! A dedicated thread owns the backend and every sequence that waits or runs. Requests reach it through a bounded
//! [`EngineHandle`]; what becomes of a sequence goes back through its own bounded channel. Each step's batch is chosen by
//! `baton_scheduling::step`, so both roles share one loop: a prefill node's sequences end at their first token, a decode
//! node's go on, several tokens a step where a draft was right (`drafting`). Invariant: a block table is dropped only while no step that names it runs.

mod constraint;
mod drafting;
mod ending;
mod gauges;
mod inbox;
mod lookup;
mod observer;
mod runner;
mod sequence;
mod sharing;
mod slots;

pub use constraint::{Constraint, Lookout};
pub use drafting::Speculation;
pub use ending::Ending;
pub use gauges::EngineLoad;
pub use inbox::{EngineHandle, SubmitError};
pub use runner::EngineParts;
pub use sequence::{
    Beginning, Control, Drawn, PrefillDone, SequenceError, SequenceEvent, SequenceSpec, ShareWish, SharedBlocks, Until,
};

pub use runner::start;
