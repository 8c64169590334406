//! When a process ends: at a signal, or when the parent that started it is gone.

use crate::Supervisor;
use std::io::Read;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How long a process whose parent is gone may take to end in order.
const ORPHAN_GRACE: Duration = Duration::from_secs(15);

/// Lets SIGTERM and SIGINT begin the shutdown. A second SIGINT ends the process at once with code 130.
///
/// # Panics
/// Outside a tokio runtime.
pub fn shutdown_signal(supervisor: &Supervisor) {
    let (mut term, mut int) = match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(term), Ok(int)) => (term, int),
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "signals cannot be handled");
            return;
        }
    };
    let supervisor = supervisor.clone();
    // Not supervised: it must outlive the shutdown that it begins, to see the second signal.
    tokio::spawn(async move {
        let mut interrupts = 0;
        loop {
            let name = tokio::select! {
                _ = term.recv() => "SIGTERM",
                _ = int.recv() => {
                    interrupts += 1;
                    "SIGINT"
                }
            };
            if interrupts >= 2 {
                std::process::exit(130);
            }
            tracing::info!(signal = name, "shutdown begins");
            supervisor.begin_shutdown();
        }
    });
}

/// Begins the shutdown when standard input ends, which it does when the parent that holds its other end dies, however it
/// dies. The process is ended by force where it has not ended 15 s later.
pub fn exit_with_parent(supervisor: &Supervisor) {
    let supervisor = supervisor.clone();
    let watch = move || {
        let mut stdin = std::io::stdin().lock();
        let mut ignored = [0; 256];
        while !matches!(stdin.read(&mut ignored), Ok(0) | Err(_)) {}
        tracing::info!("parent is gone: shutdown begins");
        supervisor.begin_shutdown();
        std::thread::sleep(ORPHAN_GRACE);
        std::process::exit(1);
    };
    // A thread of its own: reading standard input cannot be cancelled, and must not hold a runtime from ending.
    if let Err(error) = std::thread::Builder::new().name("parent-watch".to_owned()).spawn(watch) {
        tracing::warn!(%error, "the parent cannot be watched");
    }
}
