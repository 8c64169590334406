//! `baton`: the command that people type. Each subcommand has a file in `commands/`.

mod cluster;
mod commands;
mod endpoint;
mod models;
mod timeline;

use std::process::ExitCode;

fn main() -> ExitCode {
    let command: commands::Baton = baton_node_runtime::config::parse();
    command.run().unwrap_or_else(|error| {
        eprintln!("baton: {error:#}");
        ExitCode::FAILURE
    })
}
