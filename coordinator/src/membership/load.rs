//! What a request does to a node's load, and what a heartbeat says of it.

use super::changes::Changes;
use baton_proto::v1;
use baton_scheduling::{Figures, Load, Placed, Reported};
use baton_types::BlockCounts;
use std::sync::Arc;

/// One request's place on one node; given back when dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    placed: Arc<Placed>,
    changed: Changes,
    tokens: u64,
    running: bool,
}

impl Claim {
    pub(super) fn new(placed: Arc<Placed>, changed: Changes, tokens: u64) -> Self {
        placed.comes(tokens);
        Self {
            placed,
            changed,
            tokens,
            running: false,
        }
    }

    /// The node has begun to decode it: it waits no more.
    pub(crate) fn started(&mut self) {
        if !std::mem::replace(&mut self.running, true) {
            self.placed.starts(self.tokens);
            self.changed.tell();
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.running {
            self.placed.ends();
        } else {
            self.placed.leaves_queue(self.tokens);
        }
        self.changed.tell();
    }
}

/// A heartbeat's figures, and how much of them was not ours when it came.
#[derive(Debug, Clone, Default)]
pub(super) struct Beat {
    pub(super) load: v1::NodeLoad,
    pub(super) known: Load,
}

impl Beat {
    pub(super) fn new(load: v1::NodeLoad, ours: Figures) -> Self {
        let reported = Reported {
            queued_requests: load.queued_requests,
            queued_tokens: load.queued_tokens,
            running_requests: load.running_requests,
            blocks: load.blocks.map(BlockCounts::from).unwrap_or_default(),
        };
        let known = Load::new(reported, ours);
        Self { load, known }
    }

    /// Requests that others placed there.
    pub(super) fn foreign_requests(&self) -> u32 {
        let foreign = self.known.now(Figures::default());
        foreign.queued_requests + foreign.running_requests
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn claims_count_what_is_placed_and_wake_who_waits() {
        let placed = Arc::new(Placed::default());
        let changed = Changes::default();
        let mut woken = changed.listen();
        let mut first = Claim::new(Arc::clone(&placed), changed.clone(), 100);
        let second = Claim::new(Arc::clone(&placed), changed, 10);
        assert_eq!(
            placed.figures(),
            Figures {
                waiting: 2,
                waiting_tokens: 110,
                running: 0
            }
        );
        first.started();
        first.started();
        assert_eq!(
            placed.figures(),
            Figures {
                waiting: 1,
                waiting_tokens: 10,
                running: 1
            }
        );
        woken.mark_unchanged();
        drop((first, second));
        assert_eq!(placed.figures(), Figures::default());
        assert!(woken.changed().now_or_never().is_some());
    }
}
