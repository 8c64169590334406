//! `baton role`: asks a node to take up the other role, without loading its weights again.

use crate::endpoint::{EndpointOptions, explain};
use anyhow::{Result, anyhow};
use baton_node_runtime::parse_duration;
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::{NodeRole as WireRole, SetRoleRequest};
use baton_types::NodeRole;
use std::process::ExitCode;
use std::time::Duration;

/// Asks a node to take up the other role, without loading its weights again.
#[derive(Debug, clap::Args)]
pub struct Role {
    /// The node's name, as `baton status` shows it
    node: String,
    /// What it is to do from then on: prefill or decode
    #[arg(value_name = "ROLE")]
    role: NodeRole,
    /// How long its running requests may take to end or to move; what is left then is done anew elsewhere
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "120s")]
    deadline: Duration,
    #[command(flatten)]
    endpoint: EndpointOptions,
}

impl Role {
    /// Asks; does not wait until the node is ready in its new role.
    pub async fn run(self) -> Result<ExitCode> {
        let (channel, address) = self.endpoint.connect().await?;
        let request = SetRoleRequest {
            node_id: self.node.clone(),
            role: WireRole::from(self.role).into(),
            deadline_ms: Some(u64::try_from(self.deadline.as_millis()).unwrap_or(u64::MAX)),
        };
        let answer = AdminClient::new(channel).set_role(request).await;
        answer.map_err(|status| anyhow!("{address}: {}", explain(&status)))?;
        println!(
            "{} becomes a {} node once its running requests are gone: see `baton status`",
            self.node, self.role
        );
        Ok(ExitCode::SUCCESS)
    }
}
