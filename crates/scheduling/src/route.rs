//! Which nodes serve a request: the ones on which it is predicted to wait least now.
//!
//! Prefill and decode node are chosen apart, since no time of the path between them is known yet; the signature takes both
//! lists so that pairs can be scored later without a change for the caller.

use baton_types::{BlockCounts, Instance};
use std::time::Duration;

/// Prefill speed assumed of a node that has measured none yet, tokens per second.
const PREFILL_TOKENS_PER_S_PRIOR: f64 = 500.0;
/// Decode step assumed of a node that has measured none yet.
const DECODE_STEP_PRIOR: Duration = Duration::from_millis(20);
/// The soonest that a refused client is told to come back.
const RETRY_AFTER_MIN: Duration = Duration::from_millis(100);
/// The latest.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);
/// What is advised where no node is there to predict from.
const RETRY_AFTER_NO_NODE: Duration = Duration::from_secs(1);

/// What is known of one node that takes work, from its heartbeat and from what was placed on it since.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeView {
    /// Which process.
    pub instance: Instance,
    /// Requests that wait there.
    pub queued_requests: u32,
    /// Bound of its queue.
    pub queue_capacity: u32,
    /// Tokens of prompts that wait there.
    pub queued_tokens: u64,
    /// Sequences that it computes.
    pub running_requests: u32,
    /// Moving average, tokens per second; 0 while nothing was measured.
    pub prefill_tokens_per_s: f32,
    /// Moving average of one decode step, microseconds; 0 while nothing was measured.
    pub decode_step_us: f32,
    /// States of its blocks.
    pub blocks: BlockCounts,
    /// Tokens of one block.
    pub block_tokens: u32,
    /// Leading tokens of this request whose KV it is known to hold.
    pub held_tokens: u32,
}

/// What is asked.
#[derive(Debug, Clone, PartialEq)]
pub struct RouteRequest<'a> {
    /// Tokens whose KV is needed before the next token can be drawn: the prompt and what was generated so far.
    pub context_tokens: u32,
    /// Nodes that must not be chosen: they failed under this request.
    pub excluded: &'a [Instance],
    /// The decode node that already waits for this request's KV; it is kept where it can be.
    pub keep_decode: Option<Instance>,
}

/// What the choice is expected to cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Prediction {
    /// Wait before the prefill begins.
    pub queue: Duration,
    /// Prefill of the tokens that the node does not hold.
    pub prefill: Duration,
    /// One step of the decode node with this sequence added.
    pub decode_step: Duration,
}

/// The choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// One node prefills, another decodes.
    Pair {
        /// Who prefills.
        prefill: Instance,
        /// Who decodes.
        decode: Instance,
        /// At what cost.
        predicted: Prediction,
    },
    /// One decode node does both.
    Alone {
        /// Which.
        decode: Instance,
        /// At what cost.
        predicted: Prediction,
    },
    /// Nobody can take it now.
    Refuse {
        /// Why.
        reason: RefuseReason,
        /// When to ask again.
        retry_after: Duration,
    },
}

/// Why nobody takes a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RefuseReason {
    /// None that has not failed under this request.
    #[error("no decode node is ready")]
    NoDecodeNode,
    /// Their bounds are reached; waiting helps.
    #[error("the queue of every {role} node is full")]
    QueuesFull {
        /// Of which kind.
        role: &'static str,
    },
    /// It would not fit even into an empty arena.
    #[error("{needed} KV blocks are needed, but the largest {role} node has {largest}")]
    TooLarge {
        /// Of which kind.
        role: &'static str,
        /// For the context and one more token.
        needed: u32,
        /// What there is.
        largest: u32,
    },
}

impl RefuseReason {
    /// The same request may be taken later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NoDecodeNode | Self::QueuesFull { .. } => true,
            Self::TooLarge { .. } => false,
        }
    }
}

impl NodeView {
    fn prefill_rate(&self) -> f64 {
        let measured = f64::from(self.prefill_tokens_per_s);
        if measured.is_finite() && measured > 0.0 {
            measured
        } else {
            PREFILL_TOKENS_PER_S_PRIOR
        }
    }

    fn prefill_time(&self, tokens: u64) -> Duration {
        Duration::try_from_secs_f64(tokens as f64 / self.prefill_rate()).unwrap_or(Duration::MAX)
    }

