//! The flags, and what they lead to.

use super::super::signals::{INTERRUPTED, Signals};
use super::super::workload::{ArrivalOptions, WorkloadOptions, check_fits, spread_words};
use super::print;
use crate::endpoint::EndpointOptions;
use anyhow::{Context, Result};
use baton_load::{BatonTarget, Dialect, Planned, Progress, Prompts, Run, Summary, Target, TokenRange, offer};
use baton_planner::slo::Slo;
use serde_json::json;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

/// Replays a trace against a running cluster, or any OpenAI-compatible server, and measures what its clients see.
///
/// Open loop: each request is sent when it is due, and timed from then. Prompts are token ids made of the trace's block ids, so that
/// equal blocks are equal prompts; answers have the trace's lengths. A frame of n tokens after a gap of g counts as n gaps of g/n in
/// ITL; gaps between frames are told as well. Ctrl-C prints what was measured so far.
#[derive(Debug, clap::Args)]
pub struct Replay {
    #[command(flatten)]
    endpoint: EndpointOptions,
    /// Instead of a Baton cluster's gRPC: an OpenAI-compatible server, http://HOST:PORT
    #[arg(long, value_name = "URL", conflicts_with = "endpoint")]
    url: Option<String>,
    /// What such a server takes beyond OpenAI's fields: baton, vllm, llama-server or plain [default: what its list of models says]
    #[arg(long, value_name = "NAME", requires = "url")]
    dialect: Option<Dialect>,
    /// As the server names it [default: the only one that it serves]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    #[command(flatten)]
    workload: WorkloadOptions,
    #[command(flatten)]
    arrivals: ArrivalOptions,
    /// Bounds on percentiles, with units, such as ttft_p90=1s,itl_p99=50ms: goodput is told
    #[arg(long, value_name = "METRIC_pNN=TIME,...")]
    slo: Option<Slo>,
    /// Token ids that prompts are made of; the high end is excluded
    #[arg(long, value_name = "LOW..HIGH", default_value_t = TokenRange::default())]
    token_ids: TokenRange,
    /// Prints one line of JSON
    #[arg(long)]
    json: bool,
}

impl Replay {
    /// Replays and prints. Fails where no request was served.
    pub async fn run(self) -> Result<ExitCode> {
        let (mut workload, spread) = self.workload.read()?;
        self.arrivals.apply(&mut workload, self.workload.seed)?;
        let target = self.target().await?;
        let model = target.model();
        check_fits(&workload, &model.id, model.context_tokens)?;
        eprintln!(
            "baton: {} requests to {}, {:.2} per second over {:.0} s; {}",
            workload.len(),
            model.id,
            workload.rate(),
            workload.duration().seconds(),
            spread_words(spread)
        );
        let prompts = Prompts {
            range: self.token_ids,
            salt: self.workload.seed,
        };
        let schedule = prompts.schedule(&workload);
        let run = offered(&target, schedule, "replay").await?;
        let interrupted = run.unfinished + run.unsent > 0;
        let summary = Summary::of(&run, self.slo.as_ref());
        let text = if self.json {
            let mut line = serde_json::to_value(&summary).context("the summary as JSON")?;
            line["model"] = json!(target.model().id);
            line["interrupted"] = json!(interrupted);
            line.to_string()
        } else {
            print::text(&summary)
        };
        writeln!(std::io::stdout(), "{}", text.trim_end()).context("write the figures")?;
        Ok(match (interrupted, summary.served) {
            (true, _) => ExitCode::from(INTERRUPTED),
            (false, 0) => ExitCode::FAILURE,
            (false, _) => ExitCode::SUCCESS,
        })
    }

    async fn target(&self) -> Result<Target> {
        let model = self.model.as_deref();
        if let Some(url) = &self.url {
            let mut target = Target::connect(url, model).await?;
            if let (Target::OpenAi(target), Some(dialect)) = (&mut target, self.dialect) {
                target.dialect = dialect;
            }
            return Ok(target);
        }
        let (channel, address) = self.endpoint.connect().await?;
        Ok(Target::Baton(BatonTarget::over(channel, &address, model).await?))
    }
}

/// A line on standard error. Nobody may be there to read it any more: what was measured is worth more than the line.
fn tell(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Offers a schedule, with progress on standard error, until it is done or Ctrl-C comes.
pub async fn offered(target: &Target, schedule: Vec<Planned>, what: &str) -> Result<Run> {
    let mut signals = Signals::install()?;
    let stop = async {
        let name = signals.next().await;
        tell(format_args!("baton: {name}: what was measured so far counts"));
    };
    // Who reads a log needs no line for every two seconds.
    let pause = Duration::from_secs(if std::io::stderr().is_terminal() { 0 } else { 30 });
    let mut next = Duration::ZERO;
    let told = |progress: Progress| {
        if progress.elapsed < next {
            return;
        }
        next = progress.elapsed + pause;
        tell(format_args!(
            "baton: {what}, {:.0} s: {} of {} sent, {} ended, {} failed",
            progress.elapsed.as_secs_f64(),
            progress.sent,
            progress.planned,
            progress.ended,
            progress.failed
        ));
    };
    Ok(offer(target, schedule, stop, told).await)
}
