//! How commands end before their time.

use anyhow::{Context, Result};
use std::future::Future;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Exit code of a command that Ctrl-C ended, as shells give it.
pub const INTERRUPTED: u8 = 130;

/// Runs `work` unless Ctrl-C or SIGTERM comes first: none then, with `work` dropped.
pub async fn unless_interrupted<T>(work: impl Future<Output = T>) -> Result<Option<T>> {
    let mut signals = Signals::install()?;
    Ok(tokio::select! {
        value = work => Some(value),
        _ = signals.next() => None,
    })
}

/// The signals that ask a command to end.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Takes them from the system, which ends the process no more at them.
    ///
    /// # Errors
    /// Where the system does not allow it.
    pub fn install() -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("handle SIGINT")?,
            terminate: signal(SignalKind::terminate()).context("handle SIGTERM")?,
        })
    }

    /// Waits for the next one: its name.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}
