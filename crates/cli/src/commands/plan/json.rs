//! The plan for programs: one line.

use super::print::{About, bottleneck, cost_per_mtok, regret};
use baton_planner::search::{Answer, Plan};
use serde_json::{Map, Value, json};

pub fn line(about: &About<'_>, answer: &Answer) -> String {
    let value = match answer {
        Answer::Infeasible { nearest } => json!({"feasible": false, "nearest_slo": nearest.to_string()}),
        Answer::Feasible(plan) => feasible(about, plan),
    };
    value.to_string()
}

fn feasible(about: &About<'_>, plan: &Plan) -> Value {
    let clauses = &about.question.slo.clauses;
    let attainment: Map<String, Value> = clauses
        .iter()
        .map(|clause| (clause.to_string(), json!(plan.outcome.attainment(clause))))
        .collect();
    let verdicts: Vec<Value> = plan
        .rivals
        .iter()
        .filter(|rival| rival.split != plan.split)
        .map(|rival| {
            json!({
                "prefill": rival.split.prefill, "decode": rival.split.decode, "goodput_rps": rival.goodput,
                "beaten": rival.beaten.words(),
            })
        })
        .collect();
    let regrets: Vec<Value> = plan
        .regret
        .iter()
        .map(|shifted| match &shifted.outcome {
            Ok((ours, split, best)) => json!({
                "shift": shifted.shift, "goodput_rps": ours, "best_prefill": split.prefill, "best_decode": split.decode,
                "best_goodput_rps": best, "regret": regret(*ours, *best),
            }),
            Err(reason) => json!({"shift": shifted.shift, "unknown": reason}),
        })
        .collect();
    let bars: Map<String, Value> = about
        .profile
        .error_bars
        .iter()
        .map(|bar| (bar.metric.clone(), json!(bar.error)))
        .collect();
    json!({
        "feasible": true,
        "prefill": plan.split.prefill,
        "decode": plan.split.decode,
        "rate_rps": plan.rate,
        "goodput_rps": {"mid": plan.goodput.mid, "low": plan.goodput.low, "high": plan.goodput.high},
        "attainment": attainment,
        "bottleneck": bottleneck(plan),
        "cost_per_mtok": about.prices.map(|prices| cost_per_mtok(plan, prices)),
        "verdicts": verdicts,
        "regret": regrets,
        "error_bar": if bars.is_empty() { Value::Null } else { Value::Object(bars) },
        "profile": {"name": about.profile.name, "kind": about.profile.kind},
        "simulations": plan.simulations,
    })
}
