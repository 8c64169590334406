//! The simulator reproduces what is known from theory: single queues, rate matching where lengths are constant, and that
//! means hide what percentiles miss.

use crate::plain::{node, plain};
use baton_planner::Nanos;
use baton_planner::predict::{self, Case, Figures};
use baton_planner::profile::{Contended, Grid, HandoverTail, NodeModel, Steps, estimate, gpu, model};
use baton_planner::search::{RateMatch, Split};
use baton_planner::sim::{Outcome, SimOptions, simulate};
use baton_planner::slo::{Metric, Slo};
use baton_planner::stats;
use baton_planner::workload::{Arrivals, Generator, Lengths, Workload};
use baton_scheduling::Policy;
use std::sync::Arc;

/// One prefill node, and answers of one token: a single queue. Gives the waits after a warm-up.
fn waits(inputs: Lengths, load: f64, seed: u64) -> Vec<f64> {
    let workload = Generator {
        requests: 22_000,
        arrivals: Arrivals::Poisson(load),
        inputs,
        outputs: Lengths::Constant(1),
    };
    let workload = workload.draw(seed);
    let mut options = SimOptions::new(&node(&plain(0.01)), 1, 1, Slo::default());
    options.policy = Policy::LeastLoaded;
    let outcome = simulate(&workload, &options).unwrap();
    let wait = |(served, request): (&baton_planner::sim::Served, &baton_planner::workload::Request)| {
        served.ttft.unwrap().seconds() - f64::from(request.input) / 1e3
    };
    let waits = outcome.requests.iter().zip(workload.requests()).map(wait);
    waits.skip(2000).collect()
}

#[test]
fn m_d_1_waits_as_long_as_pollaczek_and_khinchine_say() {
    for load in [0.5, 0.8] {
        let mean = stats::mean(&waits(Lengths::Constant(1000), load, 11));
        let expected = load / (2.0 * (1.0 - load));
        assert!(mean.contains(expected), "load {load}: {mean:?}, expected {expected}");
        assert!(
            (mean.mid / expected - 1.0).abs() < 0.15,
            "load {load}: {mean:?}, expected {expected}"
        );
    }
}

#[test]
fn m_g_1_waits_as_long_as_pollaczek_and_khinchine_say() {
    // Exponential service of mean 1 s: the second moment is 2 s^2, so that the wait is twice that of constant service.
    let mean = stats::mean(&waits(Lengths::Exponential(1000.0), 0.7, 12));
    let expected = 0.7 * 2.0 / (2.0 * 0.3);
    assert!(mean.contains(expected), "{mean:?}, expected {expected}");
    // Log-normal service: E[S^2] = median^2 exp(2 sigma^2), E[S] = median exp(sigma^2 / 2).
    let sigma: f64 = 0.8;
    let law = Lengths::LogNormal {
        median: 1000.0,
        sigma,
        max: 100_000,
    };
    let rate = 0.4;
    let (first, second) = ((sigma * sigma / 2.0).exp(), (2.0 * sigma * sigma).exp());
    let expected = rate * second / (2.0 * (1.0 - rate * first));
    let mean = stats::mean(&waits(law, rate, 13));
    assert!(mean.contains(expected), "{mean:?}, expected {expected}");
}

#[test]
fn a_hand_over_makes_the_first_gap_longer_by_its_size_and_more_so_where_its_prefill_node_goes_on() {
    let generator = Generator {
        requests: 2,
        arrivals: Arrivals::Even(10.0),
        inputs: Lengths::Constant(1000),
        outputs: Lengths::Constant(2),
    };
    let mut profile = plain(0.01);
    profile.handover_tail = HandoverTail {
        idle: vec![0.001],
        busy: vec![0.029],
        seconds_per_byte: 0.001 / (1000.0 * profile.model.kv_bytes_per_token as f64),
    };
    let outcome = served(&generator.draw(1), &node(&profile), (1, 1), &Slo::default());
    let gaps: Vec<f64> = outcome.requests.iter().map(|r| r.tpot().unwrap().seconds()).collect();
    let near = |gap: f64, wanted: f64| (gap - wanted).abs() < 1e-6;
    assert!(near(gaps[0], 0.04) && near(gaps[1], 0.012), "{gaps:?}");
}

fn h100() -> Arc<NodeModel> {
    let profile = estimate(gpu("h100").unwrap(), model("llama-3.1-8b").unwrap()).unwrap();
    node(&profile)
}

fn constant(rate: f64) -> Workload {
    let generator = Generator {
        requests: 2500,
        arrivals: Arrivals::Even(rate),
        inputs: Lengths::Constant(4096),
        outputs: Lengths::Constant(300),
    };
    generator.draw(1)
}

/// Without local prefill, of which rate matching knows nothing either.
fn served(workload: &Workload, node: &Arc<NodeModel>, split: (usize, usize), slo: &Slo) -> Outcome {
    let mut options = SimOptions::new(node, split.0, split.1, slo.clone());
    options.policy = Policy::LeastLoaded;
    simulate(workload, &options).unwrap()
}

