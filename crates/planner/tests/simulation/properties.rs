//! What holds for every cluster and every workload.

use crate::plain::node;
use baton_planner::profile::{NodeModel, Profile, estimate, gpu, model};
use baton_planner::sim::{Fate, Outcome, SimOptions, simulate};
use baton_planner::slo::Slo;
use baton_planner::workload::{Arrivals, Generator, Lengths, Workload};
use baton_scheduling::{AdmissionLimits, Policy};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use std::sync::Arc;

pub fn slo() -> Slo {
    "ttft_p90=2s,itl_p99=40ms".parse().unwrap()
}

pub fn small_kv(tokens: u64) -> Arc<NodeModel> {
    let profile = estimate(gpu("h100").unwrap(), model("llama-3.1-8b").unwrap()).unwrap();
    node(&Profile {
        kv_capacity_tokens: tokens,
        ..profile
    })
}

pub fn drawn(requests: usize, rate: f64, seed: u64) -> Workload {
    let generator = Generator {
        requests,
        arrivals: Arrivals::Poisson(rate),
        inputs: Lengths::LogNormal {
            median: 2000.0,
            sigma: 1.2,
            max: 30_000,
        },
        outputs: Lengths::Exponential(200.0),
    };
    generator.draw(seed)
}

fn policy() -> impl Strategy<Value = Policy> {
    prop_oneof![
        Just(Policy::Predicted),
        Just(Policy::LeastLoaded),
        Just(Policy::RoundRobin),
        Just(Policy::RandomTwo)
    ]
}

