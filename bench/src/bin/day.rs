//! A day whose mix of requests shifts, on a simulated fleet: the controller against every fixed division of as many nodes.

use anyhow::{Context, Result, bail};
use baton_planner::control::{Advice, Change, ControlOptions, Controller, Directed};
use baton_planner::profile::{NodeModel, estimate, gpu, model};
use baton_planner::search::{Answer, Given, NodeClass, Prices, Question, plan};
use baton_planner::sim::{Looked, Order, Outcome, SimOptions, simulate, simulate_directed};
use baton_planner::slo::Slo;
use baton_planner::workload::{Workload, read};
use baton_planner::{Nanos, Policy};
use baton_scheduling::Side;
use clap::{Parser, ValueEnum};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Simulates a day in two halves and compares the controller with fixed ratios.
#[derive(Parser)]
struct Arguments {
    /// The first half: Mooncake's JSON lines, or Azure's CSV
    morning: PathBuf,
    /// The second half
    evening: PathBuf,
    /// Which requests of each trace: the controller was tuned on first halves alone
    #[arg(long, value_enum, default_value = "second")]
    part: Part,
    /// Nodes in all
    #[arg(long, default_value_t = 8)]
    nodes: usize,
    #[arg(long, default_value = "l40s")]
    gpu: String,
    #[arg(long, default_value = "llama-3.1-8b")]
    model: String,
    #[arg(long, default_value = "ttft_p90=10s,tpot_p90=60ms")]
    slo: Slo,
    /// Each half at so much of the highest rate at which its own best division keeps the SLO
    #[arg(long, default_value_t = 0.7)]
    load: f64,
    /// Hours that each half lasts, about: its trace over and over, with blocks of its own each time
    #[arg(long, default_value_t = 1.0)]
    hours: f64,
    /// Seconds around noon in which one half fades into the other
    #[arg(long, default_value_t = 600.0)]
    fade: f64,
    /// Price of a node, per hour
    #[arg(long, default_value_t = 2.5)]
    price: f64,
    /// Seconds of requests that the controller looks back on [default: the controller's]
    #[arg(long)]
    window: Option<f64>,
    /// Seconds between two of its looks
    #[arg(long, default_value_t = 30.0)]
    every: f64,
    /// Seconds between two of its changes, at least [default: the controller's]
    #[arg(long)]
    cooldown: Option<f64>,
    /// Share of requests that a change must bring [default: the controller's]
    #[arg(long)]
    margin: Option<f64>,
    /// Prefill nodes that the controller begins with, one run for each [default: those of the best fixed division]
    #[arg(long, value_delimiter = ',')]
    start: Vec<usize>,
    /// Shows each look that came to a rehearsal
    #[arg(long)]
    looks: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Part {
    First,
    Second,
    All,
}

struct Fleet {
    node: Arc<NodeModel>,
    slo: Slo,
    nodes: usize,
    price: f64,
}

struct Day {
    requests: Workload,
    noon: Nanos,
}

impl Day {
    /// Requests that missed the SLO before noon, and after it.
    fn missed(&self, outcome: &Outcome) -> [usize; 2] {
        let missed = outcome.requests.iter().filter(|r| !r.good);
        let morning = missed.clone().filter(|r| r.at < self.noon).count();
        [morning, missed.count() - morning]
    }
}

impl Fleet {
    /// One half of the day: the trace at its share of what this fleet can carry, several times.
    fn half(&self, path: &Path, arguments: &Arguments) -> Result<Workload> {
        let mut trace = read(path)?;
        trace.spread_ticks(1);
        match arguments.part {
            Part::First => trace.first(trace.len() / 2),
            Part::Second => trace.skip(trace.len() / 2),
            Part::All => {}
        }
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
        let lasts = trace.duration().seconds();
        let times = (arguments.hours * 3600.0 / lasts).round().max(1.0) as usize;
        println!(
            "{}: {} requests; best alone is {}P+{}D with {:.2} requests/s; here at {:.2}/s, {times} times {lasts:.0} s",
            path.file_name().unwrap_or_default().to_string_lossy(),
            trace.len(),
            best.split.prefill(),
            best.split.decode(),
            best.rate,
            trace.rate(),
        );
        let mut half = trace.clone();
        for _ in 1..times {
            half = half.then(Nanos::from_seconds(1.0), &trace).context("block sizes")?;
        }
        Ok(half)
    }

    fn day(&self, arguments: &Arguments) -> Result<Day> {
        let morning = self.half(&arguments.morning, arguments)?;
        let evening = self.half(&arguments.evening, arguments)?;
        let fade = Nanos::from_seconds(arguments.fade);
        let noon = morning.duration().saturating_sub(Nanos(fade.0 / 2));
        let requests = morning.fades_into(&evening, fade, 1).context("block sizes")?;
        println!(
            "the day: {} requests in {:.1} h, noon at {:.0} s, {} nodes of {} with {}, SLO {}\n",
            requests.len(),
            requests.duration().seconds() / 3600.0,
            noon.seconds(),
            self.nodes,
            arguments.gpu,
            arguments.model,
            self.slo
        );
        Ok(Day { requests, noon })
    }

    fn options(&self, prefill: usize) -> SimOptions {
        SimOptions::new(&self.node, prefill, self.nodes - prefill, self.slo.clone())
    }

    fn name(&self, prefill: usize) -> String {
        format!("{prefill}P+{}D", self.nodes - prefill)
    }

