//! What only a pair of live nodes shows: hand-overs, what the coordinator and the network add, KV capacity, start and change of role,
//! and how much longer the steps of nodes take than those of an engine by itself: nodes send, receive and answer meanwhile. Requests
//! go one by one, so nothing queues; then once more while the prefill node computes other prompts all the time; then two at once, one to
//! each node, with pauses. It is means that count: a queue waits for the slow steps too.

use super::tables::median;
use crate::cluster::{Cluster, ClusterOptions};
use anyhow::{Context, Result, anyhow, bail, ensure};
use baton_load::{BatonTarget, Observed, Planned, Prompt, Prompts, Target};
use baton_node_runtime::Supervisor;
use baton_planner::profile::{Grid, HandoverPath, HandoverTail};
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::{ClusterStatusRequest, DrainRequest, NodeRole, NodeStatus, SetRoleRequest};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tonic::transport::Channel;

/// Tokens of each probe's answer.
const OUTPUT: u32 = 12;
/// Probes beside a busy prefill node, for each time that a point is measured: enough of them to tell the tail of hand-overs.
const BUSY_PROBES: usize = 40;
/// What keeps the prefill node busy.
const BUSY_PROMPT: u32 = 1024;
/// Pairs of prompts at once, for each time that a point is measured.
const PAIRS: usize = 12;
/// Before each pair: nodes under load have pauses too, and CPUs that begin together can be slower than ones that go on.
const PAUSES_MS: [u64; 5] = [300, 900, 100, 1500, 600];
/// Even parts of the hand-overs, by what they add to the first gap.
const TAIL_PARTS: usize = 20;
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
    pub handover_tail: HandoverTail,
    pub slower: Slower,
    pub request_overhead_s: f64,
    pub startup_s: f64,
    pub role_change_s: f64,
    pub drain_s: f64,
    /// Gaps of the probes' decoding, and how many probes there were.
    pub probes: usize,
}

/// Prompts of the probes, and what steps take by the tables.
pub struct Probes<'a> {
    pub lengths: Vec<u32>,
    pub repeat: usize,
    pub chunk_tokens: u32,
    pub block_tokens: u32,
    pub prefill: &'a Grid,
    pub decode: &'a Grid,
    /// Prompts, and decoding, beside a node that prefills, where that was measured.
    pub prefill_beside: Option<&'a Grid>,
    pub decode_beside: Option<&'a Grid>,
}

/// How many times as long as by the tables the steps of live nodes take.
#[derive(Debug, Clone, Copy)]
pub struct Slower {
    /// The first chunk of a prompt.
    pub first_chunk: f64,
    /// Chunks behind others: live, those were computed just before.
    pub later_chunks: f64,
    pub decode: f64,
    /// Decoding while the prefill node computes.
    pub decode_beside: f64,
    /// Prompts while the other node computes one as well.
    pub prompts_beside: f64,
}

/// What the probes said.
#[derive(Default)]
struct Said {
    sizes: BTreeMap<String, BTreeMap<u64, Vec<f64>>>,
    overheads: Vec<f64>,
    /// Bytes of the prompt's KV, and what the hand-over added to the first gap.
    tails: Vec<(f64, f64)>,
    /// By length: the seconds that prompts took.
    prefill: BTreeMap<u32, Vec<f64>>,
    /// Seconds of a step by the table, and those that it took.
    decode: Vec<(f64, f64)>,
}

