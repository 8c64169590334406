//! The flags, and what they lead to.

use super::given::{Budget, PriceList, parse_rate};
use super::{nodes, print};
use anyhow::{Context, Result, bail, ensure};
use baton_planner::Policy;
use baton_planner::profile::{NodeModel, Profile, estimate, gpu, model};
use baton_planner::report::{self, About};
use baton_planner::search::{Answer, Given, NodeClass, Prices, Question, plan};
use baton_planner::slo::Slo;
use baton_planner::workload::{Spread, Workload, read};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A plan that takes longer tells how far it is.
const PATIENCE: Duration = Duration::from_secs(2);

/// Finds how many prefill and decode nodes serve a workload best under an SLO.
///
/// The workload's requests are simulated on clusters of nodes that are as fast as their profile says, and decide as live
/// ones do. The answer is the division of the budget that keeps the SLO at the highest rate, or the cheapest nodes for a
/// rate; with confidence intervals, what limits it, and what it loses when the mix shifts.
#[derive(Debug, clap::Args)]
pub struct Plan {
    /// Profile of a node that serves the model, as JSON; instead of a built-in estimate
    #[arg(long, value_name = "FILE", required_unless_present_any = ["model", "nodes"], conflicts_with = "nodes")]
    profile: Option<PathBuf>,
    /// Model of a built-in estimate, such as llama-3.1-8b; with --profile, the model that it must be of
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// GPU of a built-in estimate, such as h100 [default: the one that --budget names, else h100]
    #[arg(long, value_name = "NAME", conflicts_with = "nodes")]
    gpu: Option<String>,
    /// Requests to plan for: Mooncake's JSON lines, or Azure's CSV
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Bounds on percentiles, with units: ttft, itl, tpot or e2e, such as ttft_p90=1s,itl_p99=50ms
    #[arg(long, value_name = "METRIC_pNN=TIME,...")]
    slo: Slo,
    /// Nodes to divide, such as 32xh100 or 32: which division keeps the SLO at the highest rate?
    #[arg(
        long,
        value_name = "COUNT[xGPU]",
        required_unless_present_any = ["rate", "nodes"],
        conflicts_with = "rate"
    )]
    budget: Option<Budget>,
    /// Requests per second to serve: which nodes are the cheapest?
    #[arg(long, value_name = "PER_SECOND", value_parser = parse_rate)]
    rate: Option<f64>,
    /// What a node costs per hour, in any currency [default: nodes cost alike, and cost_per_mtok is left out]
    #[arg(long, value_name = "prefill=COST,decode=COST", conflicts_with = "nodes")]
    price: Option<PriceList>,
    /// Kinds of nodes that differ in speed and price, as TOML: [[nodes]] with price (per hour), gpu or profile, and perhaps
    /// count, roles and name. With --rate the cheapest mix, with --budget the best of so many, alone the best use of all
    #[arg(long, value_name = "FILE")]
    nodes: Option<PathBuf>,
    /// Only the trace's first requests
    #[arg(long, value_name = "COUNT")]
    requests: Option<usize>,
    /// Prompts, answers and prefix blocks of the trace are made so many times as long: a number, or a fraction such as 1/32
    #[arg(long, value_name = "FACTOR", default_value = "1", value_parser = super::super::workload::parse_factor)]
    lengths: f64,
    /// How nodes are chosen: predicted, least-loaded, round-robin or random-two
    #[arg(long, value_name = "POLICY", default_value_t = Policy::Predicted)]
    routing_policy: Policy,
    /// Decides how requests of one tick of a coarse clock are spread over it
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Prints one line of JSON
    #[arg(long)]
    json: bool,
    /// Writes the plan as one HTML page that needs no network, besides what is printed
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

