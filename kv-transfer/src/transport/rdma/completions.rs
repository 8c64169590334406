//! Waiting for completions: spinning for a moment after the last ones, asleep otherwise.

use super::verbs::{Completion, CompletionQueue, VerbsError};
use baton_node_runtime::{Clock, Moment};
use std::sync::Arc;
use std::time::Duration;

/// While data flows the next completion is rarely farther away, and going to sleep and waking up costs about as much.
const SPIN: Duration = Duration::from_micros(30);

/// The completions of one queue pair.
pub(super) struct Completions {
    queue: Arc<CompletionQueue>,
    clock: Clock,
    last: Moment,
}

impl Completions {
    pub(super) fn new(queue: &Arc<CompletionQueue>, clock: Clock) -> Self {
        Self {
            queue: Arc::clone(queue),
            clock,
            last: clock.now(),
        }
    }

    /// Appends what there is now; whether there was any.
    ///
    /// # Errors
    /// Where the queue is broken.
    pub(super) fn poll(&mut self, into: &mut Vec<Completion>) -> Result<bool, VerbsError> {
        let any = self.queue.poll(into)? > 0;
        if any {
            self.last = self.clock.now();
        }
        Ok(any)
    }

    /// Waits until there are some and appends them. Cancel safe.
    ///
    /// # Errors
    /// Where the queue is broken.
    pub(super) async fn next(&mut self, into: &mut Vec<Completion>) -> Result<(), VerbsError> {
        loop {
            if self.poll(into)? {
                return Ok(());
            }
            if self.clock.elapsed(self.last) < SPIN {
                tokio::task::yield_now().await;
                continue;
            }
            self.queue.arm()?;
            // What came between the last look and arming is not told.
            if self.poll(into)? {
                return Ok(());
            }
            self.queue.event().await?;
        }
    }
}
