use super::*;
use crate::{HandoverTimes, StepModel, StepTimes};
use baton_types::{BlockCounts, Instance};
use proptest::prelude::*;
use std::collections::HashSet;
use std::time::Duration;

fn handovers() -> HandoverTimes {
    HandoverTimes::new(100)
}

/// 1,000 prompt tokens a second, steps of 10 ms and 0.1 ms more per sequence.
fn times() -> StepTimes {
    speed(1000.0, |sequences| 10_000.0 + 100.0 * sequences)
}

fn speed(tokens_per_s: f64, step_us: impl Fn(f32) -> f32) -> StepTimes {
    let mut model = StepModel::default();
    for (tokens, sequences) in [(16, 1), (1000, 16), (200, 4), (2000, 8)].repeat(10) {
        model.prefilled(tokens, 0, Duration::from_secs_f64(f64::from(tokens) / tokens_per_s));
        model.reported(0.0, step_us(sequences as f32), sequences);
    }
    model.times()
}

fn node(id: u64) -> NodeView {
    NodeView {
        instance: Instance(id),
        queued_requests: 0,
        queue_capacity: 64,
        queued_tokens: 0,
        running_requests: 0,
        times: times(),
        blocks: BlockCounts {
            total: 1000,
            free: 1000,
            ..BlockCounts::default()
        },
        block_tokens: 16,
        held_tokens: 0,
    }
}

fn ask<'a>(context_tokens: u32, excluded: &'a [Instance], handovers: &'a HandoverTimes) -> RouteRequest<'a> {
    RouteRequest {
        context_tokens,
        excluded,
        keep_decode: None,
        policy: Policy::Predicted,
        slo: Slo::default(),
        turn: 1,
        handovers,
    }
}

/// Prefill and decode node, 0 for none.
fn placed(routed: &Routed) -> (u64, u64) {
    match &routed.decision {
        Decision::Place(chosen) => (chosen.prefill.map_or(0, |node| node.0), chosen.decode.0),
        other => panic!("not placed: {other:?}"),
    }
}

fn choose(tokens: u32, prefill: &[NodeView], decode: &[NodeView]) -> (u64, u64) {
    placed(&route(&ask(tokens, &[], &handovers()), prefill, decode))
}

#[test]
fn the_shortest_wait_wins_not_the_shortest_queue() {
    let slow = NodeView {
        times: speed(10.0, |_| 10_000.0),
        ..node(1)
    };
    let busy = NodeView {
        queued_requests: 5,
        queued_tokens: 3000,
        ..node(2)
    };
    let decode = NodeView {
        running_requests: 60,
        ..node(9)
    };
    assert_eq!(choose(100, &[slow, busy], &[decode]), (2, 9));
}

#[test]
fn held_tokens_draw_a_request_until_the_queue_costs_more() {
    let holder = |queued_tokens| NodeView {
        held_tokens: 900,
        queued_requests: 1,
        queued_tokens,
        ..node(2)
    };
    assert_eq!(choose(1000, &[node(1), holder(800)], &[node(9)]).0, 2);
    assert_eq!(choose(1000, &[node(1), holder(1200)], &[node(9)]).0, 1);
}

#[test]
fn short_or_mostly_held_prompts_stay_on_the_decode_node_by_predicted_times() {
    let far = {
        let mut handovers = handovers();
        (0..9).for_each(|_| handovers.handed_over(Instance(1), Instance(9), 1000, Duration::from_millis(50)));
        handovers
    };
    let choose = |tokens, handovers: &HandoverTimes, decode: NodeView| {
        placed(&route(&ask(tokens, &[], handovers), &[node(1)], &[decode]))
    };
    assert_eq!(choose(1000, &far, node(9)), (1, 9), "long");
    assert_eq!(choose(10, &far, node(9)), (0, 9), "short, and the path is slow");
    let busy = NodeView {
        running_requests: 30,
        ..node(9)
    };
    assert_eq!(choose(10, &far, busy), (1, 9), "it would stall 30 sequences");
    assert_eq!(choose(100, &handovers(), node(9)), (1, 9), "the path is fast");
    let holder = NodeView {
        held_tokens: 996,
        ..node(9)
    };
    assert_eq!(choose(1000, &far, holder.clone()), (0, 9), "mostly held");
    let queue = NodeView {
        queued_requests: 9,
        queued_tokens: 5000,
        ..holder
    };
    assert_eq!(choose(1000, &far, queue), (1, 9), "held, behind others");
}

