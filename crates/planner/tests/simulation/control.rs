//! The controller, on simulated clusters whose load turns to one side.

use crate::plain::{node, plain};
use baton_planner::Nanos;
use baton_planner::control::{Change, ControlOptions, Controller, Directed, Hold, NodeSeen, Observation, Past};
use baton_planner::profile::{Grid, Profile};
use baton_planner::sim::{Outcome, SimOptions, State, simulate, simulate_directed};
use baton_planner::slo::Slo;
use baton_planner::workload::{Arrivals, Generator, Lengths, Workload};
use baton_scheduling::Side;

fn seconds(seconds: f64) -> Nanos {
    Nanos::from_seconds(seconds)
}

fn slo() -> Slo {
    "ttft_p90=1s,itl_p99=30ms".parse().unwrap()
}

/// A decode step takes a millisecond for each sequence in it; changes cost 2 s.
fn profile() -> Profile {
    Profile {
        role_change_s: 2.0,
        startup_s: 5.0,
        decode: Grid::of(vec![1.0, 1e4], vec![0.0, 1e9], |batch, _| batch / 1e3),
        ..plain(0.01)
    }
}

fn drawn(requests: usize, per_second: f64, input: f64, output: u32, seed: u64) -> Workload {
    let generator = Generator {
        requests,
        arrivals: Arrivals::Poisson(per_second),
        inputs: Lengths::Exponential(input),
        outputs: Lengths::Constant(output),
    };
    generator.draw(seed)
}

/// Requests before the mix turns.
const MORNING: usize = 5000;

/// Prompts are long and answers short, and then the other way round.
fn turning() -> Workload {
    let morning = drawn(MORNING, 10.0, 300.0, 60, 1);
    morning.then(seconds(1.0), &drawn(900, 6.0, 20.0, 400, 2)).unwrap()
}

fn options() -> ControlOptions {
    let mut options = ControlOptions::new(slo(), Some(node(&profile())));
    (options.window, options.cooldown, options.drain) = (seconds(60.0), seconds(40.0), seconds(2.0));
    options
}

fn directed(workload: &Workload, prefill: usize, decode: usize, options: ControlOptions) -> (Outcome, Directed) {
    let mut cluster = SimOptions::new(&node(&profile()), prefill, decode, slo());
    cluster.drain = options.drain;
    let mut directed = Directed::new(Controller::new(options));
    let outcome = simulate_directed(workload, &cluster, seconds(10.0), &mut |looked| directed.look(looked)).unwrap();
    (outcome, directed)
}

/// Requests that missed the SLO until then, and since.
fn missed(outcome: &Outcome, noon: Nanos) -> [usize; 2] {
    let missed = outcome.requests.iter().filter(|r| !r.good);
    let morning = missed.clone().filter(|r| r.at < noon).count();
    [morning, missed.count() - morning]
}

#[test]
fn a_mix_that_turns_is_followed_and_then_nothing_is_changed() {
    let day = turning();
    let noon = day.requests()[MORNING].at;
    let fixed: Vec<[usize; 2]> = (1..6)
        .map(|prefill| {
            let cluster = SimOptions::new(&node(&profile()), prefill, 6 - prefill, slo());
            missed(&simulate(&day, &cluster).unwrap(), noon)
        })
        .collect();
    let prefill_of = |best: Option<(usize, &[usize; 2])>| best.map_or(0, |(index, _)| index + 1);
    let best = |half: usize| prefill_of(fixed.iter().enumerate().min_by_key(|(_, missed)| missed[half]));
    assert!(
        best(0) > best(1),
        "the halves do not want different divisions: {fixed:?}"
    );
    for start in [3, 5] {
        let (outcome, directed) = directed(&day, start, 6 - start, options());
        let told = format!("from {start}P: {:?}, fixed: {fixed:?}", directed.changes);
        let ours = missed(&outcome, noon);
        let best_fixed = fixed.iter().map(|[morning, evening]| morning + evening).min().unwrap();
        assert!(ours[0] + ours[1] < best_fixed, "{ours:?} {told}");
        let mut prefill = start;
        let mut turns: Vec<(Nanos, Side)> = Vec::new();
        for (at, change) in &directed.changes {
            let Change::Role { to, nodes } = *change else {
                panic!("{told}")
            };
            prefill = if to == Side::Prefill {
                prefill + nodes
            } else {
                prefill - nodes
            };
            turns.push((*at, to));
        }
        for pair in turns.windows(2) {
            assert!(pair[1].0 >= pair[0].0 + options().cooldown, "{told}");
            // To the other side only as the mix turns.
            assert!(
                pair[1].1 == pair[0].1 || (pair[0].0 < noon && pair[1].0 > noon),
                "{told}"
            );
        }
        let stays = fixed[prefill - 1][1] as f64;
        let least = fixed[best(1) - 1][1] as f64;
        assert!(stays <= least + 0.02 * 900.0, "ends on a wrong division: {told}");
    }
}