    fn tell(&self, name: &str, outcome: &Outcome, day: &Day) {
        let dollars = outcome.node_hours() * self.price;
        let [morning, evening] = day.missed(outcome);
        let all = morning + evening;
        println!(
            "| {name} | {morning} | {evening} | {all} | {dollars:.2} | {:.2} | {:.2}% |",
            all as f64 / dollars,
            outcome.good_share() * 100.0
        );
    }

    /// All fixed divisions, and one that knows: each half's best one, changed at noon. Gives the best fixed one.
    fn fixed(&self, day: &Day, drain: Nanos) -> Result<usize> {
        let mut missed: Vec<(usize, [usize; 2])> = Vec::new();
        for prefill in 1..self.nodes {
            let outcome = simulate(&day.requests, &self.options(prefill))?;
            self.tell(&self.name(prefill), &outcome, day);
            missed.push((prefill, day.missed(&outcome)));
        }
        let best = |of: fn(&[usize; 2]) -> usize| {
            let best = missed.iter().min_by_key(|(_, missed)| of(missed));
            best.map(|(prefill, _)| *prefill).context("a fleet of one node")
        };
        let (morning, evening) = (best(|missed| missed[0])?, best(|missed| missed[1])?);
        let mut knows = self.options(morning);
        knows.drain = drain;
        let (nodes, side) = if morning > evening {
            (evening..morning, Side::Decode)
        } else {
            (morning..evening, Side::Prefill)
        };
        knows.orders = nodes.map(|node| (day.noon, Order::Role { node, side })).collect();
        let name = format!("{}, from noon on {}", self.name(morning), self.name(evening));
        self.tell(&name, &simulate(&day.requests, &knows)?, day);
        best(|missed| missed[0] + missed[1])
    }

    fn controlled(&self, day: &Day, start: usize, options: ControlOptions, arguments: &Arguments) -> Result<Directed> {
        let mut cluster = self.options(start);
        cluster.drain = options.drain;
        let mut directed = Directed::new(Controller::new(options));
        let every = Nanos::from_seconds(arguments.every);
        let mut look = |looked: &Looked<'_>| {
            let orders = directed.look(looked);
            if let Some(advice) = directed.last.as_ref().filter(|_| arguments.looks) {
                show(looked.now, advice);
            }
            orders
        };
        let outcome = simulate_directed(&day.requests, &cluster, every, &mut look)?;
        self.tell(&format!("controller, from {}", self.name(start)), &outcome, day);
        Ok(directed)
    }
}

fn show(now: Nanos, advice: &Advice) {
    let Some(first) = advice.rehearsed.first() else { return };
    let hold = advice.hold.as_ref().map_or("done".to_owned(), ToString::to_string);
    println!(
        "{:>7.0} s: {:.1}% within the SLO, {:.1}% in the rehearsal: {hold}",
        now.seconds(),
        advice.signals.good * 100.0,
        first.without * 100.0
    );
    for tried in &advice.rehearsed {
        let [first, second] = tried.halves.map(|gain| gain * 100.0);
        println!(
            "           {}: {:+.1}% ({first:+.1}% and {second:+.1}%), better: {}",
            tried.change,
            tried.gain() * 100.0,
            tried.better.words()
        );
    }
}

/// The changes of one run, and how near they came to each other.
fn summary(start: usize, directed: &Directed) {
    let mut prefill = start;
    let mut changes = Vec::new();
    for (at, change) in &directed.changes {
        match change {
            Change::Role {
                to: Side::Prefill,
                nodes,
            } => prefill += nodes,
            Change::Role {
                to: Side::Decode,
                nodes,
            } => prefill -= nodes,
            Change::Add { .. } | Change::Remove { .. } => {}
        }
        changes.push(format!("{:.0} s to {prefill}P", at.seconds()));
    }
    let gaps = directed
        .changes
        .windows(2)
        .map(|pair| (pair[1].0 - pair[0].0).seconds());
    let closest = gaps.reduce(f64::min).map_or(String::new(), |gap| {
        format!(
            "; closest two {gap:.0} s apart, cooldown {:.0} s",
            directed.controller.options().cooldown.seconds()
        )
    });
    println!(
        "from {start}P: {} changes in {} rehearsals{}{}{closest}",
        changes.len(),
        directed.rehearsals,
        if changes.is_empty() { "" } else { ": " },
        changes.join(", "),
    );
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
    let mut options = ControlOptions::new(fleet.slo.clone(), Some(Arc::clone(&fleet.node)));
    let given = |value: Option<f64>, default: Nanos| value.map_or(default, Nanos::from_seconds);
    options.window = given(arguments.window, options.window);
    options.cooldown = given(arguments.cooldown, options.cooldown);
    options.margin = arguments.margin.unwrap_or(options.margin);
    let day = fleet.day(&arguments)?;
    println!("| | missed in the morning | in the evening | missed | dollars | missed per dollar | within the SLO |");
    println!("|---|---|---|---|---|---|---|");
    let best = fleet.fixed(&day, options.drain)?;
    let starts = if arguments.start.is_empty() {
        vec![best]
    } else {
        arguments.start.clone()
    };
    let mut runs = Vec::new();
    for start in starts {
        let directed = fleet.controlled(&day, start, options.clone(), &arguments)?;
        runs.push((start, directed));
    }
    println!();
    runs.iter().for_each(|(start, directed)| summary(*start, directed));
    Ok(())
}
