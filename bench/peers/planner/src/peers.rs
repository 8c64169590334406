//! What simulating a trace costs, beside the crate `aisimulate-core`: the same requests at the same times, as many nodes of each
//! side, the same KV blocks and chunks, and the same time for every step: theirs asks our profile through its own trait.
//! Each simulation is a process of its own, by turns, so that its memory peak is its own too. The two decide differently (theirs
//! places by turns in vLLM-like schedulers), so their goodputs need not agree; what is compared is the cost.

use aisimulate_core::engine::{EngineConfig, WorkerType};
use aisimulate_core::replay::loadgen::Trace;
use aisimulate_core::replay::{
    ReplayEngineConfig, ReplayEngineFactory, ReplayRoleConfig, ReplayRuntimeInput, ReplayTopology, SlaThresholds, WorkerPoolSpec,
};
use aisimulate_core::{ReplaySpec, Replayer, TimingModel};
use anyhow::{Context, Result, ensure};
use baton_planner::profile::{DecodeRow, Neighbour, NodeModel, Profile, estimate, gpu, model};
use baton_planner::sim::{SimOptions, simulate};
use baton_planner::slo::{Metric, Slo};
use baton_planner::workload::read;
use clap::{Parser, ValueEnum};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

/// Tokens of one block of Mooncake's traces.
const TRACE_BLOCK_TOKENS: usize = 512;
/// As a decode node's `--running` has it.
const RUNNING_MAX: usize = 256;
const SLO: &str = "ttft_p90=5s,itl_p99=50ms";

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Side {
    Baton,
    Peer,
}

/// Simulates a trace with both by turns, and tells the medians.
#[derive(Parser)]
struct Arguments {
    /// Mooncake's JSON lines
    trace: PathBuf,
    #[arg(long, default_value_t = 4)]
    prefill: usize,
    #[arg(long, default_value_t = 4)]
    decode: usize,
    /// Turns; the median of them is told
    #[arg(long, default_value_t = 7)]
    turns: usize,
    #[arg(long, default_value = "h100")]
    gpu: String,
    #[arg(long, default_value = "llama-3.1-8b")]
    model: String,
    /// One simulation by one of the two, told as JSON
    #[arg(long, hide = true)]
    only: Option<Side>,
}

/// One simulation.
#[derive(Debug, Serialize, Deserialize)]
struct Run {
    /// CPU seconds of simulating, and of the whole process with reading the trace.
    simulate_s: f64,
    process_s: f64,
    memory_mb: f64,
    served: usize,
    output_tokens: u64,
    ttft_p50_s: f64,
    itl_p50_s: f64,
}

/// Of all threads of this process.
fn cpu_s() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn memory_peak_mb() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status").context("the memory peak")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kb = line.and_then(|line| line.split_whitespace().nth(1)).context("VmHWM")?;
    Ok(kb.parse::<f64>()? / 1e3)
}

fn ours(arguments: &Arguments, node: &Arc<NodeModel>) -> Result<Run> {
    let workload = read(&arguments.trace)?;
    let slo: Slo = SLO.parse()?;
    let began = cpu_s();
    let options = SimOptions::new(node, arguments.prefill, arguments.decode, slo);
    let outcome = simulate(&workload, &options)?;
    let simulate_s = cpu_s() - began;
    let p50 = |metric| outcome.percentile(metric, 0.5).map_or(f64::NAN, |time| time.seconds());
    Ok(Run {
        simulate_s,
        process_s: cpu_s(),
        memory_mb: memory_peak_mb()?,
        served: outcome.served(),
        output_tokens: outcome.requests.iter().map(|request| u64::from(request.tokens)).sum(),
        ttft_p50_s: p50(Metric::Ttft),
        itl_p50_s: p50(Metric::Itl),
    })
}

/// Our profile, asked by their scheduler. It gives means over a batch, as its trait has them. Decode steps are asked for often: what
/// does not change between them is made ready, as it is in ours.
struct Steps {
    node: Arc<NodeModel>,
    /// By batch, from 1 on.
    decode: Vec<DecodeRow>,
}

impl Steps {
    fn new(node: &Arc<NodeModel>) -> Result<Self> {
        let decode = (1..=RUNNING_MAX as u32).map(|batch| node.decode_row(batch, Neighbour::Idle));
        Ok(Self {
            node: Arc::clone(node),
            decode: decode.collect::<Result<_, _>>()?,
        })
    }
}

impl TimingModel for Steps {
    fn prefill_batch_validation_can_fail(&self) -> bool {
        false
    }

    // So that it makes no checkpoint for a failure.
    fn prefill_prediction_can_fail(&self) -> bool {
        false
    }

    fn predict_prefill_ms(&self, batch_size: usize, mean_isl: usize, mean_prefix: usize) -> Result<f64> {
        // Means are rounded: a step of no more than a chunk may seem to be a few tokens longer.
        let (each, chunk) = (mean_isl.saturating_sub(mean_prefix), self.node.chunk_tokens as usize);
        let mut parts = vec![(each as u32, mean_prefix as u32); batch_size];
        parts[0].0 -= (each * batch_size).saturating_sub(chunk).min(each - 1) as u32;
        Ok(self.node.prefill_step(&parts, Neighbour::Idle)? * 1e3)
    }

    fn predict_decode_ms(&self, batch_size: usize, active_kv_tokens: usize, _: usize, _: usize) -> Result<f64> {
        let row = batch_size.checked_sub(1).and_then(|index| self.decode.get(index));
        let row = row.with_context(|| format!("a batch of {batch_size}"))?;
        Ok(row.seconds(active_kv_tokens as u64, 1)? * 1e3)
    }
}