impl Said {
    fn add(&mut self, decode: &Grid, length: u32, observed: &Observed) -> Result<()> {
        let timeline = observed.timeline.clone().unwrap_or_default();
        let seconds = |us: u64| us as f64 / 1e6;
        let computing = seconds(timeline.prefill_us);
        if length <= SHORT {
            let ttft = observed.ttft().unwrap_or_default().as_secs_f64();
            self.overheads.push(ttft - computing);
        }
        self.prefill.entry(length).or_default().push(computing);
        // The first token is the prefill node's, the second one comes by itself: from then on it is only steps.
        let [first, second, later @ .., last] = &observed.frames[..] else {
            return Ok(());
        };
        let count = later.iter().map(|frame| frame.tokens).sum::<u32>() + last.tokens;
        let step = last.at.saturating_sub(second.at).as_secs_f64() / f64::from(count);
        let by_table = decode.at(1.0, f64::from(length + OUTPUT / 2), ["batch", "context"])?;
        self.decode.push((by_table, step));
        if timeline.handover_bytes_per_second > 0 {
            let gap = second.at.saturating_sub(first.at).as_secs_f64();
            let tail = gap - step * f64::from(second.tokens);
            self.tails.push((timeline.handover_bytes as f64, tail));
            let took = timeline.handover_bytes as f64 / timeline.handover_bytes_per_second as f64;
            let path = self.sizes.entry(timeline.handover_path).or_default();
            path.entry(timeline.handover_bytes).or_default().push(took);
        }
        Ok(())
    }
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
    let mut alone = Said::default();
    for round in 0..=probes.repeat {
        for (index, length) in probes.lengths.iter().enumerate() {
            if round > 2 && *length > LONG {
                continue;
            }
            let name = (round * probes.lengths.len() + index) as u64;
            let observed = ask(&target, name, *length, OUTPUT).await?;
            // The first round only warms connections and caches.
            if round > 0 {
                alone.add(probes.decode, *length, &observed)?;
            }
        }
    }
    let busy = beside_prompts(&target, probes).await?;
    let role_change_s = change_role(&channel, &nodes).await?;
    // Both decode now, so each computes its own prompts.
    let at_once = two_at_once(&target, probes).await?;
    let (first_chunk, later_chunks) = chunks(probes, alone.prefill)?;
    let drain_s = drain(&channel, &nodes).await?;
    Ok(Live {
        model,
        kv_capacity_tokens: u64::from(blocks) * u64::from(probes.block_tokens),
        queue_max: queue_max.unwrap_or(0).max(1),
        slower: Slower {
            first_chunk,
            later_chunks,
            decode: all_in_all(&alone.decode),
            decode_beside: all_in_all(&busy.decode),
            prompts_beside: all_in_all(&at_once),
        },
        handover: alone
            .sizes
            .into_iter()
            .map(|(path, sizes)| table(path, sizes))
            .collect(),
        handover_tail: handover_tail(&alone.tails, &busy.tails),
        request_overhead_s: median(alone.overheads).max(0.0),
        startup_s,
        role_change_s,
        drain_s,
        probes: count,
    })
}

/// Short prompts one by one, while the prefill node has long ones without end.
async fn beside_prompts(target: &Target, probes: &Probes<'_>) -> Result<Said> {
    let count = BUSY_PROBES * probes.repeat;
    eprintln!("baton: {count} requests one by one, while the prefill node computes other prompts");
    let lengths: Vec<u32> = probes.lengths.iter().copied().filter(|l| *l <= SHORT).collect();
    let busy_prompt = BUSY_PROMPT.min(*probes.lengths.last().context("no length of a prompt can be measured")?);
    let keeps_busy = async {
        for name in 2_000_000.. {
            ask(target, name, busy_prompt, 1).await?;
        }
        Ok(())
    };
    let asks = async {
        let mut said = Said::default();
        for (index, length) in lengths.iter().cycle().take(count).enumerate() {
            let observed = ask(target, 1_000_000 + index as u64, *length, OUTPUT).await?;
            said.add(probes.decode_beside.unwrap_or(probes.decode), *length, &observed)?;
        }
        Ok(said)
    };
    tokio::select! {
        ended = keeps_busy => ended.and_then(|()| bail!("the prompts that keep the prefill node busy ended")),
        said = asks => said,
    }
}