#[test]
fn with_constant_lengths_rate_matching_is_right() {
    let (node, slo) = (h100(), "ttft_p90=2s,itl_p90=25ms".parse::<Slo>().unwrap());
    let matched = RateMatch::of(&constant(1.0), &node, &slo).unwrap().unwrap();
    let best = matched.best(8);
    let rate = matched.rate(best.0, best.1);
    let at = |share: f64, split| served(&constant(rate * share), &node, split, &slo);
    let below = at(0.85, best);
    assert!(below.meets(&slo), "{best:?} at 85% of {rate}: {:?}", below.good_share());
    let above = at(1.25, best);
    assert!(
        !above.meets(&slo),
        "{best:?} at 125% of {rate}: {:?}",
        above.good_share()
    );
    // No other division of the nodes serves more at the rate that this one is matched to.
    let good = |prefill| at(1.0, (prefill, 8 - prefill)).good_share();
    let winner = (1..8).max_by(|a, b| good(*a).total_cmp(&good(*b))).unwrap();
    assert!(winner.abs_diff(best.0) <= 1, "matched {best:?}, simulated {winner}P");
}

#[test]
fn means_hide_a_cliff() {
    // Lengths as those of Mooncake's conversations: heavy-tailed, median 6,909 and mean 12,035 tokens.
    let generator = Generator {
        requests: 3000,
        arrivals: Arrivals::Poisson(6.0),
        inputs: Lengths::LogNormal {
            median: 6909.0,
            sigma: 1.05,
            max: 126_000,
        },
        outputs: Lengths::Constant(343),
    };
    let workload = generator.draw(4);
    let (node, slo) = (h100(), "ttft_p90=3s,itl_p99=50ms".parse::<Slo>().unwrap());
    let matched = RateMatch::of(&workload, &node, &slo).unwrap().unwrap();
    let (enough, _) = matched.needed(workload.rate());
    let run = |prefill| served(&workload, &node, (prefill, 8 - prefill), &slo);
    let mean_ttft = |outcome: &Outcome| {
        let times: Vec<f64> = outcome
            .requests
            .iter()
            .filter_map(|r| r.ttft)
            .map(|t| t.seconds())
            .collect();
        times.iter().sum::<f64>() / times.len() as f64
    };
    let clause = *slo.on(Metric::Ttft).unwrap();
    let (less, matched, more) = (run(enough - 1), run(enough), run(enough + 1));
    let shares = [&less, &matched, &more].map(|outcome| outcome.attainment(&clause));
    let figures = format!(
        "{enough}P by means: shares {shares:?}, mean TTFT {} s",
        mean_ttft(&matched)
    );
    assert!(mean_ttft(&matched) < 3.0, "the mean says that it is enough: {figures}");
    assert!(shares[1] < 0.9, "the percentile says that it is not: {figures}");
    assert!(shares[2] >= 0.9, "one more is: {figures}");
    assert!(shares[0] < 0.5, "one less is off the cliff: {figures}");
}

#[test]
fn what_is_expected_is_the_mean_over_machines_a_little_faster_and_slower() {
    let profile = plain(0.01);
    let slo = Slo::default();
    let case = Case {
        profile: &profile,
        split: Split::of(1, 1),
        policy: Policy::Predicted,
        slo: &slo,
    };
    let generator = Generator {
        requests: 20,
        arrivals: Arrivals::Even(0.3),
        inputs: Lengths::Constant(1000),
        outputs: Lengths::Constant(2),
    };
    let workload = generator.draw(1);
    let one = predict::predict(&case, &workload).unwrap();
    let (figures, busy) = predict::expect(&case, &workload).unwrap();
    let near = |a: f64, b: f64| (a / b - 1.0).abs() < 0.01;
    let ttft = |figures: &Figures| figures.get("ttft_p50").unwrap();
    assert!(near(ttft(&figures), ttft(&one.figures)), "nobody waits: {figures:?}");
    assert!(
        near(busy[0], one.busy[0]) && near(busy[1], one.busy[1]),
        "{busy:?}, {:?}",
        one.busy
    );
    assert_eq!(predict::expect(&case, &workload).unwrap(), (figures, busy));
}

#[test]
fn steps_take_what_they_take_beside_what_the_other_node_does_then() {
    let mut profile = plain(0.01);
    let times = |grid: &Grid, factor: f64| {
        let mut grid = grid.clone();
        grid.seconds.iter_mut().flatten().for_each(|seconds| *seconds *= factor);
        grid
    };
    profile.contended = Some(Contended {
        prefilling: Steps {
            prefill: profile.prefill.clone(),
            decode: times(&profile.decode, 2.0),
        },
        decoding: Steps {
            prefill: times(&profile.prefill, 2.0),
            decode: profile.decode.clone(),
        },
    });
    // A prompt of 1 s, then 100 steps of 10 ms. Amid them another prompt of 1 s comes.
    let mut workload = Workload::empty(None);
    workload.push(Nanos::ZERO, 1000, 101, &[]);
    workload.push(Nanos::from_seconds(1.5), 1000, 1, &[]);
    let ends = |neighbours: bool| {
        let mut options = SimOptions::new(&node(&profile), 1, 1, Slo::default());
        (options.policy, options.neighbours) = (Policy::LeastLoaded, neighbours);
        let outcome = simulate(&workload, &options).unwrap();
        [0, 1].map(|request: usize| outcome.requests[request].e2e.unwrap().seconds())
    };
    let near = |found: [f64; 2], wanted: [f64; 2]| {
        let close = |(a, b): (f64, f64)| (a - b).abs() < 0.025;
        assert!(found.into_iter().zip(wanted).all(close), "{found:?} is not {wanted:?}");
    };
    near(ends(false), [2.0, 1.0]);
    // From 1.5 s on both take twice as long; at 2.5 s the first one ends, and half of the prompt is left, alone.
    near(ends(true), [2.5, 1.5]);
}
