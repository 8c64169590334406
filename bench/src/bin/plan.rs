//! What planning costs: a trace on one cluster, and all divisions of many nodes at several rates.

use anyhow::{Context, Result};
use baton_planner::profile::{NodeModel, estimate, gpu, model};
use baton_planner::sim::{SimOptions, simulate};
use baton_planner::slo::Slo;
use baton_planner::workload::{Workload, read};
use clap::Parser;
use rustix::time::{ClockId, clock_gettime};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Simulates a trace and tells what that took.
#[derive(Parser)]
struct Arguments {
    /// Mooncake's JSON lines, or Azure's CSV
    trace: PathBuf,
    /// Nodes that are divided in every way
    #[arg(long, default_value_t = 32)]
    nodes: usize,
    /// Requests per second at which every division is simulated
    #[arg(long, value_delimiter = ',', default_values_t = [8.0, 16.0, 24.0])]
    rates: Vec<f64>,
    /// Runs of the trace on 4P+4D
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    #[arg(long, default_value = "h100")]
    gpu: String,
    #[arg(long, default_value = "llama-3.1-8b")]
    model: String,
}

/// Of all threads of this process.
fn cpu_s() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn memory_peak_mb() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status").context("the memory peak")?;
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .context("VmHWM")?;
    let kb: f64 = line.split_whitespace().nth(1).context("VmHWM")?.parse()?;
    Ok(kb / 1e3)
}

fn single(workload: &Workload, node: &Arc<NodeModel>, slo: &Slo, repeat: usize) -> Result<()> {
    for _ in 0..repeat {
        let (wall, cpu) = (Instant::now(), cpu_s());
        let outcome = simulate(workload, &SimOptions::new(node, 4, 4, slo.clone()))?;
        println!(
            "4P+4D, {} requests at {:.2}/s: {:.3} s, {:.3} CPU s, {} events, {:.2} good requests/s",
            workload.len(),
            outcome.offered(),
            wall.elapsed().as_secs_f64(),
            cpu_s() - cpu,
            outcome.events,
            outcome.goodput()
        );
    }
    println!("memory peak so far: {:.0} MB", memory_peak_mb()?);
    Ok(())
}

fn search(workload: &Workload, node: &Arc<NodeModel>, slo: &Slo, arguments: &Arguments) -> Result<()> {
    let mut loads = Vec::new();
    for rate in &arguments.rates {
        let mut load = workload.clone();
        load.at_rate(*rate)?;
        loads.push((*rate, load));
    }
    let cases: Vec<(usize, usize)> = (1..arguments.nodes)
        .flat_map(|prefill| (0..loads.len()).map(move |load| (prefill, load)))
        .collect();
    let (wall, cpu, next) = (Instant::now(), cpu_s(), AtomicUsize::new(0));
    let run = || {
        let mut done: Vec<(usize, usize, Option<f64>)> = Vec::new();
        while let Some((prefill, load)) = cases.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
            let options = SimOptions::new(node, prefill, arguments.nodes - prefill, slo.clone());
            let goodput = simulate(&loads[load].1, &options).ok().map(|outcome| outcome.goodput());
            done.push((prefill, load, goodput));
        }
        done
    };
    let done: Vec<(usize, usize, Option<f64>)> = std::thread::scope(|scope| {
        let other = scope.spawn(run);
        let mut mine = run();
        mine.extend(other.join().unwrap_or_default());
        mine
    });
    println!(
        "{} nodes, every division at {:?} requests/s: {} simulations in {:.1} s, {:.1} CPU s, 2 threads, memory peak {:.0} MB",
        arguments.nodes,
        arguments.rates,
        done.len(),
        wall.elapsed().as_secs_f64(),
        cpu_s() - cpu,
        memory_peak_mb()?
    );
    for (index, (rate, _)) in loads.iter().enumerate() {
        let here = done.iter().filter(|(_, load, _)| *load == index);
        let best = here
            .clone()
            .max_by(|a, b| a.2.unwrap_or(-1.0).total_cmp(&b.2.unwrap_or(-1.0)));
        let failed = here.filter(|(_, _, goodput)| goodput.is_none()).count();
        if let Some((prefill, _, Some(goodput))) = best {
            println!(
                "at {rate}/s: best {prefill}P+{}D, {goodput:.2} good requests/s; {failed} outside the profile",
                arguments.nodes - prefill
            );
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let profile = estimate(gpu(&arguments.gpu)?, model(&arguments.model)?)?;
    let node = Arc::new(NodeModel::new(&profile));
    let slo: Slo = "ttft_p90=5s,itl_p99=50ms".parse()?;
    let mut workload = read(&arguments.trace)?;
    workload.spread_ticks(1);
    single(&workload, &node, &slo, arguments.repeat)?;
    search(&workload, &node, &slo, &arguments)
}