#[test]
fn a_decode_node_without_room_behind_those_that_wait_does_not_prefill() {
    // 10 tokens need one block; each prefill node has a long queue, so that the prompt would be computed sooner at the decode node.
    let busy = NodeView {
        queued_requests: 8,
        queued_tokens: 80_000,
        ..node(1)
    };
    let decode = |queued_requests, free| NodeView {
        queued_requests,
        blocks: BlockCounts {
            total: 1000,
            free,
            ..BlockCounts::default()
        },
        ..node(9)
    };
    let full = NodeView {
        queued_requests: 64,
        ..busy.clone()
    };
    assert_eq!(
        choose(10, std::slice::from_ref(&busy), &[decode(4, 5)]),
        (0, 9),
        "one block for each that waits, and for it"
    );
    assert_eq!(
        choose(10, &[busy], &[decode(5, 5)]),
        (1, 9),
        "it would take the place of one that waits"
    );
    assert_eq!(choose(10, std::slice::from_ref(&full), &[decode(4, 5)]), (0, 9));
    let routed = route(&ask(10, &[], &handovers()), &[full], &[decode(5, 5)]);
    assert!(
        matches!(routed.decision, Decision::Hold { .. }),
        "{:?}",
        routed.decision
    );
    assert_eq!(
        choose(10, &[], &[decode(5, 5)]),
        (0, 9),
        "without prefill nodes nobody else can"
    );
}

#[test]
fn a_fast_path_decides_between_equal_decode_nodes() {
    let mut handovers = handovers();
    for (to, ms) in [(8, 80), (9, 2)].repeat(5) {
        handovers.handed_over(Instance(1), Instance(to), 1000, Duration::from_millis(ms));
    }
    let routed = route(&ask(1000, &[], &handovers), &[node(1)], &[node(8), node(9)]);
    assert_eq!(placed(&routed), (1, 9));
    let costs: Vec<f64> = routed.candidates.iter().map(|c| c.predicted.cost).collect();
    assert!(costs.len() == 4 && costs.is_sorted(), "two pairs, two alone: {costs:?}");
}

#[test]
fn decode_prefers_room_then_fewer_sequences() {
    let full = NodeView {
        blocks: BlockCounts {
            total: 1000,
            referenced: 1000,
            ..BlockCounts::default()
        },
        ..node(7)
    };
    let busy = |id, running| NodeView {
        running_requests: running,
        ..node(id)
    };
    assert_eq!(choose(500, &[node(1)], &[full.clone(), busy(8, 20), busy(9, 10)]).1, 9);
    assert_eq!(choose(500, &[node(1)], &[full]).1, 7, "it queues there");
}

#[test]
fn what_cannot_be_is_refused_and_what_may_be_is_held() {
    let handovers = handovers();
    let reason = |routed: Routed| match routed.decision {
        Decision::Refuse { reason, .. } => reason,
        other => panic!("not refused: {other:?}"),
    };
    let ask = |tokens| ask(tokens, &[], &handovers);
    assert_eq!(reason(route(&ask(10), &[node(1)], &[])), RefuseReason::NoDecodeNode);
    let expected = RefuseReason::TooLarge {
        role: "decode",
        needed: 1001,
        largest: 1000,
    };
    assert_eq!(reason(route(&ask(16_000), &[node(1)], &[node(2)])), expected);
    assert!(!expected.is_retryable());
    let full = |id| NodeView {
        queued_requests: 64,
        queued_tokens: 6400,
        ..node(id)
    };
    let held = |routed: Routed| match routed.decision {
        Decision::Hold { reason } => reason.to_string(),
        other => panic!("not held: {other:?}"),
    };
    assert!(held(route(&ask(100), &[node(1)], &[full(2)])).contains("every decode node"));
    let routed = route(&ask(9000), &[full(1)], &[node(2)]);
    assert!(!routed.candidates.is_empty(), "what it waits for is told");
    assert!(held(routed).contains("every prefill node"));
    assert_eq!(
        placed(&route(&ask(100), &[full(1)], &[node(2)])),
        (0, 2),
        "cheaper than to wait"
    );
}

