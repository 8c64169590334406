//! What is known of one node.

use super::RouteRequest;
use crate::StepTimes;
use baton_types::{BlockCounts, Instance};

/// What is known of one node that takes work: its last heartbeat, what was placed on it since, and how fast it was so far.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeView {
    /// Which process.
    pub instance: Instance,
    /// Requests that wait there.
    pub queued_requests: u32,
    /// Bound of its queue.
    pub queue_capacity: u32,
    /// Tokens of prompts that it has yet to compute.
    pub queued_tokens: u64,
    /// Sequences that it computes.
    pub running_requests: u32,
    /// How fast it is.
    pub times: StepTimes,
    /// States of its blocks.
    pub blocks: BlockCounts,
    /// Tokens of one block.
    pub block_tokens: u32,
    /// Leading tokens of this request whose KV it is known to hold.
    pub held_tokens: u32,
}

impl NodeView {
    /// Tokens that it would have to compute or be sent. The last one is computed whatever is held: its logits are wanted.
    pub(super) fn lacking(&self, request: &RouteRequest<'_>) -> u32 {
        let held = self.held_tokens.min(request.context_tokens.saturating_sub(1));
        request.context_tokens - held
    }

    pub(super) fn blocks_needed(&self, request: &RouteRequest<'_>) -> u32 {
        (request.context_tokens.saturating_add(1)).div_ceil(self.block_tokens.max(1))
    }

    pub(super) fn fits(&self, request: &RouteRequest<'_>) -> bool {
        self.blocks_needed(request) <= self.blocks.total
    }

    /// Blocks that nobody uses, counting those of a cache that can be evicted.
    pub(super) fn has_room(&self, request: &RouteRequest<'_>) -> bool {
        self.blocks_needed(request) <= self.blocks.free.saturating_add(self.blocks.cached)
    }

    /// Also behind those that already wait there, each taken to need as much: for their KV, for the most part.
    pub(super) fn has_room_behind(&self, request: &RouteRequest<'_>) -> bool {
        let wanted = u64::from(self.blocks_needed(request)) * (u64::from(self.queued_requests) + 1);
        wanted <= u64::from(self.blocks.free) + u64::from(self.blocks.cached)
    }

    pub(super) fn queue_is_full(&self) -> bool {
        self.queued_requests >= self.queue_capacity
    }

    /// Sequences that it decodes or soon will.
    pub(super) fn sequences(&self) -> u32 {
        self.running_requests.saturating_add(self.queued_requests)
    }
}