/// Prompts two by two, each on a node of its own: seconds by the table, and those that they took.
async fn two_at_once(target: &Target, probes: &Probes<'_>) -> Result<Vec<(f64, f64)>> {
    let count = PAIRS * probes.repeat;
    eprintln!("baton: {count} times two prompts at once, one to each node");
    let table = probes.prefill_beside.unwrap_or(probes.prefill);
    let lengths: Vec<u32> = probes.lengths.iter().copied().filter(|l| *l <= LONG).collect();
    // Short ones end before it shows.
    let lengths = &lengths[lengths.len().saturating_sub(2)..];
    let mut times = Vec::new();
    for pair in 0..count {
        tokio::time::sleep(Duration::from_millis(PAUSES_MS[pair % PAUSES_MS.len()])).await;
        let length = lengths[pair % lengths.len()];
        let name = 3_000_000 + 2 * pair as u64;
        let (one, other) = tokio::try_join!(ask(target, name, length, 1), ask(target, name + 1, length, 1))?;
        let timelines = [one.timeline.unwrap_or_default(), other.timeline.unwrap_or_default()];
        if timelines[0].decode_node == timelines[1].decode_node {
            continue;
        }
        let by_table = prompt_seconds(table, probes.chunk_tokens, length)?;
        times.extend(timelines.map(|timeline| (by_table, timeline.prefill_us as f64 / 1e6)));
    }
    ensure!(
        !times.is_empty(),
        "two prompts at once always went to one node: nothing tells how long they take on two"
    );
    Ok(times)
}

/// How many times as long as by the tables they take, all in all: time queues up, not steps.
fn all_in_all(times: &[(f64, f64)]) -> f64 {
    let (by_table, took) = times
        .iter()
        .fold((0.0, 0.0), |sum, (by_table, took)| (sum.0 + by_table, sum.1 + took));
    took / by_table
}

/// How many times as long as by the table first chunks take, and later ones: all lengths together, each at its mean.
fn chunks(probes: &Probes<'_>, lengths: BTreeMap<u32, Vec<f64>>) -> Result<(f64, f64)> {
    let (mut short, mut long) = (Vec::new(), Vec::new());
    for (length, times) in lengths {
        let first = prompt_seconds(probes.prefill, probes.chunk_tokens, length.min(probes.chunk_tokens))?;
        let later = prompt_seconds(probes.prefill, probes.chunk_tokens, length)? - first;
        let kind = if later > 0.0 { &mut long } else { &mut short };
        kind.push((first, later, times.iter().sum::<f64>() / times.len() as f64));
    }
    let (first, later, took) = sums(&long);
    // Where no prompt has one chunk, or none has two, nothing tells the two kinds apart.
    let first_chunk = match sums(&short) {
        (by_table, _, took) if by_table > 0.0 => took / by_table,
        _ => took / (first + later),
    };
    let left = (took - first_chunk * first) / later;
    Ok((first_chunk, if left > 0.0 { left } else { first_chunk }))
}

fn sums(parts: &[(f64, f64, f64)]) -> (f64, f64, f64) {
    let add = |sum: (f64, f64, f64), part: &(f64, f64, f64)| (sum.0 + part.0, sum.1 + part.1, sum.2 + part.2);
    parts.iter().fold((0.0, 0.0, 0.0), add)
}

/// Prompts of all sizes tell what a byte adds, and each list what comes on top of that.
fn handover_tail(idle: &[(f64, f64)], busy: &[(f64, f64)]) -> HandoverTail {
    let seconds_per_byte = slope(idle).max(0.0);
    let on_top = |tails: &[(f64, f64)]| {
        let each = tails.iter().map(|(bytes, seconds)| seconds - bytes * seconds_per_byte);
        parts(each.collect())
    };
    HandoverTail {
        idle: on_top(idle),
        busy: on_top(busy),
        seconds_per_byte,
    }
}

/// Of the lines through each two points (Theil and Sen): single late ones do not tilt it.
fn slope(points: &[(f64, f64)]) -> f64 {
    let pairs = points.iter().enumerate().flat_map(|(index, a)| {
        let later = points[index + 1..].iter().filter(|b| b.0 != a.0);
        later.map(|b| (b.1 - a.1) / (b.0 - a.0))
    });
    median(pairs.collect())
}