    fn queue_wait(&self) -> Duration {
        self.prefill_time(self.queued_tokens)
    }

    fn prefill(&self, request: &RouteRequest<'_>) -> Duration {
        self.prefill_time(u64::from(request.context_tokens.saturating_sub(self.held_tokens)))
    }

    /// A step grows about linearly with the sequences in it where compute is the bound, and not at all where memory is:
    /// the former is assumed, which spreads sequences.
    fn decode_step(&self) -> Duration {
        let measured = f64::from(self.decode_step_us);
        let step = if measured.is_finite() && measured > 0.0 {
            Duration::try_from_secs_f64(measured / 1e6).unwrap_or(Duration::MAX)
        } else {
            DECODE_STEP_PRIOR
        };
        let waiting = self.queued_requests;
        let sequences = self.running_requests.saturating_add(waiting).saturating_add(1);
        (step / self.running_requests.max(1)).saturating_mul(sequences)
    }

    fn blocks_needed(&self, request: &RouteRequest<'_>) -> u32 {
        (request.context_tokens.saturating_add(1)).div_ceil(self.block_tokens.max(1))
    }

    fn fits(&self, request: &RouteRequest<'_>) -> bool {
        self.blocks_needed(request) <= self.blocks.total
    }

    fn has_room_now(&self, request: &RouteRequest<'_>) -> bool {
        self.blocks_needed(request) <= self.blocks.free.saturating_add(self.blocks.cached)
    }

    fn queue_is_full(&self) -> bool {
        self.queued_requests >= self.queue_capacity
    }
}

/// Chooses. `prefill` and `decode` are the nodes of one model that take work.
///
/// A decode node works alone only where no prefill node is left; a cheaper use of it for short prompts comes later.
pub fn route(request: &RouteRequest<'_>, prefill: &[NodeView], decode: &[NodeView]) -> Decision {
    let usable = |views: &[NodeView]| -> Vec<NodeView> {
        views
            .iter()
            .filter(|view| !request.excluded.contains(&view.instance))
            .cloned()
            .collect()
    };
    let (prefill, decode) = (usable(prefill), usable(decode));
    let chosen_decode = match pick_decode(request, &decode) {
        Ok(view) => view,
        Err(reason) => return refuse(reason, &decode),
    };
    if prefill.is_empty() {
        let predicted = Prediction {
            queue: chosen_decode.queue_wait(),
            prefill: chosen_decode.prefill(request),
            decode_step: chosen_decode.decode_step(),
        };
        return Decision::Alone {
            decode: chosen_decode.instance,
            predicted,
        };
    }
    match pick_prefill(request, &prefill) {
        Ok(view) => Decision::Pair {
            prefill: view.instance,
            decode: chosen_decode.instance,
            predicted: Prediction {
                queue: view.queue_wait(),
                prefill: view.prefill(request),
                decode_step: chosen_decode.decode_step(),
            },
        },
        Err(reason) => refuse(reason, &prefill),
    }
}

fn pick_decode<'a>(request: &RouteRequest<'_>, views: &'a [NodeView]) -> Result<&'a NodeView, RefuseReason> {
    if let Some(kept) = views.iter().find(|view| Some(view.instance) == request.keep_decode) {
        return Ok(kept);
    }
    let open = open_nodes(request, views, "decode")?;
    let cost = |view: &&NodeView| {
        let room = view.blocks.free.saturating_add(view.blocks.cached);
        (
            !view.has_room_now(request),
            view.decode_step(),
            u32::MAX - room,
            view.instance,
        )
    };
    open.into_iter().min_by_key(cost).ok_or(RefuseReason::NoDecodeNode)
}

fn pick_prefill<'a>(request: &RouteRequest<'_>, views: &'a [NodeView]) -> Result<&'a NodeView, RefuseReason> {
    let open = open_nodes(request, views, "prefill")?;
    let cost = |view: &&NodeView| {
        (
            view.queue_wait().saturating_add(view.prefill(request)),
            view.queued_requests,
            view.instance,
        )
    };
    open.into_iter()
        .min_by_key(cost)
        .ok_or(RefuseReason::QueuesFull { role: "prefill" })
}

