//! The choice itself: who is open, who is worth weighing, and what is cheapest within the bounds.

use super::{
    CANDIDATES_MAX, Candidate, Decision, HoldReason, NodeView, PROBE_TURNS, Policy, RefuseReason, RouteRequest, Routed,
    predict, shortlist,
};
use std::time::Duration;

/// The soonest that a refused client is told to come back.
const RETRY_AFTER_MIN: Duration = Duration::from_millis(100);
/// The latest.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);
/// What is advised where no node is there to predict from.
const RETRY_AFTER_NO_NODE: Duration = Duration::from_secs(1);

/// The nodes of one role that did not fail under the request, as it finds them.
enum Door<'a> {
    /// There are none.
    None,
    /// These take it now.
    Open(Vec<&'a NodeView>),
    /// It fits into these, but their queues are full.
    Full(Vec<&'a NodeView>),
    /// It fits into none.
    Small(RefuseReason),
}

fn door<'a>(request: &RouteRequest<'_>, views: &'a [NodeView], role: &'static str) -> Door<'a> {
    let usable = || views.iter().filter(|view| !request.excluded.contains(&view.instance));
    let fitting: Vec<&NodeView> = usable().filter(|view| view.fits(request)).collect();
    if fitting.is_empty() {
        return match usable().max_by_key(|view| view.blocks.total) {
            None => Door::None,
            Some(largest) => Door::Small(RefuseReason::TooLarge {
                role,
                needed: largest.blocks_needed(request),
                largest: largest.blocks.total,
            }),
        };
    }
    if fitting.iter().all(|view| view.queue_is_full()) {
        return Door::Full(fitting);
    }
    Door::Open(fitting.into_iter().filter(|view| !view.queue_is_full()).collect())
}

/// Chooses. `prefill` and `decode` are the nodes of one model that take work.
pub fn route(request: &RouteRequest<'_>, prefill: &[NodeView], decode: &[NodeView]) -> Routed {
    let kept = decode
        .iter()
        .find(|view| Some(view.instance) == request.keep_decode && !request.excluded.contains(&view.instance));
    let decode = match (kept, door(request, decode, "decode")) {
        (Some(kept), _) => vec![kept],
        (None, Door::Open(open)) => open,
        (None, Door::None) => return refuse(RefuseReason::NoDecodeNode, RETRY_AFTER_NO_NODE),
        (None, Door::Small(reason)) => return refuse(reason, RETRY_AFTER_NO_NODE),
        (None, Door::Full(_)) => return hold(HoldReason::QueuesFull { role: "decode" }, Vec::new()),
    };
    let alone = |decode: &[&NodeView]| {
        let nodes = shortlist::alone(request, decode).into_iter();
        nodes
            .map(|node| predict::alone(request, node))
            .collect::<Vec<Candidate>>()
    };
    // A decode node without room for it, and for those that wait there already, serves nobody sooner by computing its prompt: it
    // delays those whose end makes room, and takes that room from prompts that are computed.
    let roomy = || -> Vec<&NodeView> {
        let behind = |node: &&&NodeView| node.has_room_behind(request);
        decode.iter().filter(behind).copied().collect()
    };
    let pairs = |prefill: &[&NodeView]| -> Vec<Candidate> {
        let (prefill, decode) = (
            shortlist::prefill(request, prefill),
            shortlist::decode(request, &decode),
        );
        let with = |p| decode.iter().map(move |d| predict::pair(request, p, d));
        prefill.into_iter().flat_map(with).collect()
    };
    // Who already waits for another node's KV would have to begin anew to prefill by itself.
    let may_be_alone = request.policy == Policy::Predicted && kept.is_none();
    match door(request, prefill, "prefill") {
        Door::None => cheapest(request, alone(&decode), &decode),
        Door::Open(open) => {
            let mut candidates = pairs(&open);
            if may_be_alone {
                candidates.extend(alone(&roomy()));
            }
            cheapest(request, candidates, &decode)
        }
        // To wait for a place is to wait for those before: alone only where that is cheaper.
        Door::Full(full) => {
            let wait = pairs(&full);
            let bound = wait
                .iter()
                .map(|pair| pair.predicted.cost)
                .fold(f64::INFINITY, f64::min);
            let cheaper: Vec<Candidate> = if may_be_alone {
                alone(&roomy())
                    .into_iter()
                    .filter(|alone| alone.predicted.cost < bound)
                    .collect()
            } else {
                Vec::new()
            };
            if cheaper.is_empty() {
                return hold(HoldReason::QueuesFull { role: "prefill" }, wait);
            }
            cheapest(request, cheaper, &decode)
        }
        Door::Small(reason) => refuse(reason, RETRY_AFTER_NO_NODE),
    }
}

