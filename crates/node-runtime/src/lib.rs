//! What every process of Baton needs before it has a role: configuration, telemetry, a clock that tests can pause,
//! supervised tasks, the admin port, figures of the process, and the line that tells a parent that it is ready.
//! It knows nothing of what a node does. Besides the command line tool this is the only place that reads the environment.

#![warn(missing_docs)]

mod clock;
mod supervisor;

#[cfg(feature = "process")]
pub mod admin;
#[cfg(feature = "process")]
pub mod announce;
#[cfg(feature = "process")]
pub mod config;
#[cfg(feature = "process")]
mod listen;
#[cfg(feature = "process")]
mod options;
#[cfg(feature = "process")]
pub mod process;
#[cfg(feature = "process")]
mod signals;
#[cfg(feature = "process")]
pub mod telemetry;

pub use clock::{Clock, Elapsed, Moment};
pub use supervisor::{Supervisor, TaskHandle, ThreadHandle};
/// Says that the process is to end; children of it can be made.
pub use tokio_util::sync::CancellationToken;

#[cfg(feature = "process")]
pub use admin::{AdminError, AdminServer, Readiness};
#[cfg(feature = "process")]
pub use announce::Announcement;
#[cfg(feature = "process")]
pub use config::{ConfigOptions, format_bytes, format_duration, parse_bytes, parse_duration};
#[cfg(feature = "process")]
pub use listen::{BindError, bind};
#[cfg(feature = "process")]
pub use options::ProcessOptions;
#[cfg(feature = "process")]
pub use signals::{exit_with_parent, shutdown_signal};
#[cfg(feature = "process")]
pub use telemetry::{LogFormat, Metrics, TelemetryOptions};
