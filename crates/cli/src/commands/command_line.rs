//! The command line as a whole: which subcommands there are, and the runtime that each runs on.

use super::{chat, coordinator, demo, drain, explain, model, node, plan, profile, replay, role, status, up, validate};
use anyhow::{Context, Result};
use std::future::Future;
use std::process::ExitCode;

/// Serves large language models with prefill and decode on separate nodes.
///
/// Start with `baton demo "Why is the sky blue?"`, or with `baton up` and `baton chat`.
#[derive(Debug, clap::Parser)]
#[command(
    name = "baton",
    version,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
#[command(after_help = "Flags can also be set in the environment as BATON_<FLAG>, such as BATON_KV_BYTES=2GiB.")]
pub struct Baton {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Answers one prompt through a cluster of its own and shows what happened when
    Demo(demo::Demo),
    /// Runs a cluster on this machine until Ctrl-C
    Up(up::Up),
    /// Talks to a running cluster
    Chat(chat::Chat),
    /// Shows the nodes of a running cluster
    Status(status::Status),
    /// Shows why a request was placed where it was
    Explain(explain::Explain),
    /// Asks a node to leave once its requests are done
    Drain(drain::Drain),
    /// Asks a node to take up the other role, prefill or decode
    Role(role::Role),
    /// Finds how many prefill and decode nodes a workload needs
    Plan(Box<plan::Plan>),
    /// Measures what a node can do on this machine, for plans
    Profile(Box<profile::Profile>),
    /// Replays a trace against a running cluster, or any OpenAI-compatible server, and measures it
    Replay(Box<replay::Replay>),
    /// Replays what was predicted first, and tells how far off the prediction was
    Validate(Box<validate::Validate>),
    /// Fetches models
    Model(model::Model),
    /// Runs one node in this process
    Node(node::Node),
    /// Runs the coordinator in this process
    Coordinator(coordinator::Coordinator),
}

impl Baton {
    /// Does what was asked.
    ///
    /// # Errors
    /// For people, with the remedy where there is one.
    pub fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Demo(demo) => block_on(demo.run()),
            Command::Up(up) => block_on(up.run()),
            Command::Chat(chat) => block_on(chat.run()),
            Command::Status(status) => block_on(status.run()),
            Command::Explain(explain) => block_on(explain.run()),
            Command::Drain(drain) => block_on(drain.run()),
            Command::Role(role) => block_on(role.run()),
            Command::Plan(plan) => plan.run(),
            Command::Profile(profile) => block_on(profile.run()),
            Command::Replay(replay) => block_on(replay.run()),
            Command::Validate(validate) => block_on(validate.run()),
            Command::Model(model) => block_on(model.run()),
            Command::Node(node) => block_on(node.run()),
            Command::Coordinator(coordinator) => block_on(coordinator.run()),
        }
    }
}

fn block_on(command: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(command);
    // A thread that blocks, on a download or on standard input, does not hold the end.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_node_runtime::config::parse_from;
    use clap::CommandFactory;

    fn refused(args: &[&str]) -> String {
        parse_from::<Baton>(args).unwrap_err().to_string()
    }

    #[test]
    fn the_command_line_is_sound() {
        Baton::command().debug_assert();
    }

    #[test]
    fn every_command_explains_itself() {
        for name in [
            "demo",
            "up",
            "chat",
            "status",
            "explain",
            "drain",
            "role",
            "plan",
            "profile",
            "replay",
            "validate",
            "model",
            "node",
            "coordinator",
        ] {
            let help = refused(&["baton", name, "--help"]);
            assert!(help.contains("Usage: baton"), "{name}: {help}");
        }
        let help = refused(&["baton", "up", "--help"]);
        assert!(
            help.contains("--kv-bytes <BYTES>") && help.contains("BATON_KV_BYTES"),
            "{help}"
        );
    }

    #[test]
    fn bad_values_name_the_flag_and_what_is_expected() {
        assert!(refused(&["baton", "up", "--decode", "0"]).contains("at least 1"));
        assert!(refused(&["baton", "up", "--kv-bytes", "lots"]).contains("512MiB"));
        assert!(refused(&["baton", "up", "--model", "./nowhere.gguf"]).contains("no file or folder"));
        assert!(refused(&["baton", "up", "--http-listen", "8000"]).contains("--http-listen"));
        assert!(refused(&["baton", "dmeo"]).contains("demo"));
        let plan = |slo, budget| {
            refused(&[
                "baton",
                "plan",
                "--model",
                "llama-3.1-8b",
                "--trace",
                "t",
                "--slo",
                slo,
                "--budget",
                budget,
            ])
        };
        assert!(plan("ttft_p90=1", "8").contains("give it with its unit"));
        assert!(plan("ttft_p90=1s", "8 GPUs").contains("32xh100"));
        assert!(
            refused(&["baton", "node", "--role", "both", "--model", "stub"]).contains("expected prefill or decode")
        );
    }
}
