//! Load on a live endpoint, open loop: each request is sent when it is due, whatever became of those before, and is timed from
//! when it was due, so that a slow server (or a slow client) cannot hide behind its own backlog. How late the generator itself
//! sent is reported with every run.

#![warn(missing_docs)]

mod error;
mod observed;
mod offer;
mod prompts;
mod schedule;
mod summary;
mod target;

pub use error::LoadError;
pub use observed::{Failure, Frame, Observed, Run};
pub use offer::{Progress, offer};
pub use prompts::{Prompts, TokenRange, mix};
pub use schedule::{Planned, Prompt};
pub use summary::{Attained, Goodput, Percentiles, Summary};
pub use target::{BatonTarget, Dialect, OpenAiTarget, ServedModel, Target};