impl Plan {
    /// Plans and prints. Fails where the SLO cannot be kept.
    pub fn run(self) -> Result<ExitCode> {
        let (classes, profiles) = self.classes()?;
        let (workload, spread) = self.workload()?;
        let question = Question {
            workload,
            classes,
            slo: self.slo.clone(),
            policy: self.routing_policy,
        };
        let given = match (&self.budget, self.rate) {
            (Some(budget), _) => Given::Nodes(budget.nodes),
            (None, Some(rate)) => Given::Rate(rate),
            (None, None) => Given::All,
        };
        // A page that cannot be written is known before minutes of planning.
        let mut page = self.report.as_ref().map(|path| (path, std::fs::File::create(path)));
        if let Some((path, Err(error))) = &page {
            bail!("cannot write the report {}: {error}", path.display());
        }
        let answer = plan(&question, given, &progress())?;
        let trace = self.trace.file_name().unwrap_or_default().to_string_lossy();
        let about = About {
            profiles: &profiles,
            question: &question,
            given,
            trace: &trace,
            spread,
            priced: self.price.is_some() || self.nodes.is_some(),
        };
        if let Some((path, Ok(file))) = &mut page {
            file.write_all(report::html(&about, &answer).as_bytes())
                .with_context(|| format!("write the report {}", path.display()))?;
        }
        let text = if self.json {
            report::value(&about, &answer).to_string()
        } else {
            print::text(&about, &answer)
        };
        writeln!(std::io::stdout(), "{}", text.trim_end()).context("write the plan")?;
        Ok(match answer {
            Answer::Feasible(_) => ExitCode::SUCCESS,
            Answer::Infeasible { .. } => ExitCode::FAILURE,
        })
    }

    fn classes(&self) -> Result<(Vec<NodeClass>, Vec<Profile>)> {
        if let Some(path) = &self.nodes {
            if let Some(gpu) = self.budget.as_ref().and_then(|budget| budget.gpu.as_ref()) {
                bail!("--budget names {gpu}, but --nodes says which nodes there are: give the number alone");
            }
            return nodes::read(path, self.model.as_deref());
        }
        let profile = self.profile()?;
        let alike = Prices::both(1.0);
        let prices = self.price.as_ref().map_or(alike, |list| list.0);
        let class = NodeClass {
            name: profile.hardware.clone(),
            ..NodeClass::new(&Arc::new(NodeModel::new(&profile)), prices)
        };
        Ok((vec![class], vec![profile]))
    }

    fn profile(&self) -> Result<Profile> {
        let named = self.budget.as_ref().and_then(|budget| budget.gpu.as_deref());
        if let (Some(gpu), Some(budget)) = (self.gpu.as_deref(), named) {
            ensure!(
                gpu.eq_ignore_ascii_case(budget),
                "--gpu is {gpu}, but --budget names {budget}"
            );
        }
        let Some(path) = &self.profile else {
            let model = model(self.model.as_deref().unwrap_or_default())?;
            let gpu = gpu(self.gpu.as_deref().or(named).unwrap_or("h100"))?;
            return Ok(estimate(gpu, model)?);
        };
        let profile = Profile::read(path)?;
        if let Some(wanted) = &self.model {
            profile.check_model(wanted)?;
        }
        if let Some(gpu) = self.gpu.as_deref().or(named) {
            let hardware = &profile.hardware;
            ensure!(
                gpu.eq_ignore_ascii_case(hardware),
                "{gpu} is asked for, but the profile {} is of {hardware}",
                profile.name
            );
        }
        Ok(profile)
    }

    fn workload(&self) -> Result<(Workload, Spread)> {
        let mut workload = read(&self.trace)?;
        if let Some(requests) = self.requests {
            workload.first(requests);
        }
        let spread = workload.spread_ticks(self.seed);
        workload.longer_inputs(self.lengths)?;
        workload.longer_outputs(self.lengths)?;
        Ok((workload, spread))
    }
}

/// Tells on standard error how far a long plan is, once in a while.
fn progress() -> impl Fn(usize) + Sync {
    let (began, told) = (Instant::now(), Mutex::new(Instant::now()));
    move |simulations| {
        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.elapsed() >= PATIENCE {
            *told = Instant::now();
            eprintln!(
                "baton: planning, {simulations} simulations begun, {:.0} s",
                began.elapsed().as_secs_f64()
            );
        }
    }
}
