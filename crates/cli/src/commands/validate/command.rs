//! The flags, and the order: predict, keep, replay, compare.

use super::super::signals::{INTERRUPTED, unless_interrupted};
use super::super::workload::{WorkloadOptions, parse_factor};
use super::division::Division;
use super::report;
use super::runs::Runs;
use super::stored::{Case, Measured, Predictions, SetAside, write};
use crate::models::ModelSource;
use anyhow::{Context, Result, bail, ensure};
use baton_planner::predict::{self, highest_rate};
use baton_planner::profile::Profile;
use baton_planner::slo::Slo;
use baton_planner::workload::Workload;
use std::collections::VecDeque;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

/// Replays what was predicted first, and tells how far off the prediction was.
///
/// For each division of the nodes: the highest rate that keeps the SLO is found by simulation; at shares of it all percentiles are
/// predicted, and written to predictions.json before anything runs. Then all are replayed in turns, each time on a new cluster. Errors go to
/// report.md and results.json, and into the profile, so that later plans show them. With a predictions.json that is there already
/// nothing is predicted anew.
#[derive(Debug, clap::Args)]
pub struct Validate {
    /// Profile of the nodes, by `baton profile` on this machine; gets the errors as error bars
    #[arg(long, value_name = "FILE")]
    profile: PathBuf,
    /// The model that was profiled: smollm2, a .gguf file, a folder with config.json and *.safetensors, or a Hugging Face repository
    #[arg(long, value_name = "MODEL", default_value = "smollm2")]
    model: ModelSource,
    /// Compute threads of a node, as in the profile
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    threads: u32,
    #[command(flatten)]
    workload: WorkloadOptions,
    /// Bounds on percentiles, with units, such as ttft_p90=2s,itl_p99=100ms
    #[arg(long, value_name = "METRIC_pNN=TIME,...")]
    slo: Slo,
    /// PREFILL+DECODE nodes; 0+2 is colocated; 1+1:local lets decode nodes prefill too
    #[arg(
        long,
        value_name = "DIVISION,...",
        value_delimiter = ',',
        default_value = "1+1,1+1:local,0+2"
    )]
    divisions: Vec<Division>,
    /// Shares of each division's predicted goodput
    #[arg(long, value_name = "SHARE,...", value_delimiter = ',', default_value = "0.5,0.8", value_parser = parse_factor)]
    loads: Vec<f64>,
    /// Replays of each division and load: so many rounds through all of them
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// How many replays may be repeated in all, after the last round, because the idle machine was more than 10% off its profile before
    /// or after them: what they measured is told, but not compared
    #[arg(long, value_name = "COUNT", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=100))]
    again: u32,
    /// Folder for predictions.json, results.json and report.md
    #[arg(long, value_name = "FOLDER", default_value = "validation")]
    out: PathBuf,
    /// Ends once the predictions are written
    #[arg(long)]
    predict_only: bool,
}

impl Validate {
    /// Predicts, replays, compares. Fails where a prediction was farther off than is promised.
    pub async fn run(self) -> Result<ExitCode> {
        let mut profile = Profile::read(&self.profile)?;
        let (workload, _) = self.workload.read()?;
        std::fs::create_dir_all(&self.out).with_context(|| format!("make the folder {}", self.out.display()))?;
        let predictions = self.predictions(&profile, &workload)?;
        if self.predict_only {
            return Ok(ExitCode::SUCCESS);
        }
        let runs = Runs {
            profile: &profile,
            source: self.model.clone(),
            model: self.model.resolve().await?,
            threads: self.threads as usize,
            workload: &workload,
            slo: &self.slo,
        };
        let mut measured: Vec<Measured> = predictions.cases.iter().map(Measured::none).collect();
        // In rounds: replays of a case that follow each other would meet the same minutes of the machine, and agree too well.
        let rounds = (0..self.runs).flat_map(|_| 0..predictions.cases.len());
        let mut line: VecDeque<usize> = rounds.collect();
        let mut may_repeat = self.again;
        while let Some(index) = line.pop_front() {
            let of = &mut measured[index];
            // Arrivals are the same in all runs, prompts are not.
            let salt = 1 + (index * 1000 + of.runs.len() + of.set_aside.len()) as u64;
            // Ctrl-C counts while a cluster starts, too: its nodes end with this process.
            let replayed = unless_interrupted(runs.replay(&of.case, salt)).await?.transpose()?;
            let Some((summary, machine)) = replayed.flatten() else {
                eprintln!("baton: interrupted: the replay under way does not count");
                measured.retain(|measured| !measured.runs.is_empty());
                self.conclude(&measured)?;
                return Ok(ExitCode::from(INTERRUPTED));
            };
            // Decided by the idle machine alone, whatever the replay measured.
            if may_repeat > 0 && machine.iter().any(|speed| speed.is_changed()) {
                may_repeat -= 1;
                eprintln!("baton: this replay is set aside, and repeated after the others");
                line.push_back(index);
                of.set_aside.push(SetAside { summary, machine });
            } else {
                of.runs.push(summary);
                of.machine.push(machine);
            }
            write(&self.out.join("results.json"), &measured)?;
        }
        self.conclude(&measured)?;
        profile.error_bars = report::error_bars(&measured, &predictions.workload);
        profile.write(&self.profile)?;
        eprintln!("baton: the errors are in {} now", self.profile.display());
        Ok(if report::holds(&measured) {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }

    fn conclude(&self, measured: &[Measured]) -> Result<()> {
        let text = report::markdown(measured);
        let path = self.out.join("report.md");
        std::fs::write(&path, &text).with_context(|| format!("write {}", path.display()))?;
        writeln!(std::io::stdout(), "{}", text.trim_end()).context("write the report")
    }

    /// Those that are kept, or new ones, which are kept then.
    fn predictions(&self, profile: &Profile, workload: &Workload) -> Result<Predictions> {
        let name = self.workload.trace.file_name().unwrap_or_default().to_string_lossy();
        let mut predictions = Predictions {
            profile: profile.name.clone(),
            workload: format!(
                "{} requests of {name}, lengths x{}, seed {}",
                workload.len(),
                self.workload.lengths,
                self.workload.seed
            ),
            slo: self.slo.to_string(),
            cases: Vec::new(),
        };
        let path = self.out.join("predictions.json");
        if path.exists() {
            eprintln!("baton: {} is there: nothing is predicted anew", path.display());
            return Predictions::read(&path, &predictions);
        }
        ensure!(
            !self.loads.is_empty() && !self.divisions.is_empty(),
            "there is nothing to predict"
        );
        for division in &self.divisions {
            predictions.cases.extend(self.cases(profile, workload, *division)?);
        }
        write(&path, &predictions)?;
        eprintln!("baton: predictions are in {}", path.display());
        Ok(predictions)
    }

    fn cases(&self, profile: &Profile, workload: &Workload, division: Division) -> Result<Vec<Case>> {
        let case = predict::Case {
            profile,
            split: division.split(),
            policy: division.policy(),
            slo: &self.slo,
        };
        let Some(highest) = highest_rate(&case, workload)? else {
            bail!("{division} keeps {} at no load: loosen --slo", self.slo);
        };
        eprintln!("baton: {division} is predicted to keep the SLO up to {highest:.2} requests/s");
        let at = |load: &f64| {
            let rate = highest * load;
            let mut workload = workload.clone();
            workload.at_rate(rate)?;
            let (figures, busy) = predict::expect(&case, &workload)?;
            Ok(Case {
                division,
                load: *load,
                rate,
                busy,
                figures,
            })
        };
        self.loads.iter().map(at).collect()
    }
}
