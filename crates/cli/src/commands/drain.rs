//! `baton drain`: asks a node to take no new work and to leave when it is empty.

use crate::endpoint::{EndpointOptions, explain};
use anyhow::{Result, anyhow};
use baton_node_runtime::parse_duration;
use baton_proto::v1::DrainRequest;
use baton_proto::v1::admin_client::AdminClient;
use std::process::ExitCode;
use std::time::Duration;

/// Asks a node to take no new work and to leave when it is empty.
#[derive(Debug, clap::Args)]
pub struct Drain {
    /// The node's name, as `baton status` shows it
    node: String,
    /// How long its running requests may take
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "120s")]
    deadline: Duration,
    #[command(flatten)]
    endpoint: EndpointOptions,
}

impl Drain {
    /// Asks; does not wait until the node has left.
    pub async fn run(self) -> Result<ExitCode> {
        let (channel, address) = self.endpoint.connect().await?;
        let deadline_ms = u64::try_from(self.deadline.as_millis()).unwrap_or(u64::MAX);
        let request = DrainRequest {
            node_id: self.node.clone(),
            deadline_ms: Some(deadline_ms),
        };
        let answer = AdminClient::new(channel).drain(request).await;
        answer.map_err(|status| anyhow!("{address}: {}", explain(&status)))?;
        println!(
            "{} takes no new work and leaves when it is empty: see `baton status`",
            self.node
        );
        Ok(ExitCode::SUCCESS)
    }
}
