//! Whole plans, of small workloads.

use crate::plain::node;
use baton_planner::Policy;
use baton_planner::profile::{NodeModel, estimate, gpu, model};
use baton_planner::search::{Answer, Given, Plan, PlanError, Prices, Question, plan};
use baton_planner::stats::Verdict;
use baton_planner::workload::{Arrivals, Generator, Lengths};
use std::sync::Arc;

const ALIKE: Prices = Prices {
    prefill: 1.0,
    decode: 1.0,
};

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
        prefill: h100(),
        decode: h100(),
        slo: slo.parse().unwrap(),
        policy: Policy::Predicted,
    }
}

fn feasible(question: &Question, given: Given, prices: Prices) -> Plan {
    match plan(question, given, prices, &|_| {}).unwrap() {
        Answer::Feasible(plan) => *plan,
        Answer::Infeasible { nearest } => panic!("infeasible, nearest {nearest}"),
    }
}

#[test]
fn a_budget_is_divided_such_that_no_other_division_serves_more() {
    let question = question("ttft_p90=2s,itl_p99=40ms");
    let found = feasible(&question, Given::Nodes(4), ALIKE);
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
        feasible(&question, Given::Nodes(4), ALIKE),
        "the same again, on however many threads"
    );
}

#[test]
fn a_rate_is_served_by_the_fewest_nodes() {
    let question = question("ttft_p90=2s,itl_p99=40ms");
    let found = feasible(&question, Given::Rate(8.0), ALIKE);
    assert!(found.outcome.meets(&question.slo));
    let nodes = found.split.prefill + found.split.decode;
    let less = feasible(&question, Given::Nodes(nodes - 1), ALIKE);
    assert!(less.rate < 8.0 * 1.03, "{} nodes carry {}", nodes - 1, less.rate);
}

#[test]
fn what_cannot_be_is_answered_with_what_can() {
    let mut question = question("ttft_p90=10ms,itl_p99=40ms");
    let Answer::Infeasible { nearest } = plan(&question, Given::Nodes(3), ALIKE, &|_| {}).unwrap() else {
        panic!("feasible")
    };
    assert!(nearest.clauses[0].bound > question.slo.clauses[0].bound);
    assert_eq!(nearest.clauses[1], question.slo.clauses[1], "this one holds");
    question.slo = nearest;
    assert!(matches!(
        plan(&question, Given::Nodes(3), ALIKE, &|_| {}).unwrap(),
        Answer::Feasible(_)
    ));
    question.slo = "itl_p99=1ms".parse().unwrap();
    assert!(matches!(
        plan(&question, Given::Nodes(3), ALIKE, &|_| {}).unwrap(),
        Answer::Infeasible { .. }
    ));
}

#[test]
fn what_is_not_covered_or_not_there_is_an_error() {
    let mut asked = question("ttft_p90=2s");
    let error = plan(&asked, Given::Nodes(1), ALIKE, &|_| {}).unwrap_err();
    assert!(matches!(error, PlanError::Budget { nodes: 1 }), "{error}");
    let profile = estimate(gpu("h100").unwrap(), model("smollm2-135m").unwrap()).unwrap();
    (asked.prefill, asked.decode) = (node(&profile), node(&profile));
    let error = plan(&asked, Given::Nodes(3), ALIKE, &|_| {}).unwrap_err().to_string();
    assert!(error.contains("prefill.context_tokens of"), "{error}");
    asked.workload.first(1);
    let error = plan(&asked, Given::Nodes(3), ALIKE, &|_| {}).unwrap_err();
    assert!(matches!(error, PlanError::NoDuration), "{error}");
}
