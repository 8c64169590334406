//! The flags, and what they lead to.

use super::given::{Budget, PriceList, parse_rate};
use super::{json, print};
use anyhow::{Context, Result, bail, ensure};
use baton_planner::Policy;
use baton_planner::profile::{NodeModel, Profile, estimate, gpu, model};
use baton_planner::search::{Answer, Given, Prices, Question, plan};
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
    #[arg(long, value_name = "FILE", required_unless_present = "model")]
    profile: Option<PathBuf>,
    /// Model of a built-in estimate, such as llama-3.1-8b; with --profile, the model that it must be of
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// GPU of a built-in estimate, such as h100 [default: the one that --budget names, else h100]
    #[arg(long, value_name = "NAME")]
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
        required_unless_present = "rate",
        conflicts_with = "rate"
    )]
    budget: Option<Budget>,
    /// Requests per second to serve: which nodes are the cheapest?
    #[arg(long, value_name = "PER_SECOND", value_parser = parse_rate)]
    rate: Option<f64>,
    /// What a node costs per hour, in any currency [default: nodes cost alike, and cost_per_mtok is left out]
    #[arg(long, value_name = "prefill=COST,decode=COST")]
    price: Option<PriceList>,
    /// Only the trace's first requests
    #[arg(long, value_name = "COUNT")]
    requests: Option<usize>,
    /// Prompts, answers and prefix blocks of the trace are made so many times as long
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
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
}

impl Plan {
    /// Plans and prints. Fails where the SLO cannot be kept.
    pub fn run(self) -> Result<ExitCode> {
        let profile = self.profile()?;
        let (workload, spread) = self.workload()?;
        let node = Arc::new(NodeModel::new(&profile));
        let question = Question {
            workload,
            prefill: Arc::clone(&node),
            decode: node,
            slo: self.slo.clone(),
            policy: self.routing_policy,
        };
        let given = match (&self.budget, self.rate) {
            (Some(budget), _) => Given::Nodes(budget.nodes),
            (None, Some(rate)) => Given::Rate(rate),
            (None, None) => bail!("either --budget or --rate is needed"),
        };
        let alike = Prices {
            prefill: 1.0,
            decode: 1.0,
        };
        let prices = self.price.as_ref().map(|list| list.0);
        let progress = progress();
        let answer = plan(&question, given, prices.unwrap_or(alike), &progress)?;
        let about = print::About {
            profile: &profile,
            question: &question,
            spread,
            prices,
        };
        let text = if self.json {
            json::line(&about, &answer)
        } else {
            print::text(&about, &answer)
        };
        writeln!(std::io::stdout(), "{}", text.trim_end()).context("write the plan")?;
        Ok(match answer {
            Answer::Feasible(_) => ExitCode::SUCCESS,
            Answer::Infeasible { .. } => ExitCode::FAILURE,
        })
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
