//! A node's load as this coordinator knows it: its last heartbeat, and what was placed on it or taken off since. Without
//! the latter every request between two heartbeats would run to the same node.

use baton_proto::v1;
use baton_types::BlockCounts;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use tokio::sync::watch;

/// What this coordinator has on one node, counted by the [`Claim`]s alive.
#[derive(Debug, Default)]
pub(super) struct Placed {
    waiting: AtomicU32,
    waiting_tokens: AtomicU64,
    running: AtomicU32,
}

/// A moment's figures of [`Placed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Figures {
    pub(super) waiting: u32,
    pub(super) waiting_tokens: u64,
    pub(super) running: u32,
}

impl Placed {
    pub(super) fn figures(&self) -> Figures {
        Figures {
            waiting: self.waiting.load(Ordering::Relaxed),
            waiting_tokens: self.waiting_tokens.load(Ordering::Relaxed),
            running: self.running.load(Ordering::Relaxed),
        }
    }
}

/// One request's place on one node; given back when dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    placed: Arc<Placed>,
    changed: watch::Sender<u64>,
    tokens: u64,
    running: bool,
}

impl Claim {
    pub(super) fn new(placed: Arc<Placed>, changed: watch::Sender<u64>, tokens: u64) -> Self {
        placed.waiting.fetch_add(1, Ordering::Relaxed);
        placed.waiting_tokens.fetch_add(tokens, Ordering::Relaxed);
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
            self.leave_queue();
            self.placed.running.fetch_add(1, Ordering::Relaxed);
            self.changed.send_modify(|version| *version += 1);
        }
    }

    fn leave_queue(&self) {
        self.placed.waiting.fetch_sub(1, Ordering::Relaxed);
        self.placed.waiting_tokens.fetch_sub(self.tokens, Ordering::Relaxed);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.running {
            self.placed.running.fetch_sub(1, Ordering::Relaxed);
        } else {
            self.leave_queue();
        }
        self.changed.send_modify(|version| *version += 1);
    }
}

/// A heartbeat's figures, and how much of them was not ours when it came.
#[derive(Debug, Clone, Default)]
pub(super) struct Beat {
    pub(super) load: v1::NodeLoad,
    foreign: Figures,
}

/// What routing is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Estimate {
    pub(super) queued_requests: u32,
    pub(super) queued_tokens: u64,
    pub(super) running_requests: u32,
    pub(super) blocks: BlockCounts,
}

impl Beat {
    pub(super) fn new(load: v1::NodeLoad, ours: Figures) -> Self {
        let theirs = load.queued_requests.saturating_add(load.running_requests);
        let foreign = Figures {
            waiting: theirs.saturating_sub(ours.waiting.saturating_add(ours.running)),
            waiting_tokens: load.queued_tokens.saturating_sub(ours.waiting_tokens),
            running: 0,
        };
        Self { load, foreign }
    }

    /// The load now. A prefill node computes some of what we count as waiting there, a decode node runs what we know to run.
    pub(super) fn estimate(&self, ours: Figures) -> Estimate {
        let all = self
            .foreign
            .waiting
            .saturating_add(ours.waiting)
            .saturating_add(ours.running);
        let running = self.load.running_requests.max(ours.running).min(all);
        Estimate {
            queued_requests: all - running,
            queued_tokens: self.foreign.waiting_tokens.saturating_add(ours.waiting_tokens),
            running_requests: running,
            blocks: self.load.blocks.map(BlockCounts::from).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(queued: u32, tokens: u64, running: u32) -> v1::NodeLoad {
        v1::NodeLoad {
            queued_requests: queued,
            queued_tokens: tokens,
            running_requests: running,
            ..Default::default()
        }
    }

    #[test]
    fn claims_count_what_is_placed_and_wake_who_waits() {
        let placed = Arc::new(Placed::default());
        let (changed, mut woken) = watch::channel(0);
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
        assert!(woken.has_changed().unwrap_or(true));
    }

    #[test]
    fn what_came_since_the_heartbeat_counts_and_what_left_does_not() {
        let ours = Figures {
            waiting: 3,
            waiting_tokens: 300,
            running: 0,
        };
        let beat = Beat::new(load(4, 500, 1), ours);
        let now = |ours| beat.estimate(ours);
        assert_eq!(
            (
                now(ours).queued_requests,
                now(ours).queued_tokens,
                now(ours).running_requests
            ),
            (4, 500, 1)
        );
        let more = Figures {
            waiting: 5,
            waiting_tokens: 700,
            running: 0,
        };
        assert_eq!((now(more).queued_requests, now(more).queued_tokens), (6, 900));
        let none = now(Figures::default());
        assert_eq!(
            (none.queued_requests, none.queued_tokens, none.running_requests),
            (1, 200, 1)
        );
    }

    #[test]
    fn running_is_what_either_side_knows() {
        let beat = Beat::new(load(0, 0, 0), Figures::default());
        let estimate = beat.estimate(Figures {
            waiting: 1,
            waiting_tokens: 5,
            running: 4,
        });
        assert_eq!((estimate.queued_requests, estimate.running_requests), (1, 4));
    }
}
