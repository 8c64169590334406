//! Why requests were placed where they were, and what came of it: the last few thousand, for operators who ask.

use crate::Timeline;
use baton_scheduling::{Decision, Policy, Routed};
use baton_types::{Instance, NodeId, RequestId};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Choices of one request that are kept: more than it has attempts, and waits between them.
const CHOICES_MAX: usize = 16;

/// One choice of nodes.
#[derive(Debug, Clone)]
pub(crate) struct Choice {
    /// Since the request's arrival, microseconds.
    pub(crate) at_us: u64,
    pub(crate) policy: Policy,
    pub(crate) context_tokens: u32,
    pub(crate) routed: Routed,
    /// Of all candidates' nodes.
    pub(crate) names: Vec<(Instance, NodeId)>,
}

/// What is known of one request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Explanation {
    pub(crate) choices: Vec<Choice>,
    /// How it ended; empty while it runs.
    pub(crate) outcome: &'static str,
    pub(crate) timeline: Option<Timeline>,
}

/// The log. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Decisions(Arc<Mutex<Log>>);

#[derive(Debug)]
struct Log {
    limit: usize,
    /// The oldest first.
    order: VecDeque<RequestId>,
    known: HashMap<RequestId, Explanation>,
}

impl Decisions {
    /// Of the last `limit` requests.
    pub(super) fn new(limit: usize) -> Self {
        Self(Arc::new(Mutex::new(Log {
            limit,
            order: VecDeque::new(),
            known: HashMap::new(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A choice was made. One that holds a request back takes the place of another just before it.
    pub(super) fn chosen(&self, request_id: RequestId, choice: Choice) {
        let mut log = self.lock();
        if !log.known.contains_key(&request_id) {
            if log.limit == 0 {
                return;
            }
            if log.order.len() >= log.limit
                && let Some(oldest) = log.order.pop_front()
            {
                log.known.remove(&oldest);
            }
            log.order.push_back(request_id);
        }
        let choices = &mut log.known.entry(request_id).or_default().choices;
        let held = |choice: &Choice| matches!(choice.routed.decision, Decision::Hold { .. });
        if held(&choice) && choices.last().is_some_and(held) {
            choices.pop();
        }
        if choices.len() < CHOICES_MAX {
            choices.push(choice);
        }
    }

    /// The request is over.
    pub(super) fn ended(&self, request_id: RequestId, outcome: &'static str, timeline: Option<&Timeline>) {
        if let Some(known) = self.lock().known.get_mut(&request_id) {
            known.outcome = outcome;
            known.timeline = timeline.cloned();
        }
    }

    /// What is known of a request, if it is still kept.
    pub(crate) fn explain(&self, request_id: RequestId) -> Option<Explanation> {
        self.lock().known.get(&request_id).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_scheduling::{HoldReason, RefuseReason};
    use std::time::Duration;

    fn choice(at_us: u64, decision: Decision) -> Choice {
        Choice {
            at_us,
            policy: Policy::Predicted,
            context_tokens: 1,
            routed: Routed {
                decision,
                candidates: Vec::new(),
            },
            names: Vec::new(),
        }
    }

    fn hold() -> Decision {
        let reason = HoldReason::QueuesFull { role: "decode" };
        Decision::Hold { reason }
    }

    fn refuse() -> Decision {
        Decision::Refuse {
            reason: RefuseReason::NoDecodeNode,
            retry_after: Duration::ZERO,
        }
    }

    #[test]
    fn the_oldest_request_makes_room_and_holds_are_one() {
        let log = Decisions::new(2);
        for (at, decision) in [(1, hold()), (2, hold()), (3, refuse()), (4, hold())] {
            log.chosen(RequestId(1), choice(at, decision));
        }
        let times = |id| -> Option<Vec<u64>> {
            let explanation = log.explain(RequestId(id))?;
            Some(explanation.choices.iter().map(|choice| choice.at_us).collect())
        };
        assert_eq!(times(1), Some(vec![2, 3, 4]));
        (0..100).for_each(|at| log.chosen(RequestId(2), choice(at, refuse())));
        assert_eq!(times(2).map(|times| times.len()), Some(CHOICES_MAX));
        log.ended(RequestId(2), "stop", Some(&Timeline::default()));
        log.chosen(RequestId(3), choice(1, refuse()));
        assert_eq!(times(1), None);
        log.ended(RequestId(1), "stop", None);
        assert_eq!(times(1), None);
        let second = log.explain(RequestId(2)).unwrap_or_default();
        assert_eq!((second.outcome, second.timeline), ("stop", Some(Timeline::default())));
    }
}
