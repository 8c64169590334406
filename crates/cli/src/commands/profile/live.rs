//! What only a pair of live nodes shows: hand-overs, what the coordinator and the network add, KV capacity, start and change of role.
//! Requests go one by one, so nothing queues.

use super::tables::median;
use crate::cluster::{Cluster, ClusterOptions};
use anyhow::{Context, Result, anyhow, bail};
use baton_load::{BatonTarget, Observed, Planned, Prompt, Prompts, Target};
use baton_node_runtime::Supervisor;
use baton_planner::profile::{Grid, HandoverPath};
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::{ClusterStatusRequest, DrainRequest, NodeRole, NodeStatus, SetRoleRequest};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tonic::transport::Channel;

/// Tokens of each probe's answer.
const OUTPUT: u32 = 12;
/// Longer prompts are not measured more than twice: they take seconds, and only their hand-over is of interest.
const LONG: u32 = 1024;
/// What the coordinator adds shows in prompts up to this length: in longer ones it drowns in the noise of computing.
const SHORT: u32 = 256;
/// How long a change of role, or an empty node's end, may take.
const ROLE_LIMIT: Duration = Duration::from_secs(60);

/// What was measured.
pub struct Live {
    pub model: String,
    pub kv_capacity_tokens: u64,
    pub queue_max: u32,
    pub handover: Vec<HandoverPath>,
    pub handover_fixed_s: f64,
    pub request_overhead_s: f64,
    pub startup_s: f64,
    pub role_change_s: f64,
    pub drain_s: f64,
    /// Gaps of the probes' decoding, and how many probes there were.
    pub probes: usize,
}

/// Prompts of the probes, and what a prompt's steps take by the tables.
pub struct Probes<'a> {
    pub lengths: Vec<u32>,
    pub repeat: usize,
    pub chunk_tokens: u32,
    pub block_tokens: u32,
    pub prefill: &'a Grid,
}

/// Starts a pair, measures it, and stops it.
pub async fn measure(options: &ClusterOptions, probes: &Probes<'_>) -> Result<Live> {
    let supervisor = Supervisor::new();
    eprintln!("baton: starting a prefill node and a decode node");
    let begun = Instant::now();
    let cluster = Cluster::start(options, &supervisor).await?;
    let startup_s = begun.elapsed().as_secs_f64();
    let live = probe(&cluster, probes, startup_s).await;
    let stopped = cluster.stop().await;
    let live = live?;
    stopped?;
    Ok(live)
}

async fn probe(cluster: &Cluster, probes: &Probes<'_>, startup_s: f64) -> Result<Live> {
    let channel = cluster.channel();
    let target = Target::Baton(BatonTarget::over(channel.clone(), cluster.doors().1, None).await?);
    let model = target.model().id.clone();
    let nodes = status(&channel).await?;
    let blocks = nodes
        .iter()
        .filter_map(|node| Some(node.load.as_ref()?.blocks.as_ref()?.total));
    let blocks = blocks.min().context("the nodes tell no block counts")?;
    let queue_max = nodes
        .iter()
        .filter_map(|node| Some(node.load.as_ref()?.queue_capacity))
        .min();
    let count = probes.lengths.len() * probes.repeat;
    eprintln!("baton: up to {count} requests one by one through the pair");
    let mut sizes: BTreeMap<String, BTreeMap<u64, Vec<f64>>> = BTreeMap::new();
    let (mut overheads, mut exposed) = (Vec::new(), Vec::new());
    for round in 0..=probes.repeat {
        for (index, length) in probes.lengths.iter().enumerate() {
            if round > 2 && *length > LONG {
                continue;
            }
            let name = (round * probes.lengths.len() + index) as u64;
            let observed = ask(&target, name, *length).await?;
            let timeline = observed.timeline.clone().unwrap_or_default();
            // The first round only warms connections and caches.
            if round == 0 {
                continue;
            }
            let ttft = observed.ttft().unwrap_or_default().as_secs_f64();
            if *length <= SHORT {
                overheads.push(ttft - prompt_seconds(probes, *length)?);
            }
            if timeline.handover_bytes_per_second > 0 {
                exposed.push(timeline.exposed_us as f64 / 1e6);
                let seconds = timeline.handover_bytes as f64 / timeline.handover_bytes_per_second as f64;
                let path = sizes.entry(timeline.handover_path).or_default();
                path.entry(timeline.handover_bytes).or_default().push(seconds);
            }
        }
    }
    let role_change_s = change_role(&channel, &nodes).await?;
    let drain_s = drain(&channel, &nodes).await?;
    Ok(Live {
        model,
        kv_capacity_tokens: u64::from(blocks) * u64::from(probes.block_tokens),
        queue_max: queue_max.unwrap_or(0).max(1),
        handover: sizes.into_iter().map(|(path, sizes)| table(path, sizes)).collect(),
        handover_fixed_s: median(exposed).max(0.0),
        request_overhead_s: median(overheads).max(0.0),
        startup_s,
        role_change_s,
        drain_s,
        probes: count,
    })
}

