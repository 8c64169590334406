//! The flags of the controller, and what they come to.

use super::Record;
use crate::StartError;
use crate::driver::RoutingOptions;
use baton_node_runtime::{Moment, parse_duration};
use baton_planner::Nanos;
use baton_planner::control::ControlOptions;
use baton_planner::profile::{NodeModel, Profile};
use baton_planner::slo::{Metric, Slo};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// What the controller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum ControlMode {
    /// It does not run, and nothing is recorded for it.
    #[default]
    Off,
    /// It says what it would change, and changes nothing.
    Advise,
    /// It changes nodes' roles.
    Apply,
}

impl fmt::Display for ControlMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Advise => "advise",
            Self::Apply => "apply",
        })
    }
}

/// Flags of the controller.
#[derive(Debug, Clone, clap::Args)]
pub struct ControlFlags {
    /// The controller: off, advise (it says what it would change, see `baton status --advise`), or apply (it changes nodes' roles)
    #[arg(long, value_enum, value_name = "MODE", default_value_t = ControlMode::Off, help_heading = "Controller")]
    pub control: ControlMode,
    /// What clients were promised, as METRIC_pNN=TIME: such as ttft_p90=2s,itl_p99=50ms; needed unless it is off
    #[arg(long, value_name = "SLO", help_heading = "Controller")]
    pub control_slo: Option<Slo>,
    /// The nodes' profile (JSON, from `baton profile`), with which changes are rehearsed before they are advised; needed by apply
    #[arg(long, value_name = "FILE", help_heading = "Controller")]
    pub control_profile: Option<PathBuf>,
    /// The model whose nodes it looks at; needed where several are served
    #[arg(long, value_name = "NAME", help_heading = "Controller")]
    pub control_model: Option<String>,
    /// Between two looks
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "10s", help_heading = "Controller")]
    pub control_every: Duration,
    /// The last requests that it looks at
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "5m", help_heading = "Controller")]
    pub control_window: Duration,
    /// Fewer requests than this in that time say nothing
    #[arg(long, value_name = "COUNT", default_value_t = 60, help_heading = "Controller")]
    pub control_requests_min: usize,
    /// Requests that came so soon after a node became ready say nothing: it was cold
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "10s", help_heading = "Controller")]
    pub control_warm_up: Duration,
    /// From one change to the next
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "2m", help_heading = "Controller")]
    pub control_cooldown: Duration,
    /// Share of the requests that a change must bring within the SLO in the rehearsal, beyond chance
    #[arg(long, value_name = "SHARE", default_value_t = 0.02, help_heading = "Controller")]
    pub control_margin: f64,
    /// How long a node that changes its role waits for its requests; what is left then is done anew elsewhere
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "15s", help_heading = "Controller")]
    pub control_drain: Duration,
    /// It may also say how many nodes there should be, up to so many; whoever starts nodes follows the published target
    /// [default: changes of role only]
    #[arg(long, value_name = "COUNT", help_heading = "Controller")]
    pub control_nodes_max: Option<usize>,
}

/// A controller to run.
pub(crate) struct ControlPlan {
    pub(crate) mode: ControlMode,
    /// Of the profile.
    pub(crate) profile: Option<Profile>,
    pub(crate) model: Option<String>,
    pub(crate) every: Duration,
    pub(crate) options: ControlOptions,
}

impl ControlFlags {
    /// Checks what clap cannot, and reads the profile; none where the controller is off. Changes are rehearsed with this routing.
    ///
    /// # Errors
    /// The first flag that does not fit, by name.
    pub(crate) fn plan(&self, routing: RoutingOptions) -> Result<Option<ControlPlan>, StartError> {
        let refuse = |flag, value: String, expected| Err(StartError::Option { flag, value, expected });
        if self.control == ControlMode::Off {
            return Ok(None);
        }
        let Some(slo) = self.control_slo.clone() else {
            let expected = "given with --control-slo, such as --control-slo ttft_p90=2s,itl_p99=50ms";
            return refuse("--control", self.control.to_string(), expected);
        };
        if self.control == ControlMode::Apply && self.control_profile.is_none() {
            let expected = "given with --control-profile FILE (from `baton profile`), since nothing is changed without a rehearsal; \
                            or advise";
            return refuse("--control", self.control.to_string(), expected);
        }
        for (flag, value) in [
            ("--control-every", self.control_every),
            ("--control-window", self.control_window),
            ("--control-cooldown", self.control_cooldown),
        ] {
            if !(Duration::from_millis(100)..=Duration::from_secs(24 * 3600)).contains(&value) {
                return refuse(flag, format!("{value:?}"), "between 100ms and 24h");
            }
        }
        if !(0.0..1.0).contains(&self.control_margin) {
            return refuse(
                "--control-margin",
                self.control_margin.to_string(),
                "at least 0 and below 1",
            );
        }
        if self.control_requests_min == 0 {
            return refuse("--control-requests-min", "0".to_owned(), "at least 1");
        }
        if self.control_nodes_max.is_some_and(|max| max < 2) {
            return refuse(
                "--control-nodes-max",
                "less than 2".to_owned(),
                "at least one node of each role",
            );
        }
        let profile = self.control_profile.as_deref().map(Profile::read).transpose()?;
        let node = profile.as_ref().map(|profile| Arc::new(NodeModel::new(profile)));
        let nanos = |duration: Duration| Nanos::from_seconds(duration.as_secs_f64());
        let options = ControlOptions {
            window: nanos(self.control_window),
            requests_min: self.control_requests_min,
            cooldown: nanos(self.control_cooldown),
            warm_up: nanos(self.control_warm_up),
            drain: nanos(self.control_drain),
            margin: self.control_margin,
            scale: self.control_nodes_max.is_some(),
            nodes_max: self.control_nodes_max.unwrap_or(usize::MAX),
            policy: routing.policy,
            route_slo: routing.slo,
            ..ControlOptions::new(slo, node)
        };
        Ok(Some(ControlPlan {
            mode: self.control,
            profile,
            model: self.control_model.clone(),
            every: self.control_every,
            options,
        }))
    }
}

