//! What the `main` of a single-role binary does with its future.

use crate::error::BringUpError;
use std::future::Future;
use std::process::ExitCode;
use std::time::Duration;

/// How long threads that cannot be aborted (a model being loaded) may hold the end of the process.
const THREADS_GRACE: Duration = Duration::from_millis(200);

/// Runs a node on a runtime of its own; its error goes to standard error, with exit code 1.
pub fn run_to_exit<F: Future<Output = Result<(), BringUpError>>>(node: impl FnOnce() -> F) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async { node().await });
    runtime.shutdown_timeout(THREADS_GRACE);
    match result {
        Ok(()) | Err(BringUpError::Interrupted) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
