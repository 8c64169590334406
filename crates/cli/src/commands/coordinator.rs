//! `baton coordinator`: the coordinator in this process, as its own binary runs it.

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Runs the coordinator in this process.
#[derive(Debug, clap::Args)]
pub struct Coordinator {}

impl Coordinator {
    /// Serves until a signal.
    pub async fn run(self) -> Result<ExitCode> {
        bail!("not yet")
    }
}
