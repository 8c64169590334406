//! The plan as one JSON value.

use super::{About, bottleneck, cost_per_mtok, curves, fix, words};
use crate::profile::Kind;
use crate::search::{Answer, Given, Nearest, Plan, Regret, Rival, Side, Split};
use crate::slo::{Clause, Metric};
use crate::workload::Spread;
use serde_json::{Map, Value, json};

/// All that the terminal and the page show. Times are in seconds, rates in requests per second.
pub fn value(about: &About<'_>, answer: &Answer) -> Value {
    let mut value = match answer {
        Answer::Feasible(plan) => feasible(about, plan),
        Answer::Infeasible { nearest } => {
            let mut value = json!({
                "feasible": false,
                "message": words::nearest(nearest, &about.question.classes),
            });
            match nearest {
                Nearest::Slo(slo) => value["nearest_slo"] = json!(slo.to_string()),
                Nearest::Rate(rate, split) => {
                    value["nearest_rate_rps"] = json!(rate);
                    value["nearest_nodes"] = nodes(about, split);
                }
            }
            value
        }
    };
    value["question"] = question(about);
    value["profile"] = json!({"name": about.profiles[0].name, "kind": about.profiles[0].kind});
    value["profiles"] = profiles(about);
    value
}

fn feasible(about: &About<'_>, plan: &Plan) -> Value {
    let classes = &about.question.classes;
    let slo = &about.question.slo;
    let attainment: Map<String, Value> = slo
        .clauses
        .iter()
        .map(|clause| (clause.to_string(), json!(plan.outcome.attainment(clause))))
        .collect();
    let verdict = |rival: &Rival| verdict(about, plan, rival);
    let fixes: Vec<Value> = plan
        .bottleneck
        .fixes
        .iter()
        .map(|one| {
            let per_request = one.per_request(plan.rate);
            json!({
                "fix": fix(one, classes), "rate_rps": one.rate, "gain": (one.rate / plan.rate - 1.0).max(0.0),
                "cost_per_hour": about.priced.then_some(one.per_hour),
                "cost_per_hour_per_rps": (about.priced && per_request.is_finite()).then_some(per_request),
            })
        })
        .collect();
    let split = &plan.split;
    json!({
        "feasible": true,
        "prefill": split.prefill(),
        "decode": split.decode(),
        "name": split.name(classes),
        "nodes": nodes(about, split),
        "rate_rps": plan.rate,
        "offered_rps": plan.outcome.offered(),
        "goodput_rps": {"mid": plan.goodput.mid, "low": plan.goodput.low, "high": plan.goodput.high},
        "attainment": attainment,
        "percentiles": percentiles(plan),
        "bottleneck": bottleneck(plan, classes, about.priced),
        "fixes": fixes,
        "cost_per_hour": about.priced.then(|| split.per_hour(classes)),
        "cost_per_mtok": about.priced.then(|| cost_per_mtok(plan, classes)),
        "verdicts": plan.rivals.iter().filter(|rival| rival.split != plan.split).map(verdict).collect::<Vec<_>>(),
        "divisions": plan.rivals.iter().map(verdict).collect::<Vec<_>>(),
        "regret": plan.regret.iter().map(|regret| shifted(about, regret)).collect::<Vec<_>>(),
        "error_bar": error_bar(about),
        "utilisation": utilisation(about, plan),
        "by_means": by_means(about, plan),
        "distributions": Metric::ALL.iter().map(|metric| {
            (metric.name().to_owned(), json!(curves::shares(&plan.outcome, *metric)))
        }).collect::<Map<String, Value>>(),
        "simulations": plan.simulations,
    })
}

fn nodes(about: &About<'_>, split: &Split) -> Value {
    let each = about.question.classes.iter().enumerate().map(|(class, of)| {
        json!({
            "class": of.name, "prefill": split.count(class, Side::Prefill), "decode": split.count(class, Side::Decode),
        })
    });
    each.collect()
}

fn verdict(about: &About<'_>, plan: &Plan, rival: &Rival) -> Value {
    let classes = &about.question.classes;
    let chosen = rival.split == plan.split;
    json!({
        "prefill": rival.split.prefill(), "decode": rival.split.decode(), "name": rival.split.name(classes),
        "goodput_rps": rival.goodput, "attainment": rival.attainment, "meets": rival.meets, "chosen": chosen,
        "beaten": if chosen { Value::Null } else { json!(rival.beaten.words()) },
    })
}