pub fn conserved(workload: &Workload, outcome: &Outcome) {
    assert_eq!(outcome.requests.len(), workload.len());
    assert_eq!(outcome.served() + outcome.refused() + outcome.failed(), workload.len());
    let mut gaps = 0;
    for (served, request) in outcome.requests.iter().zip(workload.requests()) {
        match (served.ttft, served.e2e) {
            (Some(ttft), Some(e2e)) => {
                assert_eq!(served.tokens, request.output);
                assert!(ttft <= e2e, "{served:?}");
                gaps += u64::from(request.output) - 1;
            }
            (_, None) => {
                assert!(!served.good && served.ttft.is_none(), "{served:?}");
                assert!(matches!(served.fate, Some(Fate::Refused | Fate::Failed)), "{served:?}");
            }
            (None, Some(_)) => panic!("served without a first token: {served:?}"),
        }
    }
    if outcome.served() == workload.len() {
        assert_eq!(outcome.itl.total(), gaps);
    }
    for used in &outcome.nodes {
        assert!(used.kv_peak <= 1.0, "{used:?}");
        assert!(used.prefilling + used.decoding <= 1.0 + 1e-9, "{used:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, rng_seed: RngSeed::Fixed(7), ..ProptestConfig::default() })]

    /// Debug builds also look at every event's time, and at every block that is taken.
    #[test]
    fn what_comes_in_comes_out_whatever_happens(
        seed in 0u64..1000, rate in 1.0f64..40.0, prefill in 0usize..4, decode in 1usize..4,
        kv in 20_000u64..200_000, policy in policy(), queued_max in 1u32..200, queue_max in 1u32..64,
    ) {
        let workload = drawn(150, rate, seed);
        let mut kind = (*small_kv(kv)).clone();
        kind.queue_max = queue_max;
        let mut options = SimOptions::new(&Arc::new(kind), prefill, decode, slo());
        options.policy = policy;
        options.admission = AdmissionLimits { requests_max: 300, queued_max };
        let outcome = simulate(&workload, &options).unwrap();
        conserved(&workload, &outcome);
        prop_assert_eq!(&outcome, &simulate(&workload, &options).unwrap(), "the same again");
        let bytes = |outcome: &Outcome| format!("{outcome:?}").into_bytes();
        prop_assert_eq!(bytes(&outcome), bytes(&simulate(&workload, &options).unwrap()));
    }

    /// Up to a twentieth of the requests: routing by heuristics may send the same request to another node where there are more.
    #[test]
    fn more_nodes_never_lower_goodput(
        seed in 0u64..1000, rate in 2.0f64..30.0, prefill in 1usize..4, decode in 1usize..4,
        policy in prop_oneof![Just(Policy::LeastLoaded), Just(Policy::Predicted)],
    ) {
        let (workload, kind) = (drawn(250, rate, seed), small_kv(400_000));
        let good = |prefill, decode| {
            let mut options = SimOptions::new(&kind, prefill, decode, slo());
            (options.prefix_cache, options.policy) = (false, policy);
            simulate(&workload, &options).unwrap().good_share()
        };
        let base = good(prefill, decode);
        let more = [(prefill + 1, decode + 1), (prefill + 1, decode), (prefill, decode + 1)];
        for (p, d) in more {
            let more = good(p, d);
            prop_assert!(more >= base - 0.05, "{base} good with {prefill}P+{decode}D, {more} with {p}P+{d}D");
        }
    }
}

/// Sixteen draws of the requests for each cluster, the same for both: on the mean of these, chance aside, a node more does
/// not lower the share of the requests that are within the SLO.
#[test]
fn more_nodes_lower_goodput_for_no_cluster_on_the_mean() {
    let kind = small_kv(400_000);
    let good = |workload: &Workload, prefill, decode, policy| {
        let mut options = SimOptions::new(&kind, prefill, decode, slo());
        (options.prefix_cache, options.policy) = (false, policy);
        simulate(workload, &options).unwrap().good_share()
    };
    for rate in [4.0, 12.0, 30.0] {
        let draws: Vec<Workload> = (0..16).map(|seed| drawn(250, rate, seed)).collect();
        for (prefill, decode) in [(1, 1), (1, 3), (2, 2), (3, 1), (3, 3)] {
            for policy in [Policy::LeastLoaded, Policy::Predicted] {
                for (p, d) in [(prefill + 1, decode), (prefill, decode + 1), (prefill + 1, decode + 1)] {
                    let gains: Vec<f64> = draws
                        .iter()
                        .map(|draw| good(draw, p, d, policy) - good(draw, prefill, decode, policy))
                        .collect();
                    let count = gains.len() as f64;
                    let mean = gains.iter().sum::<f64>() / count;
                    let spread = gains.iter().map(|gain| (gain - mean).powi(2)).sum::<f64>();
                    let error = (spread / (count - 1.0) / count).sqrt();
                    println!("{rate}/s {policy:?} {prefill}P+{decode}D to {p}P+{d}D: {mean:+.4} +- {error:.4}");
                    assert!(
                        mean + 3.0 * error >= 0.0,
                        "{rate}/s, {policy:?}: {p}P+{d}D is worse than {prefill}P+{decode}D: {gains:?}"
                    );
                }
            }
        }
    }
}

/// Equal nodes under equal load: one that reported a step which also computed a prompt as a slow one would be left idle.
#[test]
fn equal_decode_nodes_are_used_alike() {
    let outcome = simulate(&drawn(2000, 8.0, 5), &SimOptions::new(&small_kv(400_000), 4, 4, slo())).unwrap();
    let used: Vec<f64> = outcome.nodes[4..]
        .iter()
        .map(|node| node.decoding + node.prefilling)
        .collect();
    let (least, most) = used
        .iter()
        .fold((f64::INFINITY, 0.0f64), |(l, m), u| (l.min(*u), m.max(*u)));
    assert!(most - least < 0.15, "{used:?}");
}

/// Prefill nodes whose prompts wait for room must not be passed over: decode nodes that compute prompts themselves end fewer
/// sequences, and make less room still.
#[test]
fn overload_leaves_prompts_to_the_prefill_nodes() {
    let (workload, kind) = (drawn(3000, 40.0, 6), small_kv(100_000));
    let outcome = simulate(&workload, &SimOptions::new(&kind, 2, 2, slo())).unwrap();
    conserved(&workload, &outcome);
    let (prefill, decode) = outcome.nodes.split_at(2);
    assert!(prefill.iter().all(|node| node.prefilling > 0.6), "{:?}", outcome.nodes);
    assert!(decode.iter().all(|node| node.prefilling < 0.3), "{:?}", outcome.nodes);
}

#[test]
fn a_cluster_without_room_preempts_and_still_serves_everybody() {
    let (workload, kind) = (drawn(300, 30.0, 2), small_kv(45_000));
    let outcome = simulate(&workload, &SimOptions::new(&kind, 2, 1, slo())).unwrap();
    conserved(&workload, &outcome);
    assert_eq!(outcome.refused(), 0);
    let preempted: u64 = outcome.nodes.iter().map(|used| used.preemptions).sum();
    assert!(preempted > 0, "{:?}", outcome.nodes);
    assert!(outcome.nodes[2].kv_peak > 0.9, "{:?}", outcome.nodes);
}

#[test]
fn what_the_profile_does_not_cover_is_refused_by_name() {
    let profile = estimate(gpu("h100").unwrap(), model("smollm2-135m").unwrap()).unwrap();
    let workload = Generator {
        requests: 2,
        arrivals: Arrivals::Even(1.0),
        inputs: Lengths::Constant(30_000),
        outputs: Lengths::Constant(5),
    };
    let options = SimOptions::new(&node(&profile), 1, 1, slo());
    let error = simulate(&workload.draw(1), &options).unwrap_err().to_string();
    assert!(
        error.contains("prefill.context_tokens of") && error.contains("covers 0 to 8192"),
        "{error}"
    );
}