/// The cheapest of those that keep to the bounds.
fn cheapest(request: &RouteRequest<'_>, mut candidates: Vec<Candidate>, decode: &[&NodeView]) -> Routed {
    by_cost(&mut candidates);
    let probe = request.turn.is_multiple_of(PROBE_TURNS);
    let soon = |c: &&Candidate| {
        let may_be_wrong = !c.measured || (probe && c.idle);
        may_be_wrong || request.slo.ttft.is_none_or(|bound| c.predicted.ttft() <= bound)
    };
    let smooth = |c: &&Candidate| request.slo.itl.is_none_or(|bound| c.predicted.itl <= bound);
    let chosen = candidates.iter().filter(soon).find(smooth);
    let decision = match (chosen, candidates.iter().find(soon)) {
        (Some(chosen), _) => Decision::Place(*chosen),
        (None, Some(slow)) => {
            // A node that is too slow with one sequence alone never gets faster.
            let idle = decode
                .iter()
                .any(|view| view.instance == slow.decode && view.sequences() == 0);
            let itl = candidates.iter().map(|c| c.predicted.itl).min().unwrap_or_default();
            let smoothest = candidates.iter().filter(smooth).map(|c| c.predicted.ttft()).min();
            match smoothest {
                _ if idle => Decision::Place(*slow),
                // Where tokens would come fast enough the first is too late already, and waiting makes it later.
                Some(predicted) => too_late(request, predicted),
                None => Decision::Hold {
                    reason: HoldReason::TooSlow { itl },
                },
            }
        }
        (None, None) => {
            let predicted = candidates.iter().map(|c| c.predicted.ttft()).min().unwrap_or_default();
            too_late(request, predicted)
        }
    };
    candidates.truncate(CANDIDATES_MAX);
    Routed { decision, candidates }
}

fn too_late(request: &RouteRequest<'_>, predicted: Duration) -> Decision {
    let allowed = request.slo.ttft.unwrap_or_default();
    Decision::Refuse {
        reason: RefuseReason::TooLate { predicted, allowed },
        retry_after: bounded(predicted.saturating_sub(allowed)),
    }
}

fn by_cost(candidates: &mut [Candidate]) {
    let name = |c: &Candidate| (c.prefill, c.decode);
    let order = |a: &Candidate, b: &Candidate| {
        a.predicted
            .cost
            .total_cmp(&b.predicted.cost)
            .then(name(a).cmp(&name(b)))
    };
    candidates.sort_unstable_by(order);
}

fn hold(reason: HoldReason, mut candidates: Vec<Candidate>) -> Routed {
    by_cost(&mut candidates);
    candidates.truncate(CANDIDATES_MAX);
    let decision = Decision::Hold { reason };
    Routed { decision, candidates }
}

fn refuse(reason: RefuseReason, retry_after: Duration) -> Routed {
    let retry_after = bounded(retry_after);
    let decision = Decision::Refuse { reason, retry_after };
    let candidates = Vec::new();
    Routed { decision, candidates }
}

fn bounded(wait: Duration) -> Duration {
    wait.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX)
}
