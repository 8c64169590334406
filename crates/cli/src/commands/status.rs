//! `baton status`: the nodes of a running cluster, and what its controller advises, as text or as JSON.

use super::advice;
use crate::endpoint::{EndpointOptions, explain};
use crate::timeline::format_rate;
use anyhow::{Context, Result, anyhow};
use baton_node_runtime::format_bytes;
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::{
    AdviseRequest, BlockCounts, ClusterStatusRequest, ClusterStatusResponse, NodeRole, NodeStatus, PathLoad,
    ProcessStatus,
};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

/// Shows the nodes of a running cluster.
#[derive(Debug, clap::Args)]
pub struct Status {
    #[command(flatten)]
    endpoint: EndpointOptions,
    /// Prints one line of JSON
    #[arg(long)]
    json: bool,
    /// Also what the controller sees, what it would change, and why or why not
    #[arg(long)]
    advise: bool,
}

impl Status {
    /// Asks and prints.
    pub async fn run(self) -> Result<ExitCode> {
        let (channel, address) = self.endpoint.connect().await?;
        let failed = |status: tonic::Status| anyhow!("{address}: {}", explain(&status));
        let mut admin = AdminClient::new(channel);
        let answer = admin.cluster_status(ClusterStatusRequest {}).await;
        let status = answer.map_err(failed)?.into_inner();
        let advice = if self.advise {
            Some(admin.advise(AdviseRequest {}).await.map_err(failed)?.into_inner())
        } else {
            None
        };
        let text = if self.json {
            let mut value = json(&status);
            if let Some(advice) = &advice {
                value["advice"] = advice::json(advice);
            }
            value.to_string()
        } else {
            let advice = advice.map(|advice| format!("\n{}", advice::text(&advice)));
            table(&status, &address) + &advice.unwrap_or_default()
        };
        writeln!(std::io::stdout(), "{}", text.trim_end()).context("write the status")?;
        Ok(ExitCode::SUCCESS)
    }
}

fn role(node: &NodeStatus) -> &'static str {
    match node.role() {
        NodeRole::Prefill => "prefill",
        NodeRole::Decode => "decode",
        NodeRole::Unspecified => "unknown",
    }
}

fn json(status: &ClusterStatusResponse) -> Value {
    let process = |p: &ProcessStatus| json!({"pid": p.pid, "open_files": p.open_files, "tasks": p.tasks, "resident_bytes": p.resident_bytes});
    let blocks = |b: &BlockCounts| {
        json!({
            "total": b.total, "free": b.free, "cached": b.cached, "referenced": b.referenced, "reserved": b.reserved,
            "quarantined": b.quarantined,
        })
    };
    let path = |path: &PathLoad| {
        json!({
            "path": path.path, "open": path.open, "down": path.down, "bytes_per_second": path.bytes_per_second,
            "sent": path.sent, "received": path.received, "failed": path.failed, "fallbacks": path.fallbacks,
        })
    };
    let node = |node: &NodeStatus| {
        let load = node.load.as_ref();
        let errors = load.map(|load| &load.last_errors).into_iter().flatten();
        let errors: Vec<Value> = errors
            .map(|error| json!({"age_ms": error.age_ms, "message": error.message}))
            .collect();
        json!({
            "node_id": node.node_id,
            "instance": node.instance,
            "role": role(node),
            "state": node.state,
            "model": node.model,
            "stub": node.stub,
            "grpc_address": node.grpc_address,
            "heartbeat_age_ms": node.heartbeat_age_ms,
            "queued_requests": load.map(|load| load.queued_requests),
            "queued_tokens": load.map(|load| load.queued_tokens),
            "queue_capacity": load.map(|load| load.queue_capacity),
            "running_requests": load.map(|load| load.running_requests),
            "handovers_out": load.map(|load| load.handovers_out),
            "handovers_in": load.map(|load| load.handovers_in),
            "paths": load.map(|load| load.paths.iter().map(path).collect::<Vec<_>>()),
            "prefill_tokens_per_s": load.map(|load| load.prefill_tokens_per_s),
            "decode_step_us": load.map(|load| load.decode_step_us),
            "integrity_faults": load.map(|load| load.integrity_faults),
            "blocks": load.and_then(|load| load.blocks.as_ref()).map(blocks),
            "process": load.and_then(|load| load.process.as_ref()).map(process),
            "last_errors": errors,
        })
    };
    json!({
        "coordinator_instance": status.coordinator_instance,
        "store": status.store,
        "store_reachable": status.store_reachable,
        "running_requests": status.running_requests,
        "queued_requests": status.queued_requests,
        "process": status.process.as_ref().map(process),
        "nodes": status.nodes.iter().map(node).collect::<Vec<_>>(),
    })
}

const HEAD: [&str; 16] = [
    "NODE",
    "ROLE",
    "STATE",
    "MODEL",
    "QUEUE",
    "RUNNING",
    "FREE",
    "CACHED",
    "REFERENCED",
    "RESERVED",
    "QUARANTINED",
    "BLOCKS",
    "HEARTBEAT",
    "PID",
    "MEMORY",
    "PATHS",
];