/// The middles of even parts of what was measured, rising.
fn parts(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    let middle = |part: usize| values.get(values.len() * (2 * part + 1) / (2 * TAIL_PARTS));
    (0..TAIL_PARTS).filter_map(middle).map(|value| value.max(0.0)).collect()
}

/// One request by itself, whose prompt is nobody else's.
pub async fn ask(target: &Target, name: u64, length: u32, output: u32) -> Result<Observed> {
    let planned = Planned {
        at: Duration::ZERO,
        prompt: Prompt::Tokens(
            Prompts {
                salt: 0x70_72_6f_66,
                ..Prompts::default()
            }
            .alone(name, length),
        ),
        output,
    };
    let observed = target.clone().send(planned, tokio::time::Instant::now()).await;
    match &observed.failure {
        None => Ok(observed),
        Some(failure) => bail!("a probe of {length} tokens failed: {failure:?}"),
    }
}

/// A prompt by itself, chunk by chunk, by the table.
pub fn prompt_seconds(prefill: &Grid, chunk_tokens: u32, length: u32) -> Result<f64> {
    let (mut done, mut seconds) = (0, 0.0);
    while done < length {
        let chunk = chunk_tokens.min(length - done);
        seconds += prefill.at(f64::from(chunk), f64::from(done), ["new tokens", "context"])?;
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

#[cfg(test)]
mod tests {
    use super::{Grid, Probes, chunks};
    use std::collections::BTreeMap;

    #[test]
    fn first_chunks_and_later_ones_are_told_apart() {
        // A token takes a second, and one more behind 100 of context.
        let table = Grid::of(vec![0.0, 100.0], vec![0.0, 1000.0], |new, context| {
            new + context / 100.0
        });
        let probes = Probes {
            lengths: Vec::new(),
            repeat: 1,
            chunk_tokens: 100,
            block_tokens: 16,
            prefill: &table,
            decode: &table,
            prefill_beside: None,
            decode_beside: None,
        };
        let told = |prompts: &[(u32, f64)]| {
            let times = prompts.iter().map(|(length, took)| (*length, vec![*took; 3]));
            chunks(&probes, times.collect::<BTreeMap<_, _>>()).unwrap()
        };
        let close = |(a, b): (f64, f64), (c, d): (f64, f64)| (a - c).abs() + (b - d).abs() < 1e-9;
        // 300 tokens: 100 s for the first chunk, then 101 and 102.
        let both = told(&[(10, 11.0), (100, 110.0), (300, 110.0 + 0.9 * 203.0)]);
        assert!(close(both, (1.1, 0.9)), "{both:?}");
        let (short, long) = (told(&[(10, 11.0)]), told(&[(300, 1.2 * 303.0)]));
        assert!(
            close(short, (1.1, 1.1)) && close(long, (1.2, 1.2)),
            "{short:?} {long:?}"
        );
    }

    #[test]
    fn a_tail_is_told_by_the_middles_of_even_parts() {
        let parts = super::parts((0..100).rev().map(f64::from).collect());
        assert_eq!((parts.len(), parts[0], parts[19]), (20, 2.0, 97.0));
        assert_eq!(super::parts(vec![-1.0, 3.0])[..], [[0.0; 10], [3.0; 10]].concat()[..]);
    }

    #[test]
    fn what_a_byte_adds_is_told_apart_from_what_a_hand_over_does() {
        let idle: Vec<(f64, f64)> = (1..=40)
            .map(|size| (f64::from(size), 2.0 + f64::from(size) / 4.0))
            .collect();
        let late = [&idle[..], &[(3.0, 900.0)]].concat();
        let tail = super::handover_tail(&late, &[(4.0, 6.0)]);
        assert_eq!((tail.seconds_per_byte, tail.idle[0], tail.busy[0]), (0.25, 2.0, 5.0));
        let none = super::handover_tail(&[(1.0, 3.0), (2.0, 1.0)], &[]);
        assert_eq!(none.seconds_per_byte, 0.0, "larger ones are not faster");
    }
}