impl ControlPlan {
    /// What it looks at, from now on.
    pub(crate) fn record(&self, began: Moment) -> Record {
        Record::new(began, self.options.window.duration(), self.itl())
    }

    /// The bound on gaps between tokens, where there is one.
    fn itl(&self) -> Option<Duration> {
        self.options.slo.on(Metric::Itl).map(|clause| clause.bound.duration())
    }

    /// Why its profile says nothing of these nodes, if it does not.
    pub(crate) fn misfit(&self, model: &str, block_tokens: u32) -> Option<String> {
        let profile = self.profile.as_ref()?;
        if !profile.model.name.eq_ignore_ascii_case(model) {
            let found = &profile.model.name;
            return Some(format!(
                "--control-profile is of the model {found}, but {model} is served"
            ));
        }
        (profile.block_tokens != block_tokens).then(|| {
            let found = profile.block_tokens;
            format!("--control-profile is of KV blocks of {found} tokens, but the nodes have {block_tokens}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_planner::Policy;
    use baton_planner::profile::{estimate, gpu, model};
    use baton_scheduling::Slo as RouteSlo;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        flags: ControlFlags,
    }

    fn plan(arguments: &[&str]) -> Result<Option<ControlPlan>, String> {
        let command = Command::try_parse_from(std::iter::once("c").chain(arguments.iter().copied()));
        let flags = command.map_err(|error| error.to_string())?.flags;
        let routing = RoutingOptions {
            policy: Policy::default(),
            slo: RouteSlo::default(),
        };
        flags.plan(routing).map_err(|error| error.to_string())
    }

    #[test]
    fn it_is_off_unless_told_and_what_is_missing_is_named() {
        assert!(plan(&[]).unwrap().is_none());
        let refused = |arguments: &[&str]| plan(arguments).map(|_| ()).unwrap_err();
        assert!(refused(&["--control", "advise"]).contains("--control-slo"));
        let slo = ["--control", "apply", "--control-slo", "ttft_p90=1s"];
        assert!(refused(&slo).contains("--control-profile FILE (from `baton profile`)"));
        assert!(refused(&["--control", "on"]).contains("advise"));
        assert!(refused(&["--control-slo", "ttft_p90=1"]).contains("give it with its unit"));
        let advise = |more: &[&'static str]| [&["--control", "advise", "--control-slo", "ttft_p90=1s"], more].concat();
        assert!(refused(&advise(&["--control-every", "1ms"])).contains("--control-every"));
        assert!(refused(&advise(&["--control-margin", "2"])).contains("--control-margin"));
        assert!(refused(&advise(&["--control-nodes-max", "1"])).contains("--control-nodes-max"));
        assert!(refused(&advise(&["--control-profile", "/nowhere.json"])).contains("/nowhere.json"));
        let advised = plan(&advise(&["--control-nodes-max", "4"])).unwrap().unwrap();
        assert_eq!((advised.mode, advised.options.nodes_max), (ControlMode::Advise, 4));
        assert!(advised.options.scale && advised.options.node.is_none());
    }

    #[test]
    fn a_profile_of_another_model_does_not_fit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.json");
        let profile = estimate(gpu("h100").unwrap(), model("llama-3.1-8b").unwrap()).unwrap();
        profile.write(&path).unwrap();
        let path = path.display().to_string();
        let flags = [
            "--control",
            "apply",
            "--control-slo",
            "ttft_p90=1s,itl_p99=50ms",
            "--control-profile",
            &path,
        ];
        let plan = plan(&flags).unwrap().unwrap();
        assert!(plan.options.node.is_some());
        assert_eq!(plan.itl(), Some(Duration::from_millis(50)));
        assert_eq!(plan.misfit("Llama-3.1-8B", profile.block_tokens), None);
        assert!(
            plan.misfit("qwen3-8b", 16)
                .unwrap()
                .contains("of the model llama-3.1-8b")
        );
        assert!(plan.misfit("llama-3.1-8b", 7).unwrap().contains("blocks of"));
    }
}
