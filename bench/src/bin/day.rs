//! A day whose mix of requests shifts, on a simulated fleet: the controller against every fixed division of as many nodes.

use anyhow::{Context, Result, bail};
use baton_planner::control::{ControlOptions, Controller, Directed};
use baton_planner::profile::{NodeModel, estimate, gpu, model};
use baton_planner::search::{Answer, Given, NodeClass, Prices, Question, plan};
use baton_planner::sim::{Outcome, SimOptions, simulate, simulate_directed};
use baton_planner::slo::Slo;
use baton_planner::workload::{Workload, read};
use baton_planner::{Nanos, Policy};
use clap::Parser;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Simulates a day in two halves and compares the controller with fixed ratios.
#[derive(Parser)]
struct Arguments {
    /// The first half: Mooncake's JSON lines, or Azure's CSV
    morning: PathBuf,
    /// The second half
    evening: PathBuf,
    /// Nodes in all
    #[arg(long, default_value_t = 8)]
    nodes: usize,
    #[arg(long, default_value = "h100")]
    gpu: String,
    #[arg(long, default_value = "llama-3.1-8b")]
    model: String,
    #[arg(long, default_value = "ttft_p90=2s,itl_p99=40ms")]
    slo: Slo,
    /// Each half at so much of the highest rate at which its own best division keeps the SLO
    #[arg(long, default_value_t = 0.7)]
    load: f64,
    /// Each half is its trace so many times, with blocks of its own each time
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Seconds around noon in which one half fades into the other
    #[arg(long, default_value_t = 1200.0)]
    fade: f64,
    /// Price of a node, per hour
    #[arg(long, default_value_t = 2.5)]
    price: f64,
    /// Seconds of requests that the controller looks back on
    #[arg(long, default_value_t = 300.0)]
    window: f64,
    /// Seconds between two of its looks
    #[arg(long, default_value_t = 15.0)]
    every: f64,
    /// Seconds between two of its changes, at least
    #[arg(long, default_value_t = 120.0)]
    cooldown: f64,
    /// Share of requests that a change must bring
    #[arg(long, default_value_t = 0.01)]
    margin: f64,
    /// Prefill nodes that the controller begins with; without it, those of the best fixed division
    #[arg(long)]
    start: Option<usize>,
}

struct Fleet {
    node: Arc<NodeModel>,
    slo: Slo,
    nodes: usize,
    price: f64,
}

impl Fleet {
    /// One half of the day: the trace at its share of what this fleet can carry, several times.
    fn half(&self, path: &Path, arguments: &Arguments) -> Result<Workload> {
        let mut trace = read(path)?;
        trace.spread_ticks(1);
        let question = Question {
            workload: trace.clone(),
            classes: vec![NodeClass::new(&self.node, Prices::both(self.price))],
            slo: self.slo.clone(),
            policy: Policy::default(),
        };
        let Answer::Feasible(best) = plan(&question, Given::Nodes(self.nodes), &|_| {})? else {
            bail!("{}: no division of {} nodes keeps the SLO", path.display(), self.nodes)
        };
        trace.at_rate(best.rate * arguments.load)?;
        println!(
            "{}: best alone is {}P+{}D with {:.2} requests/s; here at {:.2}/s, {} times {:.0} s",
            path.file_name().unwrap_or_default().to_string_lossy(),
            best.split.prefill(),
            best.split.decode(),
            best.rate,
            trace.rate(),
            arguments.repeat,
            trace.duration().seconds()
        );
        let mut half = trace.clone();
        for _ in 1..arguments.repeat {
            half = half.then(Nanos::from_seconds(1.0), &trace).context("block sizes")?;
        }
        Ok(half)
    }

    fn options(&self, prefill: usize) -> SimOptions {
        SimOptions::new(&self.node, prefill, self.nodes - prefill, self.slo.clone())
    }

    fn tell(&self, name: &str, outcome: &Outcome, noon: Nanos) {
        let missed = |from: Nanos, until: Nanos| {
            let here = outcome.requests.iter().filter(|r| r.at >= from && r.at < until);
            here.filter(|r| !r.good).count()
        };
        let dollars = outcome.node_hours() * self.price;
        let all = missed(Nanos::ZERO, Nanos(u64::MAX));
        println!(
            "| {name} | {} | {} | {all} | {dollars:.2} | {:.2} | {:.2}% |",
            missed(Nanos::ZERO, noon),
            missed(noon, Nanos(u64::MAX)),
            all as f64 / dollars,
            outcome.good_share() * 100.0
        );
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let profile = estimate(gpu(&arguments.gpu)?, model(&arguments.model)?)?;
    let fleet = Fleet {
        node: Arc::new(NodeModel::new(&profile)),
        slo: arguments.slo.clone(),
        nodes: arguments.nodes,
        price: arguments.price,
    };
    let morning = fleet.half(&arguments.morning, &arguments)?;
    let evening = fleet.half(&arguments.evening, &arguments)?;
    let fade = Nanos::from_seconds(arguments.fade);
    let noon = morning.duration().saturating_sub(Nanos(fade.0 / 2));
    let day = morning.fades_into(&evening, fade, 1).context("block sizes")?;
    println!(
        "the day: {} requests in {:.1} h, {} nodes of {} with {}, SLO {}\n",
        day.len(),
        day.duration().seconds() / 3600.0,
        fleet.nodes,
        arguments.gpu,
        arguments.model,
        fleet.slo
    );
    println!("| | missed in the morning | in the evening | missed | dollars | missed per dollar | within the SLO |");
    println!("|---|---|---|---|---|---|---|");
    let mut best: Option<(usize, f64)> = None;
    for prefill in 1..fleet.nodes {
        let outcome = simulate(&day, &fleet.options(prefill))?;
        fleet.tell(&format!("{prefill}P+{}D", fleet.nodes - prefill), &outcome, noon);
        if best.is_none_or(|(_, good)| outcome.good_share() > good) {
            best = Some((prefill, outcome.good_share()));
        }
    }
    let (best, _) = best.context("a fleet of one node")?;
    let start = arguments.start.unwrap_or(best);
    let mut options = ControlOptions::new(fleet.slo.clone(), Some(Arc::clone(&fleet.node)));
    options.window = Nanos::from_seconds(arguments.window);
    options.cooldown = Nanos::from_seconds(arguments.cooldown);
    options.margin = arguments.margin;
    let drain = options.drain;
    let mut directed = Directed::new(Controller::new(options));
    let clock = Instant::now();
    let every = Nanos::from_seconds(arguments.every);
    let mut cluster = fleet.options(start);
    cluster.drain = drain;
    let outcome = simulate_directed(&day, &cluster, every, &mut |looked| directed.look(looked))?;
    fleet.tell(
        &format!("controller, from {start}P+{}D", fleet.nodes - start),
        &outcome,
        noon,
    );
    println!(
        "\n{} changes in {} rehearsals, {:.1} s of computing:",
        directed.changes.len(),
        directed.rehearsals,
        clock.elapsed().as_secs_f64()
    );
    for (at, change) in &directed.changes {
        println!("  {:>7.0} s: {change}", at.seconds());
    }
    let closest = directed
        .changes
        .windows(2)
        .map(|pair| (pair[1].0 - pair[0].0).seconds());
    println!(
        "closest two: {:.0} s apart; noon is at {:.0} s",
        closest.fold(f64::INFINITY, f64::min),
        noon.seconds()
    );
    Ok(())
}
