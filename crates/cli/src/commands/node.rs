//! `baton node`: one node in this process, as the single-role binaries run it.

use crate::models::ModelSource;
use anyhow::{Context, Result, anyhow};
use baton_node_host::{BringUpError, NodeOptions};
use baton_node_runtime::Supervisor;
use baton_types::NodeRole;
use std::process::ExitCode;

/// Runs one node in this process.
#[derive(Debug, clap::Args)]
pub struct Node {
    /// What it does: prefill or decode
    #[arg(long, value_name = "ROLE")]
    role: NodeRole,
    #[command(flatten)]
    options: NodeOptions,
}

impl Node {
    /// Serves until a signal.
    pub async fn run(self) -> Result<ExitCode> {
        let mut options = self.options;
        let source: ModelSource = options
            .model
            .parse()
            .map_err(|reason: String| anyhow!(reason))
            .context("--model")?;
        options.model = source.resolve().await?;
        let supervisor = Supervisor::new();
        let served = match self.role {
            NodeRole::Prefill => baton_prefill_node::run(options, supervisor).await,
            NodeRole::Decode => baton_decode_node::run(options, supervisor).await,
        };
        match served {
            Ok(()) | Err(BringUpError::Interrupted) => Ok(ExitCode::SUCCESS),
            Err(error) => Err(error.into()),
        }
    }
}
