//! The coordinator as a binary of its own.

use baton_coordinator::{Options, StartError, run};
use baton_node_runtime::{Supervisor, config};
use std::process::ExitCode;
use std::time::Duration;

/// The coordinator of a Baton cluster: serves clients, and picks the nodes that compute each request.
#[derive(clap::Parser)]
#[command(name = "coordinator", version)]
struct Command {
    #[command(flatten)]
    options: Options,
}

/// How long threads that cannot be aborted (a prompt being tokenized) may hold the end of the process.
const THREADS_GRACE: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let command: Command = config::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(run(command.options, Supervisor::new()));
    runtime.shutdown_timeout(THREADS_GRACE);
    match result {
        Ok(()) | Err(StartError::Interrupted) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
