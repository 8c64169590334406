//! The prefill node as a binary of its own.

use baton_node_host::{NodeOptions, run_to_exit};
use baton_node_runtime::{Supervisor, config};
use std::process::ExitCode;

/// A prefill node of a Baton cluster: computes prompts and hands their KV to decode nodes.
#[derive(clap::Parser)]
#[command(name = "prefill-node", version)]
struct Options {
    #[command(flatten)]
    node: NodeOptions,
}

fn main() -> ExitCode {
    let options: Options = config::parse();
    run_to_exit(|| baton_prefill_node::run(options.node, Supervisor::new()))
}
