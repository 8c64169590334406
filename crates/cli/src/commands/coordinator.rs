//! `baton coordinator`: the coordinator in this process, as its own binary runs it.

use anyhow::Result;
use baton_coordinator::{Options, StartError};
use baton_node_runtime::Supervisor;
use std::process::ExitCode;

/// Runs the coordinator in this process.
#[derive(Debug, clap::Args)]
pub struct Coordinator {
    #[command(flatten)]
    options: Options,
}

impl Coordinator {
    /// Serves until a signal.
    pub async fn run(self) -> Result<ExitCode> {
        match baton_coordinator::run(self.options, Supervisor::new()).await {
            Ok(()) | Err(StartError::Interrupted) => Ok(ExitCode::SUCCESS),
            Err(error) => Err(error.into()),
        }
    }
}