#[test]
fn a_load_that_stays_is_not_answered_with_one_change_after_another() {
    let load = || drawn(700, 10.0, 120.0, 40, 4);
    let (outcome, directed) = directed(&load(), 3, 3, options());
    assert!(directed.changes.len() <= 1, "{:?}", directed.changes);
    assert_eq!(outcome, self::directed(&load(), 3, 3, options()).0, "the same again");
}

#[test]
fn scaling_stays_within_the_budget() {
    let adds = |nodes_max: usize| {
        let mut options = options();
        (options.scale, options.nodes_max) = (true, nodes_max);
        let advice = Controller::new(options).look(&seen(3.0, Nanos::ZERO));
        assert!(!advice.rehearsed.is_empty(), "{advice:?}");
        let is_add = |change: &Change| matches!(change, Change::Add { .. });
        advice.rehearsed.iter().filter(|tried| is_add(&tried.change)).count()
    };
    assert_eq!((adds(3), adds(4)), (0, 2), "three nodes are there");
}

fn seen(ttft_s: f64, ready_since: Nanos) -> Observation {
    let node = |side| NodeSeen {
        side,
        state: State::Ready,
        ready_since,
        queued_tokens: 0,
        requests: 0,
        prefill_tokens_per_s: 1000.0,
        kv_used: 0.1,
    };
    let past = |index: u64| Past {
        at: Nanos(index * 100_000_000),
        input: 100,
        tokens: 10,
        output: Some(10),
        ttft: Some(seconds(ttft_s)),
        e2e: Some(seconds(ttft_s + 0.1)),
        late_gaps: 0.0,
        lost: false,
    };
    Observation {
        now: seconds(30.0),
        nodes: vec![node(Side::Prefill), node(Side::Decode), node(Side::Decode)],
        past: (0..290).map(past).collect(),
        ..Observation::default()
    }
}

#[test]
fn without_a_profile_there_is_advice_but_no_change() {
    let mut controller = Controller::new(ControlOptions::new(slo(), None));
    let advice = controller.look(&seen(3.0, Nanos::ZERO));
    assert_eq!(advice.hold, Some(Hold::NoProfile));
    let (change, nodes) = advice.change.unwrap();
    assert_eq!(
        change,
        Change::Role {
            to: Side::Prefill,
            nodes: 1
        }
    );
    assert_eq!(nodes, [1]);
    assert_eq!(controller.look(&seen(0.5, Nanos::ZERO)).hold, Some(Hold::Fine));
}

#[test]
fn cold_starts_and_few_requests_are_no_evidence() {
    let mut controller = Controller::new(options());
    let advice = controller.look(&seen(3.0, seconds(25.0)));
    assert_eq!((advice.hold, advice.signals.judged), (Some(Hold::Fine), 0));
    let mut few = seen(3.0, Nanos::ZERO);
    few.past.truncate(20);
    assert_eq!(controller.look(&few).hold, Some(Hold::TooFew { requests: 20 }));
    let mut changing = seen(3.0, Nanos::ZERO);
    changing.nodes[0].state = State::Draining;
    assert_eq!(controller.look(&changing).hold, Some(Hold::Changing));
}