fn table(status: &ClusterStatusResponse, address: &str) -> String {
    let store = if status.store_reachable {
        "answers"
    } else {
        "DOES NOT ANSWER"
    };
    let mut out = format!(
        "coordinator {address}: {} running, {} queued; store {} {store}\n\n",
        status.running_requests, status.queued_requests, status.store
    );
    if status.nodes.is_empty() {
        out.push_str("no nodes: start some with `baton node --role prefill|decode --store ...`\n");
        return out;
    }
    let mut rows = vec![HEAD.map(str::to_owned).to_vec()];
    rows.extend(status.nodes.iter().map(|node| row(node).to_vec()));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    for row in &rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // Names to the left, figures to the right.
            let _ = if column < 4 || column == HEAD.len() - 1 {
                write!(line, "{cell:<width$}  ")
            } else {
                write!(line, "{cell:>width$}  ")
            };
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
    for node in &status.nodes {
        let Some(load) = &node.load else { continue };
        if load.integrity_faults > 0 {
            let _ = writeln!(
                out,
                "\n{}: {} INTEGRITY FAULTS: restart it, and report this",
                node.node_id, load.integrity_faults
            );
        }
        for error in &load.last_errors {
            let _ = writeln!(
                out,
                "\n{}: {} s ago: {}",
                node.node_id,
                error.age_ms / 1000,
                error.message
            );
        }
    }
    out
}

fn row(node: &NodeStatus) -> [String; HEAD.len()] {
    let load = node.load.clone().unwrap_or_default();
    let blocks = load.blocks.unwrap_or_default();
    let process = load.process.unwrap_or_default();
    let model = if node.stub {
        format!("{} (stub)", node.model)
    } else {
        node.model.clone()
    };
    [
        node.node_id.clone(),
        role(node).to_owned(),
        node.state.clone(),
        model,
        format!("{}/{}", load.queued_requests, load.queue_capacity),
        load.running_requests.to_string(),
        blocks.free.to_string(),
        blocks.cached.to_string(),
        blocks.referenced.to_string(),
        blocks.reserved.to_string(),
        blocks.quarantined.to_string(),
        blocks.total.to_string(),
        format!("{} ms", node.heartbeat_age_ms),
        process.pid.to_string(),
        format_bytes(process.resident_bytes),
        load.paths.iter().map(path).collect::<Vec<_>>().join(", "),
    ]
}

/// `shm 4.1 GB/s, tcp DOWN to 1`: what is used or was, and what is down.
fn path(path: &PathLoad) -> String {
    let mut out = path.path.clone();
    if path.bytes_per_second > 0 {
        let _ = write!(out, " {}", format_rate(path.bytes_per_second));
    }
    if path.down > 0 {
        let _ = write!(out, " DOWN to {}", path.down);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_proto::v1::{NodeError, NodeLoad};

    fn status() -> ClusterStatusResponse {
        let load = NodeLoad {
            blocks: Some(BlockCounts {
                total: 100,
                free: 90,
                cached: 6,
                referenced: 1,
                reserved: 2,
                quarantined: 1,
            }),
            queued_requests: 3,
            queue_capacity: 64,
            running_requests: 2,
            paths: vec![
                PathLoad {
                    path: "shm".to_owned(),
                    bytes_per_second: 4_100_000_000,
                    ..PathLoad::default()
                },
                PathLoad {
                    path: "tcp".to_owned(),
                    down: 1,
                    ..PathLoad::default()
                },
            ],
            last_errors: vec![NodeError {
                age_ms: 2500,
                message: "peer gone".to_owned(),
            }],
            ..NodeLoad::default()
        };
        let node = NodeStatus {
            node_id: "decode-1".to_owned(),
            role: NodeRole::Decode.into(),
            state: "ready".to_owned(),
            model: "tiny".to_owned(),
            stub: true,
            load: Some(load),
            ..NodeStatus::default()
        };
        ClusterStatusResponse {
            nodes: vec![node],
            store: "embedded".to_owned(),
            ..ClusterStatusResponse::default()
        }
    }

    #[test]
    fn the_table_shows_what_an_operator_looks_for() {
        let table = table(&status(), "h:1");
        for words in [
            "decode-1",
            "tiny (stub)",
            "3/64",
            "QUARANTINED",
            "2 s ago: peer gone",
            "DOES NOT ANSWER",
            "shm 4.1 GB/s, tcp DOWN to 1",
        ] {
            assert!(table.contains(words), "`{words}` is not in:\n{table}");
        }
        let empty = super::table(&ClusterStatusResponse::default(), "h:1");
        assert!(empty.contains("no nodes"));
    }

    #[test]
    fn json_has_the_blocks() {
        let value = json(&status());
        assert_eq!(value["nodes"][0]["blocks"]["reserved"], 2);
        assert_eq!(value["nodes"][0]["role"], "decode");
        assert_eq!(value["nodes"][0]["paths"][1]["down"], 1);
        assert_eq!(value["nodes"][0]["last_errors"][0]["message"], "peer gone");
    }
}
