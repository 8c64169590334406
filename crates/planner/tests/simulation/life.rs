//! Nodes that change their role, start, stop and fail while requests run.

use crate::plain::{node, plain};
use crate::properties::{conserved, drawn, slo, small_kv};
use baton_planner::Nanos;
use baton_planner::profile::Profile;
use baton_planner::sim::{Fate, Order, SimError, SimOptions, State, simulate, simulate_directed};
use baton_planner::workload::{Arrivals, Generator, Lengths, Workload};
use baton_scheduling::Side;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use std::sync::Arc;

fn at(seconds: f64) -> Nanos {
    Nanos::from_seconds(seconds)
}

fn even(requests: usize, per_second: f64, input: u32, output: u32) -> Workload {
    let generator = Generator {
        requests,
        arrivals: Arrivals::Even(per_second),
        inputs: Lengths::Constant(input),
        outputs: Lengths::Constant(output),
    };
    generator.draw(1)
}

fn slow_changes(step_s: f64) -> Profile {
    Profile {
        role_change_s: 3.0,
        startup_s: 10.0,
        ..plain(step_s)
    }
}

fn order() -> impl Strategy<Value = (f64, Order)> {
    let side = prop_oneof![Just(Side::Prefill), Just(Side::Decode)];
    let order = (0usize..6, side, 0u32..7).prop_map(|(node, side, what)| match what {
        0..3 => Order::Role { node, side },
        3 => Order::Fail { node },
        4 => Order::Stop { node },
        _ => Order::Start { node, side },
    });
    (0.0f64..30.0, order)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, rng_seed: RngSeed::Fixed(11), ..ProptestConfig::default() })]

    /// Debug builds also look at every event's time, and at every block that is taken.
    #[test]
    fn what_comes_in_comes_out_whatever_becomes_of_nodes(
        seed in 0u64..1000, rate in 4.0f64..40.0, kv in 40_000u64..200_000, drain in 0.0f64..8.0,
        orders in prop::collection::vec(order(), 1..12),
    ) {
        let workload = drawn(150, rate, seed);
        let mut kind = (*small_kv(kv)).clone();
        (kind.startup_s, kind.role_change_s) = (2.0, 0.5);
        let kind = Arc::new(kind);
        let mut options = SimOptions::new(&kind, 2, 3, slo());
        options.spare = vec![kind];
        options.drain = at(drain);
        options.orders = orders.into_iter().map(|(seconds, order)| (at(seconds), order)).collect();
        let outcome = simulate(&workload, &options).unwrap();
        conserved(&workload, &outcome);
        prop_assert!(outcome.orders.len() <= options.orders.len());
        let again = simulate(&workload, &options).unwrap();
        prop_assert_eq!(format!("{:?}", &outcome).into_bytes(), format!("{:?}", &again).into_bytes());
        let until = outcome.ended.max(workload.requests()[workload.len() - 1].at);
        prop_assert!(outcome.nodes.iter().all(|node| node.paid <= until), "{:?}", outcome.nodes);
    }
}

#[test]
fn a_decode_node_that_changes_its_role_hands_its_sequences_on_without_a_pause() {
    // A sequence of 200 tokens takes 2 s; the node leaves in the middle of many of them.
    let kind = node(&slow_changes(0.01));
    let generator = Generator {
        requests: 200,
        arrivals: Arrivals::Poisson(20.0),
        inputs: Lengths::Constant(30),
        outputs: Lengths::Constant(200),
    };
    let workload = generator.draw(4);
    let mut options = SimOptions::new(&kind, 1, 2, "itl_p99=50ms".parse().unwrap());
    options.orders = vec![(
        at(2.5),
        Order::Role {
            node: 2,
            side: Side::Prefill,
        },
    )];
    let outcome = simulate(&workload, &options).unwrap();
    conserved(&workload, &outcome);
    assert_eq!(outcome.served(), 200);
    assert_eq!(outcome.orders.len(), 1);
    assert!(outcome.nodes[2].handed_on >= 5, "{:?}", outcome.nodes);
    assert!(
        outcome.requests.iter().all(|r| r.good && r.retries == 0),
        "no gap is beyond 50 ms"
    );
    assert!(
        outcome.nodes[2].prefilling > 0.0,
        "it prefills behind that: {:?}",
        outcome.nodes
    );
}

