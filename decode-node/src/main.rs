//! The decode node as a binary of its own.

use baton_node_host::{NodeOptions, run_to_exit};
use baton_node_runtime::{Supervisor, config};
use std::process::ExitCode;

/// A decode node of a Baton cluster: takes over prompts' KV from prefill nodes and generates.
#[derive(clap::Parser)]
#[command(name = "decode-node", version)]
struct Options {
    #[command(flatten)]
    node: NodeOptions,
}

fn main() -> ExitCode {
    let options: Options = config::parse();
    run_to_exit(|| baton_decode_node::run(options.node, Supervisor::new()))
}
