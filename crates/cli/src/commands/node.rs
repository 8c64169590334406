//! `baton node`: one node in this process. It has both roles, so that it can change from one to the other.

use crate::models::ModelSource;
use anyhow::{Context, Result, anyhow};
use baton_decode_node::DecodeRole;
use baton_node_host::{BringUpError, Host, NodeOptions, Roles};
use baton_node_runtime::Supervisor;
use baton_prefill_node::PrefillRole;
use baton_types::NodeRole;
use std::process::ExitCode;
use std::sync::Arc;

/// Runs one node in this process.
#[derive(Debug, clap::Args)]
pub struct Node {
    /// What it does at first: prefill or decode; `baton role` changes it
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
        let roles = |host: Host| Roles::Both {
            prefill: Arc::new(PrefillRole::new(host.clone())),
            decode: Arc::new(DecodeRole::new(host)),
        };
        let served = baton_node_host::run(options, self.role, roles, Supervisor::new()).await;
        match served {
            Ok(()) | Err(BringUpError::Interrupted) => Ok(ExitCode::SUCCESS),
            Err(error) => Err(error.into()),
        }
    }
}