fn percentiles(plan: &Plan) -> Map<String, Value> {
    let each = Metric::ALL.iter().map(|metric| {
        let at = |share| plan.outcome.percentile(*metric, share).map(|time| time.seconds());
        let shares = [("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)];
        let times: Map<String, Value> = shares
            .map(|(name, share)| (name.to_owned(), json!(at(share))))
            .into_iter()
            .collect();
        (metric.name().to_owned(), Value::Object(times))
    });
    each.collect()
}

fn shifted(about: &About<'_>, regret: &Regret) -> Value {
    match &regret.outcome {
        Ok(shifted) => json!({
            "shift": regret.shift, "goodput_rps": shifted.ours,
            "best_prefill": shifted.best_split.prefill(), "best_decode": shifted.best_split.decode(),
            "best": shifted.best_split.name(&about.question.classes),
            "best_goodput_rps": shifted.best, "regret": shifted.regret(), "prompts_cut": shifted.cut,
        }),
        Err(reason) => json!({"shift": regret.shift, "unknown": reason}),
    }
}

/// How far plans of these profiles were from clusters; nothing where none was compared.
fn error_bar(about: &About<'_>) -> Value {
    let bars: Map<String, Value> = about
        .profiles
        .iter()
        .flat_map(|profile| &profile.error_bars)
        .map(|bar| (bar.metric.clone(), json!(bar.error)))
        .collect();
    if bars.is_empty() {
        Value::Null
    } else {
        Value::Object(bars)
    }
}

/// Means over the nodes of each class on each side.
fn utilisation(about: &About<'_>, plan: &Plan) -> Value {
    let (mut all, mut at) = (Vec::new(), 0);
    for side in [Side::Prefill, Side::Decode] {
        for (class, of) in about.question.classes.iter().enumerate() {
            let count = plan.split.count(class, side);
            let nodes = &plan.outcome.nodes[at..at + count];
            at += count;
            if count == 0 {
                continue;
            }
            let mean = |of: fn(&crate::sim::NodeUse) -> f64| nodes.iter().map(of).sum::<f64>() / count as f64;
            all.push(json!({
                "side": side.name(), "class": of.name, "nodes": count,
                "prefilling": mean(|node| node.prefilling), "decoding": mean(|node| node.decoding),
                "kv_peak": nodes.iter().map(|node| node.kv_peak).fold(0.0, f64::max),
                "preemptions": nodes.iter().map(|node| node.preemptions).sum::<u64>(),
            }));
        }
    }
    Value::Array(all)
}

fn by_means(about: &About<'_>, plan: &Plan) -> Value {
    let each = about
        .question
        .classes
        .iter()
        .zip(&plan.matched.classes)
        .map(|(class, matched)| match matched {
            Some(matched) => json!({
                "class": class.name, "prefill_rps": matched.prefill_rate, "decode_rps": matched.decode_rate,
                "batch": matched.batch, "step_s": matched.step_s, "limit": format!("{:?}", matched.limit),
            }),
            None => json!({"class": class.name, "prefill_rps": null}),
        });
    each.collect()
}

fn question(about: &About<'_>) -> Value {
    let question = about.question;
    let workload = &question.workload;
    let (input, output) = workload.mean_lengths();
    let clause = |clause: &Clause| {
        json!({
            "text": clause.to_string(), "metric": clause.metric.name(), "share": clause.share(),
            "bound_s": clause.bound.seconds(),
        })
    };
    let given = match about.given {
        Given::Nodes(nodes) => format!("{nodes} nodes: which division keeps the SLO at the highest rate?"),
        Given::All => "all nodes of the file: which division keeps the SLO at the highest rate?".to_owned(),
        Given::Rate(rate) => format!("{rate} requests/s: which nodes are the cheapest that keep the SLO?"),
    };
    let ticks = match about.spread {
        Spread::Ticks(tick) => Some(tick.seconds()),
        Spread::Raw => None,
    };
    json!({
        "given": given,
        "trace": about.trace,
        "requests": workload.len(),
        "input_tokens_mean": input,
        "output_tokens_mean": output,
        "prefix_shared": workload.shared_share(),
        "quantised_s": ticks,
        "slo": question.slo.clauses.iter().map(clause).collect::<Vec<_>>(),
        "routing_policy": question.policy.to_string(),
    })
}

fn profiles(about: &About<'_>) -> Value {
    let each = about
        .profiles
        .iter()
        .zip(&about.question.classes)
        .map(|(profile, class)| {
            let estimated = match profile.kind {
                Kind::Estimated => true,
                Kind::Measured => false,
            };
            json!({
                "class": class.name, "name": profile.name, "hardware": profile.hardware, "model": profile.model.name,
                "estimated": estimated, "sources": profile.sources, "kv_capacity_tokens": profile.kv_capacity_tokens,
                "price": about.priced.then(|| json!({"prefill": class.prices.prefill, "decode": class.prices.decode})),
                "count_max": class.count_max,
                "compared": profile.error_bars.iter().map(|bar| {
                    json!({"metric": bar.metric, "error": bar.error, "run": bar.run})
                }).collect::<Vec<_>>(),
                "residuals": profile.residuals.iter().map(|residual| {
                    json!({"table": residual.table, "p50": residual.p50, "p90": residual.p90, "count": residual.count})
                }).collect::<Vec<_>>(),
            })
        });
    each.collect()
}