/// Those whose arena can hold the request and whose queue has a place.
fn open_nodes<'a>(
    request: &RouteRequest<'_>,
    views: &'a [NodeView],
    role: &'static str,
) -> Result<Vec<&'a NodeView>, RefuseReason> {
    let fitting: Vec<&NodeView> = views.iter().filter(|view| view.fits(request)).collect();
    let Some(largest) = views.iter().max_by_key(|view| view.blocks.total) else {
        return Err(RefuseReason::NoDecodeNode);
    };
    if fitting.is_empty() {
        let (needed, largest) = (largest.blocks_needed(request), largest.blocks.total);
        return Err(RefuseReason::TooLarge { role, needed, largest });
    }
    let open: Vec<&NodeView> = fitting.into_iter().filter(|view| !view.queue_is_full()).collect();
    if open.is_empty() {
        Err(RefuseReason::QueuesFull { role })
    } else {
        Ok(open)
    }
}

fn refuse(reason: RefuseReason, views: &[NodeView]) -> Decision {
    // The time in which the shortest queue moves on by one request.
    let one = |view: &NodeView| view.queue_wait() / view.queued_requests.max(1);
    let retry_after = match views.iter().map(one).min() {
        Some(wait) => wait.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX),
        None => RETRY_AFTER_NO_NODE,
    };
    Decision::Refuse { reason, retry_after }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(id: u64) -> NodeView {
        let blocks = BlockCounts {
            total: 100,
            free: 100,
            ..BlockCounts::default()
        };
        NodeView {
            instance: Instance(id),
            queued_requests: 0,
            queue_capacity: 8,
            queued_tokens: 0,
            running_requests: 0,
            prefill_tokens_per_s: 1000.0,
            decode_step_us: 10_000.0,
            blocks,
            block_tokens: 16,
            held_tokens: 0,
        }
    }

    fn ask(context_tokens: u32, excluded: &[Instance]) -> RouteRequest<'_> {
        RouteRequest {
            context_tokens,
            excluded,
            keep_decode: None,
        }
    }

    fn pair(decision: Decision) -> (u64, u64) {
        match decision {
            Decision::Pair { prefill, decode, .. } => (prefill.0, decode.0),
            other => panic!("no pair: {other:?}"),
        }
    }

    #[test]
    fn the_shortest_wait_wins_not_the_shortest_queue() {
        let slow = NodeView {
            queued_tokens: 100,
            prefill_tokens_per_s: 10.0,
            ..node(1)
        };
        let fast = NodeView {
            queued_tokens: 2000,
            prefill_tokens_per_s: 1000.0,
            ..node(2)
        };
        assert_eq!(pair(route(&ask(10, &[]), &[slow, fast], &[node(3)])), (2, 3));
    }

    #[test]
    fn held_tokens_draw_a_request() {
        let warm = NodeView {
            held_tokens: 800,
            queued_tokens: 100,
            ..node(2)
        };
        assert_eq!(pair(route(&ask(1000, &[]), &[node(1), warm], &[node(3)])).0, 2);
    }

    #[test]
    fn decode_prefers_room_then_fewer_sequences() {
        let full = NodeView {
            blocks: BlockCounts {
                total: 100,
                free: 1,
                ..BlockCounts::default()
            },
            ..node(3)
        };
        let busy = NodeView {
            running_requests: 4,
            ..node(4)
        };
        assert_eq!(pair(route(&ask(64, &[]), &[node(1)], &[full, busy.clone()])).1, 4);
        assert_eq!(pair(route(&ask(64, &[]), &[node(1)], &[busy, node(5)])).1, 5);
    }

    #[test]
    fn alone_only_without_a_usable_prefill_node() {
        let alone = |decision| {
            matches!(
                decision,
                Decision::Alone {
                    decode: Instance(3),
                    ..
                }
            )
        };
        assert!(alone(route(&ask(10, &[]), &[], &[node(3)])));
        assert!(alone(route(&ask(10, &[Instance(1)]), &[node(1)], &[node(3)])));
        let full = NodeView {
            queued_requests: 8,
            ..node(1)
        };
        let refused = route(&ask(10, &[]), &[full], &[node(3)]);
        assert!(matches!(
            refused,
            Decision::Refuse { reason: RefuseReason::QueuesFull { role: "prefill" }, retry_after }
                if retry_after >= RETRY_AFTER_MIN
        ));
    }

    #[test]
    fn refusals_say_why() {
        let reason = |decision| match decision {
            Decision::Refuse { reason, .. } => reason,
            other => panic!("not refused: {other:?}"),
        };
        assert_eq!(
            reason(route(&ask(10, &[]), &[node(1)], &[])),
            RefuseReason::NoDecodeNode
        );
        assert_eq!(
            reason(route(&ask(1600, &[]), &[node(1)], &[node(2)])),
            RefuseReason::TooLarge {
                role: "decode",
                needed: 101,
                largest: 100
            }
        );
        let small = NodeView {
            blocks: BlockCounts {
                total: 2,
                free: 2,
                ..BlockCounts::default()
            },
            ..node(1)
        };
        assert!(!reason(route(&ask(100, &[]), &[small], &[node(2)])).is_retryable());
    }

    #[test]
    fn a_waiting_decode_node_is_kept() {
        let request = RouteRequest {
            context_tokens: 10,
            excluded: &[],
            keep_decode: Some(Instance(9)),
        };
        let busy = NodeView {
            running_requests: 50,
            queued_requests: 8,
            ..node(9)
        };
        assert_eq!(pair(route(&request, &[node(1)], &[node(2), busy])).1, 9);
        assert_eq!(pair(route(&request, &[node(1)], &[node(2)])).1, 2);
    }

    fn any_node(id: u64) -> impl Strategy<Value = NodeView> {
        let numbers = (0u32..10, 0u32..10, 0u64..10_000, 0u32..10, 0u32..200);
        let floats = (
            prop_oneof![Just(0.0f32), Just(f32::NAN), 1.0f32..1e5],
            prop_oneof![Just(0.0f32), 1.0f32..1e6],
        );
        (numbers, floats).prop_map(
            move |((queued, capacity, tokens, running, blocks), (rate, step))| NodeView {
                queued_requests: queued,
                queue_capacity: capacity,
                queued_tokens: tokens,
                running_requests: running,
                prefill_tokens_per_s: rate,
                decode_step_us: step,
                blocks: BlockCounts {
                    total: blocks,
                    free: blocks / 2,
                    ..BlockCounts::default()
                },
                ..node(id)
            },
        )
    }

    fn nodes(from: u64) -> impl Strategy<Value = Vec<NodeView>> {
        (0usize..5).prop_flat_map(move |count| (0..count as u64).map(|i| any_node(from + i)).collect::<Vec<_>>())
    }

    proptest! {
        #[test]
        fn a_choice_is_always_allowed(
            prefill in nodes(0), decode in nodes(10), tokens in 1u32..3000, out in proptest::collection::vec(0u64..15, 0..6),
        ) {
            let excluded: Vec<Instance> = out.into_iter().map(Instance).collect();
            let request = ask(tokens, &excluded);
            let allowed = |views: &[NodeView], chosen: Instance| {
                views.iter().any(|view| view.instance == chosen && !view.queue_is_full() && view.fits(&request))
                    && !excluded.contains(&chosen)
            };
            let left = |views: &[NodeView]| views.iter().filter(|v| !excluded.contains(&v.instance)).count();
            match route(&request, &prefill, &decode) {
                Decision::Pair { prefill: p, decode: d, .. } => prop_assert!(allowed(&prefill, p) && allowed(&decode, d)),
                Decision::Alone { decode: d, .. } => prop_assert!(allowed(&decode, d) && left(&prefill) == 0),
                Decision::Refuse { reason, retry_after } => {
                    prop_assert!(retry_after >= RETRY_AFTER_MIN && retry_after <= RETRY_AFTER_MAX);
                    let somewhere = |views: &[NodeView]| views.iter().any(|v| allowed(views, v.instance));
                    let pair = somewhere(&decode) && (left(&prefill) == 0 || somewhere(&prefill));
                    prop_assert!(!pair, "refused ({reason}) though a choice was open");
                }
            }
        }

        #[test]
        fn more_load_never_attracts(prefill in nodes(0), tokens in 1u32..500, more in 1u64..10_000) {
            let request = ask(tokens, &[]);
            let decode = [node(10)];
            if let Decision::Pair { prefill: chosen, .. } = route(&request, &prefill, &decode) {
                let heavier: Vec<NodeView> = prefill.iter().map(|view| {
                    let extra = if view.instance == chosen { 0 } else { more };
                    NodeView { queued_tokens: view.queued_tokens + extra, ..view.clone() }
                }).collect();
                prop_assert_eq!(pair(route(&request, &heavier, &decode)).0, chosen.0);
            }
        }
    }
}
