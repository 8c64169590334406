//! Whole plans, of small workloads.

use crate::plain::node;
use baton_planner::Policy;
use baton_planner::profile::{NodeModel, estimate, gpu, model};
use baton_planner::search::{Answer, Given, Nearest, NodeClass, Plan, PlanError, Prices, Question, Side, Split, plan};
use baton_planner::stats::Verdict;
use baton_planner::workload::{Arrivals, Generator, Lengths};
use std::sync::Arc;

fn alike(node: &Arc<NodeModel>) -> Vec<NodeClass> {
    vec![NodeClass::new(node, Prices::both(1.0))]
}

fn h100() -> Arc<NodeModel> {
    node(&estimate(gpu("h100").unwrap(), model("llama-3.1-8b").unwrap()).unwrap())
}

fn question(slo: &str) -> Question {
    let generator = Generator {
        requests: 500,
        arrivals: Arrivals::Poisson(2.0),
        inputs: Lengths::Exponential(6000.0),
        outputs: Lengths::Constant(150),
    };
    Question {
        workload: generator.draw(3),
        classes: alike(&h100()),
        slo: slo.parse().unwrap(),
        policy: Policy::Predicted,
    }
}

fn feasible(question: &Question, given: Given) -> Plan {
    match plan(question, given, &|_| {}).unwrap() {
        Answer::Feasible(plan) => *plan,
        Answer::Infeasible { nearest } => panic!("infeasible, nearest {nearest:?}"),
    }
}

#[test]
fn a_budget_is_divided_such_that_no_other_division_serves_more() {
    let question = question("ttft_p90=2s,itl_p99=40ms");
    let found = feasible(&question, Given::Nodes(4));
    assert!(found.outcome.meets(&question.slo));
    assert!(found.goodput.low <= found.goodput.mid && found.goodput.mid <= found.goodput.high);
    assert_eq!(found.rivals.len(), 4, "one of them without prefill nodes");
    assert!(
        found.rivals.iter().all(|rival| rival.beaten != Verdict::No),
        "{:?}",
        found.rivals
    );
    assert_eq!(found.regret.len(), 3);
    assert!(
        found.regret.iter().all(|shifted| shifted.outcome.is_ok()),
        "{:?}",
        found.regret
    );
    assert_eq!(
        found,
        feasible(&question, Given::Nodes(4)),
        "the same again, on however many threads"
    );
}

#[test]
fn a_rate_is_served_by_the_fewest_nodes() {
    let question = question("ttft_p90=2s,itl_p99=40ms");
    let found = feasible(&question, Given::Rate(8.0));
    assert!(found.outcome.meets(&question.slo));
    let nodes = found.split.nodes();
    let less = feasible(&question, Given::Nodes(nodes - 1));
    assert!(less.rate < 8.0 * 1.03, "{} nodes carry {}", nodes - 1, less.rate);
}

#[test]
fn what_cannot_be_is_answered_with_what_can() {
    let mut question = question("ttft_p90=10ms,itl_p99=40ms");
    let Answer::Infeasible {
        nearest: Nearest::Slo(nearest),
    } = plan(&question, Given::Nodes(3), &|_| {}).unwrap()
    else {
        panic!("feasible")
    };
    assert!(nearest.clauses[0].bound > question.slo.clauses[0].bound);
    assert_eq!(nearest.clauses[1], question.slo.clauses[1], "this one holds");
    question.slo = nearest;
    assert!(matches!(
        plan(&question, Given::Nodes(3), &|_| {}).unwrap(),
        Answer::Feasible(_)
    ));
    question.slo = "itl_p99=1ms".parse().unwrap();
    assert!(matches!(
        plan(&question, Given::Nodes(3), &|_| {}).unwrap(),
        Answer::Infeasible { .. }
    ));
}