#[test]
fn bounds_refuse_early_hold_or_choose_another() {
    let handovers = handovers();
    let asked = |ttft: Option<u64>, itl: Option<u64>| RouteRequest {
        slo: Slo {
            ttft: ttft.map(Duration::from_millis),
            itl: itl.map(Duration::from_millis),
        },
        ..ask(1000, &[], &handovers)
    };
    let busy = NodeView {
        running_requests: 100,
        ..node(8)
    };
    match route(&asked(Some(500), None), &[node(1)], &[node(9)]).decision {
        Decision::Refuse {
            reason: RefuseReason::TooLate { predicted, allowed },
            retry_after,
        } => {
            assert!(predicted > Duration::from_millis(900) && allowed == Duration::from_millis(500));
            assert!(retry_after > Duration::from_millis(400) && retry_after < Duration::from_millis(700));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(placed(&route(&asked(Some(1500), None), &[node(1)], &[node(9)])), (1, 9));
    let probe = RouteRequest {
        turn: PROBE_TURNS,
        ..asked(Some(500), None)
    };
    assert_eq!(
        placed(&route(&probe, &[node(1)], &[node(9)])),
        (1, 9),
        "one is tried all the same"
    );
    let guessed = |id| NodeView {
        times: StepTimes::default(),
        ..node(id)
    };
    let routed = route(&asked(Some(500), None), &[guessed(1)], &[guessed(9)]);
    assert_eq!(placed(&routed), (1, 9), "nobody is refused for a guess");
    let held = route(&asked(None, Some(15)), &[node(1)], std::slice::from_ref(&busy)).decision;
    assert!(
        matches!(
            held,
            Decision::Hold {
                reason: HoldReason::TooSlow { .. }
            }
        ),
        "{held:?}"
    );
    assert_eq!(
        placed(&route(&asked(None, Some(15)), &[node(1)], &[busy, node(9)])).1,
        9
    );
    let never = route(&asked(None, Some(5)), &[node(1)], &[node(9)]);
    assert_eq!(placed(&never).1, 9, "no node is ever that fast");
}

#[test]
fn a_waiting_decode_node_is_kept() {
    let handovers = handovers();
    let request = RouteRequest {
        keep_decode: Some(Instance(9)),
        ..ask(2, &[], &handovers)
    };
    let busy = NodeView {
        running_requests: 50,
        queued_requests: 64,
        ..node(9)
    };
    assert_eq!(placed(&route(&request, &[node(1)], &[node(2), busy])), (1, 9));
    assert_eq!(placed(&route(&request, &[node(1)], &[node(2)])).1, 2);
}

#[test]
fn policies_prefer_what_they_say() {
    let handovers = handovers();
    let loaded = |id, tokens, running| NodeView {
        queued_requests: u32::from(tokens > 0),
        queued_tokens: tokens,
        running_requests: running,
        ..node(id)
    };
    let prefill: Vec<NodeView> = (1..=5).map(|id| loaded(id, 1000 * id, 0)).collect();
    let decode: Vec<NodeView> = (11..=15).map(|id| loaded(id, 0, id as u32)).collect();
    let choose = |policy, turn| {
        let request = RouteRequest {
            policy,
            turn,
            ..ask(10, &[], &handovers)
        };
        placed(&route(&request, &prefill, &decode))
    };
    let turns = |policy| -> HashSet<(u64, u64)> { (0..200).map(|turn| choose(policy, turn)).collect() };
    assert_eq!(turns(Policy::LeastLoaded), HashSet::from([(1, 11)]));
    assert_eq!(
        (choose(Policy::RoundRobin, 6), choose(Policy::RoundRobin, 9)),
        ((2, 12), (5, 15))
    );
    let two = turns(Policy::RandomTwo);
    assert!(two.len() > 8 && two.contains(&(1, 12)), "{two:?}");
    let count = |id| {
        (0..2000)
            .filter(|turn| choose(Policy::RandomTwo, *turn).0 == id)
            .count()
    };
    assert!(
        count(1) > 600 && count(5) < 200,
        "the less loaded of two: {} {}",
        count(1),
        count(5)
    );
    for policy in ["predicted", "least-loaded", "round-robin", "random-two"] {
        assert_eq!(policy.parse::<Policy>().unwrap().name(), policy);
    }
    assert!("best".parse::<Policy>().unwrap_err().to_string().contains("`best`"));
}

fn any_node(id: u64) -> impl Strategy<Value = NodeView> {
    let numbers = (0u32..10, 0u32..10, 0u64..10_000, 0u32..10, 0u32..200, 0u32..3000);
    (numbers, 1.0f64..1e5, 1.0f32..1e6).prop_map(
        move |((queued, capacity, tokens, running, blocks, held), rate, step)| NodeView {
            queued_requests: queued,
            queue_capacity: capacity,
            queued_tokens: tokens,
            running_requests: running,
            times: speed(rate, |_| step),
            held_tokens: held,
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
    (0usize..12).prop_flat_map(move |count| (0..count as u64).map(|i| any_node(from + i)).collect::<Vec<_>>())
}

fn policy() -> impl Strategy<Value = Policy> {
    prop::sample::select(vec![
        Policy::Predicted,
        Policy::LeastLoaded,
        Policy::RoundRobin,
        Policy::RandomTwo,
    ])
}

proptest! {
    #[test]
    fn a_choice_is_always_allowed_and_the_cheapest_known(
        prefill in nodes(1), decode in nodes(20), tokens in 1u32..3000, policy in policy(), turn in 0u64..100,
        out in prop::collection::vec(0u64..32, 0..6),
    ) {
        let (excluded, handovers): (Vec<Instance>, _) = (out.into_iter().map(Instance).collect(), handovers());
        let request = RouteRequest { policy, turn, ..ask(tokens, &excluded, &handovers) };
        let usable = |views: &[NodeView]| -> Vec<NodeView> {
            views.iter().filter(|v| !excluded.contains(&v.instance)).cloned().collect()
        };
        let open = |views: &[NodeView]| -> Vec<Instance> {
            let open = usable(views).into_iter().filter(|v| v.fits(&request) && !v.queue_is_full());
            open.map(|v| v.instance).collect()
        };
        let routed = route(&request, &prefill, &decode);
        prop_assert!(routed.candidates.len() <= CANDIDATES_MAX);
        match routed.decision {
            Decision::Place(chosen) => {
                prop_assert!(open(&decode).contains(&chosen.decode));
                prop_assert!(chosen.prefill.is_none_or(|p| open(&prefill).contains(&p)));
                prop_assert!(chosen.prefill.is_some() || policy == Policy::Predicted || usable(&prefill).is_empty());
                prop_assert_eq!(Some(&chosen), routed.candidates.first());
                let lacking = chosen.prefill_tokens;
                prop_assert!(lacking >= 1 && lacking <= tokens && chosen.handover_tokens <= tokens);
            }
            Decision::Hold { .. } | Decision::Refuse { .. } => {
                let pair = !open(&decode).is_empty() && (usable(&prefill).is_empty() || !open(&prefill).is_empty());
                prop_assert!(!pair, "{:?} though a choice was open", routed.decision);
            }
        }
    }

    #[test]
    fn shortlists_miss_no_better_prefill_node(prefill in nodes(1), tokens in 1u32..500) {
        let (decode, handovers) = ([node(30)], handovers());
        let request = ask(tokens, &[], &handovers);
        if let Decision::Place(chosen) = route(&request, &prefill, &decode).decision {
            for view in prefill.iter().filter(|v| v.fits(&request) && !v.queue_is_full()) {
                let pair = predict::pair(&request, view, &decode[0]);
                prop_assert!(pair.predicted.cost >= chosen.predicted.cost);
            }
        }
    }

    #[test]
    fn more_load_never_attracts(prefill in nodes(1), tokens in 1u32..500, more in 1u64..10_000) {
        let decode = [NodeView { running_requests: 60, ..node(30) }];
        let handovers = handovers();
        let request = ask(tokens, &[], &handovers);
        if let Decision::Place(Candidate { prefill: Some(chosen), .. }) = route(&request, &prefill, &decode).decision {
            let heavier: Vec<NodeView> = prefill.iter().map(|view| {
                let extra = if view.instance == chosen { 0 } else { more };
                NodeView { queued_tokens: view.queued_tokens + extra, ..view.clone() }
            }).collect();
            prop_assert_eq!(placed(&route(&request, &heavier, &decode)).0, chosen.0);
        }
    }
}

#[test]
fn a_decode_node_does_not_prefill_so_much_that_its_sequences_are_too_slow() {
    let handovers = handovers();
    let asked = |ttft: u64| RouteRequest {
        slo: Slo {
            ttft: Some(Duration::from_millis(ttft)),
            itl: Some(Duration::from_millis(200)),
        },
        ..ask(1000, &[], &handovers)
    };
    let late = NodeView {
        queued_requests: 2,
        queued_tokens: 20_000,
        ..node(1)
    };
    let decoding = |running_requests| NodeView {
        running_requests,
        ..node(9)
    };
    assert_eq!(
        placed(&route(&asked(1500), std::slice::from_ref(&late), &[decoding(5)])),
        (0, 9)
    );
    let refused = route(&asked(1500), std::slice::from_ref(&late), &[decoding(40)]).decision;
    let is_late = matches!(
        refused,
        Decision::Refuse {
            reason: RefuseReason::TooLate { .. },
            ..
        }
    );
    assert!(is_late, "waiting would only make it later: {refused:?}");
    assert_eq!(placed(&route(&asked(60_000), &[late], &[decoding(40)])), (1, 9));
}
