//! The flags that every process has.

use crate::{ConfigOptions, Supervisor, TelemetryOptions, exit_with_parent, shutdown_signal};
use std::net::SocketAddr;

/// Flags of every process that serves: flatten it into the role's options.
#[derive(Debug, Clone, clap::Args)]
pub struct ProcessOptions {
    /// Where /metrics, /healthz and /readyz are served; port 0 takes any free one
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:0",
        help_heading = "Process"
    )]
    pub admin_listen: SocketAddr,
    /// Ends the process when its standard input ends, so that it never outlives the program that started it
    #[arg(long, help_heading = "Process")]
    pub exit_with_parent: bool,
    /// Logs.
    #[command(flatten)]
    pub telemetry: TelemetryOptions,
    /// The configuration file.
    #[command(flatten)]
    pub config: ConfigOptions,
}

impl ProcessOptions {
    /// Installs what ends the process: signals, and the parent's end where that was asked for.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn watch_for_end(&self, supervisor: &Supervisor) {
        shutdown_signal(supervisor);
        if self.exit_with_parent {
            exit_with_parent(supervisor);
        }
    }
}