#[test]
fn what_is_not_covered_or_not_there_is_an_error() {
    let mut asked = question("ttft_p90=2s");
    let error = plan(&asked, Given::Nodes(1), &|_| {}).unwrap_err();
    assert!(matches!(error, PlanError::Budget { nodes: 1 }), "{error}");
    let profile = estimate(gpu("h100").unwrap(), model("smollm2-135m").unwrap()).unwrap();
    asked.classes = alike(&node(&profile));
    let error = plan(&asked, Given::Nodes(3), &|_| {}).unwrap_err().to_string();
    assert!(error.contains("prefill.context_tokens of"), "{error}");
    asked.workload.first(1);
    let error = plan(&asked, Given::Nodes(3), &|_| {}).unwrap_err();
    assert!(matches!(error, PlanError::NoDuration), "{error}");
}

/// Half as fast at a third of the price.
fn mixed(question: &mut Question, counts: [usize; 2]) {
    let l40s = node(&estimate(gpu("l40s").unwrap(), model("llama-3.1-8b").unwrap()).unwrap());
    let class = |node: &Arc<NodeModel>, name: &str, price, count_max| NodeClass {
        name: name.to_owned(),
        count_max: Some(count_max),
        ..NodeClass::new(node, Prices::both(price))
    };
    question.classes = vec![
        class(&h100(), "h100", 3.0, counts[0]),
        class(&l40s, "l40s", 1.0, counts[1]),
    ];
}

#[test]
fn a_rate_is_served_by_the_cheapest_mix_of_kinds_and_not_by_one_kind_at_more_cost() {
    let mut asked = question("ttft_p90=2s,itl_p99=60ms");
    mixed(&mut asked, [4, 6]);
    let found = feasible(&asked, Given::Rate(3.0));
    assert!(found.outcome.meets(&asked.slo));
    let cost = found.split.per_hour(&asked.classes);
    for only in 0..2 {
        let mut one = asked.clone();
        one.classes = vec![asked.classes[only].clone()];
        if let Answer::Feasible(alone) = plan(&one, Given::Rate(3.0), &|_| {}).unwrap() {
            let alone = alone.split.per_hour(&one.classes);
            assert!(
                cost <= alone + 1e-9,
                "{} costs {cost}, one kind {alone}",
                found.split.name(&asked.classes)
            );
        }
    }
    assert!(
        found
            .rivals
            .iter()
            .all(|rival| (0..2).all(|class| rival.split.of_class(class) == found.split.of_class(class)))
    );
    // Every fix is priced, and the cheapest for what it brings comes first.
    let costs: Vec<f64> = found
        .bottleneck
        .fixes
        .iter()
        .map(|fix| fix.per_request(found.rate))
        .collect();
    assert!(costs.len() == 8 && costs.is_sorted(), "{costs:?}");
}

#[test]
fn all_nodes_of_a_mix_are_divided_and_a_rate_beyond_them_is_answered_with_theirs() {
    let mut asked = question("ttft_p90=2s,itl_p99=60ms");
    mixed(&mut asked, [1, 2]);
    asked.classes[0].decode = false;
    let found = feasible(&asked, Given::All);
    assert_eq!(
        (found.split.of_class(0), found.split.of_class(1)),
        (1, 2),
        "all are used"
    );
    assert_eq!(found.split.count(0, Side::Decode), 0);
    let Answer::Infeasible {
        nearest: Nearest::Rate(rate, split),
    } = plan(&asked, Given::Rate(found.rate * 3.0), &|_| {}).unwrap()
    else {
        panic!("so few nodes cannot serve so much")
    };
    assert_eq!((rate, split), (found.rate, found.split));
    asked.classes[1].count_max = None;
    let error = plan(&asked, Given::All, &|_| {}).unwrap_err().to_string();
    assert!(error.contains("l40s has no count"), "{error}");
    let other = node(&estimate(gpu("h100").unwrap(), model("qwen3-8b").unwrap()).unwrap());
    asked.classes[1].node = other;
    let error = plan(&asked, Given::Rate(1.0), &|_| {}).unwrap_err().to_string();
    assert!(error.contains("cannot hand KV over to each other"), "{error}");
}

#[test]
fn a_split_counts_its_nodes() {
    let split = Split::of(3, 5);
    assert_eq!(
        (split.prefill(), split.decode(), split.to_string()),
        (3, 5, "3P+5D".to_owned())
    );
}