async fn ask(target: &Target, name: u64, length: u32) -> Result<Observed> {
    let planned = Planned {
        at: Duration::ZERO,
        prompt: Prompt::Tokens(
            Prompts {
                salt: 0x70_72_6f_66,
                ..Prompts::default()
            }
            .alone(name, length),
        ),
        output: OUTPUT,
    };
    let observed = target.clone().send(planned, tokio::time::Instant::now()).await;
    match &observed.failure {
        None => Ok(observed),
        Some(failure) => bail!("a probe of {length} tokens failed: {failure:?}"),
    }
}

/// A prompt by itself, chunk by chunk, by the table.
fn prompt_seconds(probes: &Probes<'_>, length: u32) -> Result<f64> {
    let (mut done, mut seconds) = (0, 0.0);
    while done < length {
        let chunk = probes.chunk_tokens.min(length - done);
        seconds += probes
            .prefill
            .at(f64::from(chunk), f64::from(done), ["new tokens", "context"])?;
        done += chunk;
    }
    Ok(seconds)
}

/// Medians by size, from nothing on, up to what the longest prompt would take at the largest size's speed.
fn table(path: String, sizes: BTreeMap<u64, Vec<f64>>) -> HandoverPath {
    let mut points: Vec<(f64, f64)> = vec![(0.0, 0.0)];
    points.extend(sizes.into_iter().map(|(bytes, times)| (bytes as f64, median(times))));
    HandoverPath {
        path,
        bytes: points.iter().map(|(bytes, _)| *bytes).collect(),
        seconds: points.iter().map(|(_, seconds)| *seconds).collect(),
    }
}

async fn status(channel: &Channel) -> Result<Vec<NodeStatus>> {
    let answer = AdminClient::new(channel.clone())
        .cluster_status(ClusterStatusRequest {})
        .await;
    let answer = answer.map_err(|status| anyhow!("the coordinator tells no status: {}", status.message()))?;
    Ok(answer.into_inner().nodes)
}

fn of_role(nodes: &[NodeStatus], role: NodeRole) -> Result<&NodeStatus> {
    let node = nodes.iter().find(|node| node.role == i32::from(role));
    node.with_context(|| format!("the pair has no {role:?} node"))
}

/// The idle prefill node becomes a decode node: from the order until it is ready.
async fn change_role(channel: &Channel, nodes: &[NodeStatus]) -> Result<f64> {
    let node = of_role(nodes, NodeRole::Prefill)?;
    let request = SetRoleRequest {
        node_id: node.node_id.clone(),
        role: NodeRole::Decode.into(),
        deadline_ms: None,
    };
    eprintln!("baton: changing the role of {}", node.node_id);
    let begun = Instant::now();
    let answer = AdminClient::new(channel.clone()).set_role(request).await;
    answer.map_err(|status| anyhow!("the change of role: {}", status.message()))?;
    while begun.elapsed() < ROLE_LIMIT {
        let decodes = |now: &NodeStatus| now.state == "ready" && now.role == i32::from(NodeRole::Decode);
        let changed = |now: &NodeStatus| now.node_id == node.node_id && decodes(now);
        if status(channel).await?.iter().any(changed) {
            return Ok(begun.elapsed().as_secs_f64());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bail!("{} was not ready in its new role after {ROLE_LIMIT:?}", node.node_id)
}

/// The idle node that decoded from the start leaves, where the other one decodes now: from the order until it is gone.
async fn drain(channel: &Channel, nodes: &[NodeStatus]) -> Result<f64> {
    let node = of_role(nodes, NodeRole::Decode)?;
    let request = DrainRequest {
        node_id: node.node_id.clone(),
        deadline_ms: None,
    };
    eprintln!("baton: draining {}", node.node_id);
    let begun = Instant::now();
    let answer = AdminClient::new(channel.clone()).drain(request).await;
    answer.map_err(|status| anyhow!("the drain: {}", status.message()))?;
    while begun.elapsed() < ROLE_LIMIT {
        if status(channel).await?.iter().all(|now| now.node_id != node.node_id) {
            return Ok(begun.elapsed().as_secs_f64());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bail!("{} was still there after {ROLE_LIMIT:?}", node.node_id)
}
