//! What happens when. Events of one moment happen in the order in which they were made.

use crate::Nanos;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    /// The next request of the workload comes.
    Arrival(u32),
    /// A node's step ends; the generation tells whether it is still that step.
    StepEnds { node: u32, generation: u64 },
    /// All KV of a request has arrived, unless it was given up meanwhile.
    HandedOver { request: u32, attempt: u32 },
    /// The other node has all KV of a sequence that is moved to it, unless it was given up meanwhile.
    Moved { request: u32, attempt: u32 },
    /// An order of the list is given.
    Ordered(u32),
    /// A node has started, or has the other role; the number tells whether it is still that life.
    Ready { node: u32, life: u32 },
    /// Whoever directs the cluster looks at it.
    Look,
    /// Nodes say how loaded they are.
    Heartbeat,
}

#[derive(Debug, Default)]
pub(super) struct Events {
    heap: BinaryHeap<Reverse<(Nanos, u64, Event)>>,
    made: u64,
    pub now: Nanos,
}

impl Events {
    /// What was to happen in the past happens now: nothing does, and debug builds look.
    pub fn at(&mut self, at: Nanos, event: Event) {
        debug_assert!(at >= self.now, "{event:?} at {at:?}, and it is {:?}", self.now);
        self.made += 1;
        self.heap.push(Reverse((at.max(self.now), self.made, event)));
    }

    pub fn next(&mut self) -> Option<Event> {
        let Reverse((at, _, event)) = self.heap.pop()?;
        self.now = at;
        Some(event)
    }
}
