//! What every process of Baton needs before it has a role: configuration, telemetry, a clock that tests can pause,
//! supervised tasks, the admin port, figures of the process, and the line that tells a parent that it is ready.
//! It knows nothing of what a node does. Besides the command line tool this is the only place that reads the environment.

#![warn(missing_docs)]

pub mod admin;
pub mod announce;
mod clock;
pub mod config;
mod listen;
mod options;
pub mod process;
mod signals;
mod supervisor;
pub mod telemetry;

pub use admin::{AdminError, AdminServer, Readiness};
pub use announce::Announcement;
pub use clock::{Clock, Elapsed, Moment};
pub use config::{ConfigOptions, format_bytes, format_duration, parse_bytes, parse_duration};
pub use listen::{BindError, bind};
pub use options::ProcessOptions;
pub use signals::{exit_with_parent, shutdown_signal};
pub use supervisor::{Supervisor, TaskHandle, ThreadHandle};
pub use telemetry::{LogFormat, Metrics, TelemetryOptions};
/// Says that the process is to end; children of it can be made.
pub use tokio_util::sync::CancellationToken;
