//! A node's load as one coordinator knows it: what the node last said, and what was placed on it or taken off since. Without
//! the latter every request between two heartbeats would run to the same node.

use baton_types::BlockCounts;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What this coordinator has on one node. Counted by whoever places requests, while others look.
#[derive(Debug, Default)]
pub struct Placed {
    waiting: AtomicU32,
    waiting_tokens: AtomicU64,
    running: AtomicU32,
}

/// A moment's figures of [`Placed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Figures {
    /// Requests that wait there.
    pub waiting: u32,
    /// Tokens that these have yet to be computed of.
    pub waiting_tokens: u64,
    /// Requests that it has begun to decode.
    pub running: u32,
}

impl Placed {
    /// What is there now.
    pub fn figures(&self) -> Figures {
        Figures {
            waiting: self.waiting.load(Ordering::Relaxed),
            waiting_tokens: self.waiting_tokens.load(Ordering::Relaxed),
            running: self.running.load(Ordering::Relaxed),
        }
    }

    /// A request of so many tokens comes.
    pub fn comes(&self, tokens: u64) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        self.waiting_tokens.fetch_add(tokens, Ordering::Relaxed);
    }

    /// It waits no more but is decoded.
    pub fn starts(&self, tokens: u64) {
        self.leaves_queue(tokens);
        self.running.fetch_add(1, Ordering::Relaxed);
    }

    /// It goes without having been decoded.
    pub fn leaves_queue(&self, tokens: u64) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        self.waiting_tokens.fetch_sub(tokens, Ordering::Relaxed);
    }

    /// It is decoded no more.
    pub fn ends(&self) {
        self.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a node says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reported {
    /// Requests that wait there, whoever placed them.
    pub queued_requests: u32,
    /// Tokens of prompts that it has yet to compute.
    pub queued_tokens: u64,
    /// Sequences that it computes.
    pub running_requests: u32,
    /// States of its blocks.
    pub blocks: BlockCounts,
}

/// What a node said, and how much of it was not ours when it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    reported: Reported,
    foreign_requests: u32,
    foreign_tokens: u64,
}

impl Load {
    /// `ours` is what was placed on the node when it spoke.
    pub fn new(reported: Reported, ours: Figures) -> Self {
        let all = reported.queued_requests.saturating_add(reported.running_requests);
        Self {
            reported,
            foreign_requests: all.saturating_sub(ours.waiting.saturating_add(ours.running)),
            foreign_tokens: reported.queued_tokens.saturating_sub(ours.waiting_tokens),
        }
    }

    /// States of its blocks, as it said.
    pub fn blocks(&self) -> BlockCounts {
        self.reported.blocks
    }

    /// The load now. A prefill node computes some of what we count as waiting there, a decode node runs what we know to run.
    pub fn now(&self, ours: Figures) -> Reported {
        let all = self
            .foreign_requests
            .saturating_add(ours.waiting)
            .saturating_add(ours.running);
        let running = self.reported.running_requests.max(ours.running).min(all);
        Reported {
            queued_requests: all - running,
            queued_tokens: self.foreign_tokens.saturating_add(ours.waiting_tokens),
            running_requests: running,
            blocks: self.reported.blocks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reported(queued_requests: u32, queued_tokens: u64, running_requests: u32) -> Reported {
        Reported {
            queued_requests,
            queued_tokens,
            running_requests,
            ..Reported::default()
        }
    }

    fn figures(waiting: u32, waiting_tokens: u64, running: u32) -> Figures {
        Figures {
            waiting,
            waiting_tokens,
            running,
        }
    }

    #[test]
    fn what_is_placed_is_counted() {
        let placed = Placed::default();
        placed.comes(100);
        placed.comes(10);
        assert_eq!(placed.figures(), figures(2, 110, 0));
        placed.starts(100);
        assert_eq!(placed.figures(), figures(1, 10, 1));
        placed.leaves_queue(10);
        placed.ends();
        assert_eq!(placed.figures(), Figures::default());
    }

    #[test]
    fn what_came_since_the_node_spoke_counts_and_what_left_does_not() {
        let load = Load::new(reported(4, 500, 1), figures(3, 300, 0));
        let now = |ours| load.now(ours);
        assert_eq!(now(figures(3, 300, 0)), reported(4, 500, 1));
        assert_eq!(now(figures(5, 700, 0)), reported(6, 900, 1));
        assert_eq!(now(Figures::default()), reported(1, 200, 1));
    }

    #[test]
    fn running_is_what_either_side_knows() {
        let load = Load::new(reported(0, 0, 0), Figures::default());
        assert_eq!(load.now(figures(1, 5, 4)), reported(1, 5, 4));
    }
}