fn role(profile: &Profile, node: &NodeModel, worker_type: WorkerType) -> ReplayRoleConfig {
    let push = &profile.handover[0];
    let (bytes, seconds) = (push.bytes[1] - push.bytes[0], push.seconds[1] - push.seconds[0]);
    let rank = EngineConfig {
        num_gpu_blocks: node.blocks as usize,
        block_size: node.block_tokens as usize,
        max_num_seqs: RUNNING_MAX,
        max_num_batched_tokens: node.chunk_tokens as usize,
        worker_type,
        kv_transfer_bytes_per_token: Some(profile.model.kv_bytes_per_token as usize),
        kv_transfer_bandwidth: Some(bytes / seconds / 1e9),
        ..EngineConfig::default()
    };
    ReplayRoleConfig {
        rank,
        ..ReplayRoleConfig::default()
    }
}

fn peer(arguments: &Arguments, profile: &Profile, node: &Arc<NodeModel>) -> Result<Run> {
    let [prefill, decode] = [WorkerType::Prefill, WorkerType::Decode].map(|kind| role(profile, node, kind));
    let pool = |initial_workers| WorkerPoolSpec {
        initial_workers,
        ..WorkerPoolSpec::default()
    };
    let engine = ReplayEngineConfig {
        rank: decode.rank.clone(),
        prefill: Some(prefill),
        decode: Some(decode),
        ..ReplayEngineConfig::default()
    };
    let spec = ReplaySpec {
        version: 1,
        topology: ReplayTopology::Disaggregated {
            prefill: pool(arguments.prefill),
            decode: pool(arguments.decode),
            handoff_latency_ms: 0.0,
        },
        engine: serde_json::to_value(engine)?,
        adapters: Default::default(),
        max_sim_time_ms: None,
        max_in_flight: None,
        record_per_request: true,
        sla: SlaThresholds {
            ttft_ms: Some(5000.0),
            itl_ms: Some(50.0),
            e2e_ms: None,
        },
        requests: Vec::new(),
    };
    let trace = Trace::from_mooncake(&arguments.trace, TRACE_BLOCK_TOKENS)?;
    let began = cpu_s();
    let driver = trace.into_trace_driver_with_block_size(node.block_tokens as usize)?;
    let factory = ReplayEngineFactory::with_timing_model(Arc::new(Steps::new(node)?));
    let replayer = Replayer::new(spec, factory)?.with_runtime_input(ReplayRuntimeInput::Workload(driver));
    let report = replayer.run()?;
    let simulate_s = cpu_s() - began;
    let text = serde_json::to_value(&report)?;
    let figure = |name: &str| text.get(name).and_then(serde_json::Value::as_f64).unwrap_or(f64::NAN);
    Ok(Run {
        simulate_s,
        process_s: cpu_s(),
        memory_mb: memory_peak_mb()?,
        served: report.request_counts.completed_requests,
        output_tokens: report.request_counts.total_output_tokens as u64,
        ttft_p50_s: figure("median_ttft_ms") / 1e3,
        itl_p50_s: figure("median_itl_ms") / 1e3,
    })
}

/// In a process of its own.
fn apart(side: Side) -> Result<Run> {
    let name = side.to_possible_value().context("a side has a name")?;
    let output = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .args(["--only", name.get_name()])
        .output()?;
    ensure!(
        output.status.success(),
        "{side:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn median(runs: &[Run], of: fn(&Run) -> f64) -> f64 {
    let mut values: Vec<f64> = runs.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let profile = estimate(gpu(&arguments.gpu)?, model(&arguments.model)?)?;
    let node = Arc::new(NodeModel::new(&profile));
    if let Some(side) = arguments.only {
        let run = match side {
            Side::Baton => ours(&arguments, &node)?,
            Side::Peer => peer(&arguments, &profile, &node)?,
        };
        println!("{}", serde_json::to_string(&run)?);
        return Ok(());
    }
    ensure!(arguments.turns > 0, "--turns must be at least 1");
    let sides = [Side::Baton, Side::Peer];
    let mut runs: [Vec<Run>; 2] = Default::default();
    for turn in 0..arguments.turns {
        for (side, runs) in sides.iter().zip(&mut runs) {
            runs.push(apart(*side)?);
        }
        eprintln!("turn {} of {}", turn + 1, arguments.turns);
    }
    for (name, runs) in ["baton", "aisimulate-core 0.13.0"].iter().zip(&runs) {
        println!(
            "{name:<22} simulating {:.3} CPU s, whole process {:.3} CPU s, memory peak {:.0} MB; {} requests and {} tokens served, \
             TTFT p50 {:.2} s, ITL p50 {:.1} ms",
            median(runs, |run| run.simulate_s),
            median(runs, |run| run.process_s),
            median(runs, |run| run.memory_mb),
            runs[0].served,
            runs[0].output_tokens,
            runs[0].ttft_p50_s,
            runs[0].itl_p50_s * 1e3
        );
    }
    let ratio = |of: fn(&Run) -> f64| median(&runs[1], of) / median(&runs[0], of);
    println!(
        "medians of {} turns: {:.1} times fewer CPU seconds simulating, {:.1} times in the whole process, {:.1} times less memory",
        arguments.turns,
        ratio(|run| run.simulate_s),
        ratio(|run| run.process_s),
        ratio(|run| run.memory_mb)
    );
    Ok(())
}