#[test]
fn a_role_change_takes_what_the_profile_says_and_work_waits_meanwhile() {
    let (kind, workload) = (node(&slow_changes(0.01)), even(100, 2.0, 900, 100));
    let mut options = SimOptions::new(&kind, 1, 2, "ttft_p90=2s".parse().unwrap());
    let before = simulate(&workload, &options).unwrap();
    let order = Order::Role {
        node: 2,
        side: Side::Prefill,
    };
    options.orders = vec![(at(2.0), order), (at(2.1), order)];
    let mut seen: Vec<(f64, State, Side)> = Vec::new();
    let outcome = simulate_directed(&workload, &options, at(0.5), &mut |looked| {
        let node = looked.nodes[2];
        if seen.last().map(|(_, state, side)| (*state, *side)) != Some((node.state, node.side)) {
            seen.push((looked.now.seconds(), node.state, node.side));
        }
        Vec::new()
    })
    .unwrap();
    assert_eq!(outcome.orders, [(at(2.0), order)], "the second one has nothing to do");
    let states: Vec<(State, Side)> = seen.iter().map(|(_, state, side)| (*state, *side)).collect();
    let wanted = [
        (State::Ready, Side::Decode),
        (State::Draining, Side::Decode),
        (State::Coming, Side::Prefill),
        (State::Ready, Side::Prefill),
    ];
    assert_eq!(states, wanted);
    let took = seen[3].0 - seen[2].0;
    assert!(
        (2.5..=3.5).contains(&took),
        "{took} s for a change of 3 s, seen every half second"
    );
    // It was the one that decoded, or one of both; now it decodes only what it had when it was ordered.
    assert!(
        before.nodes[2].decoding > 2.0 * outcome.nodes[2].decoding && outcome.nodes[2].decoding < 0.2,
        "{:?}, then {:?}",
        before.nodes,
        outcome.nodes
    );
    assert!(outcome.nodes[2].prefilling > 0.5, "{:?}", outcome.nodes);
}

#[test]
fn requests_of_a_node_that_fails_go_on_from_the_tokens_they_have() {
    let (kind, workload) = (node(&slow_changes(0.01)), even(40, 10.0, 20, 200));
    let mut options = SimOptions::new(&kind, 1, 2, slo());
    options.orders = vec![(at(2.5), Order::Fail { node: 1 })];
    let outcome = simulate(&workload, &options).unwrap();
    conserved(&workload, &outcome);
    assert_eq!((outcome.served(), outcome.failed()), (40, 0));
    let retried = outcome.requests.iter().filter(|r| r.retries > 0).count();
    assert!((5..=20).contains(&retried), "{retried} of about ten on the node");
    // The prompt of 20 and what was drawn is computed again, not drawn again.
    assert!(outcome.tokens_computed > 40 * 20 + retried as u64 * 20);
    assert_eq!(outcome.nodes[1].paid, at(2.5));
}

#[test]
fn who_lost_two_nodes_is_not_tried_again() {
    let (kind, workload) = (node(&slow_changes(0.01)), even(10, 10.0, 20, 1000));
    let mut options = SimOptions::new(&kind, 0, 3, slo());
    let fail = |seconds, node| (at(seconds), Order::Fail { node });
    options.orders = vec![fail(2.0, 0), fail(4.0, 1), fail(6.0, 2)];
    let outcome = simulate(&workload, &options).unwrap();
    conserved(&workload, &outcome);
    assert_eq!(outcome.served(), 0);
    assert!(
        outcome
            .requests
            .iter()
            .all(|r| r.fate == Some(Fate::Failed) && r.retries <= 2),
        "{:?}",
        outcome.requests
    );
}

#[test]
fn requests_wait_for_a_node_that_starts() {
    let (kind, workload) = (node(&slow_changes(0.01)), even(10, 10.0, 20, 100));
    let mut options = SimOptions::new(&kind, 0, 1, slo());
    options.spare = vec![Arc::clone(&kind)];
    let start = Order::Start {
        node: 1,
        side: Side::Decode,
    };
    options.orders = vec![(at(0.95), Order::Fail { node: 0 }), (at(0.96), start)];
    let outcome = simulate(&workload, &options).unwrap();
    conserved(&workload, &outcome);
    assert_eq!(outcome.served(), 10);
    assert!(outcome.ended >= at(10.96), "it takes 10 s to start");
    assert_eq!(outcome.nodes[0].paid + outcome.nodes[1].paid, outcome.ended - at(0.01));
}

#[test]
fn an_order_for_a_node_that_is_not_there_is_refused() {
    let mut options = SimOptions::new(&node(&plain(0.01)), 0, 1, slo());
    options.orders = vec![(at(1.0), Order::Stop { node: 1 })];
    let error = simulate(&even(1, 1.0, 1, 1), &options).unwrap_err();
    assert_eq!(error, SimError::NoSuchNode { node: 1, nodes: 1 });
}
