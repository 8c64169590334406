//! The plan for people.

use baton_planner::profile::Kind;
use baton_planner::report::{About, bottleneck, cost_per_mtok, fix, nearest};
use baton_planner::search::{Answer, Plan};
use baton_planner::slo::Metric;
use baton_planner::workload::Spread;
use std::fmt::Write as _;

/// Divisions shown on each side of the chosen one.
const SHOWN: usize = 4;

pub fn text(about: &About<'_>, answer: &Answer) -> String {
    let plan = match answer {
        Answer::Feasible(plan) => plan,
        Answer::Infeasible { nearest: instead } => return nearest(instead, &about.question.classes),
    };
    let classes = &about.question.classes;
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{}: {:.2} requests/s within the SLO (95%: {:.2} to {:.2}), of {:.2} that come",
        plan.split.name(classes),
        plan.goodput.mid,
        plan.goodput.low,
        plan.goodput.high,
        plan.outcome.offered()
    );
    basis(&mut out, about);
    times(&mut out, about, plan);
    rivals(&mut out, about, plan);
    let _ = writeln!(out, "\nbottleneck: {}", bottleneck(plan, classes, about.priced));
    for other in plan
        .bottleneck
        .fixes
        .iter()
        .skip(1)
        .filter(|fix| fix.rate > plan.rate * 1.01)
    {
        let gain = 100.0 * (other.rate / plan.rate - 1.0);
        let cost = match about.priced {
            true => format!(" for {:.2} per hour", other.per_hour),
            false => String::new(),
        };
        let _ = writeln!(out, "            {} brings {gain:.0}%{cost}", fix(other, classes));
    }
    for (class, matched) in classes.iter().zip(&plan.matched.classes) {
        let Some(matched) = matched else { continue };
        let _ = writeln!(
            out,
            "by means:   one {} node computes {:.2} prompts/s, or decodes {:.2} answers/s ({} at once, {:.1} ms per step, bound by {:?})",
            class.name,
            matched.prefill_rate,
            matched.decode_rate,
            matched.batch,
            matched.step_s * 1e3,
            matched.limit
        );
    }
    shifts(&mut out, about, plan);
    if about.priced {
        let _ = writeln!(
            out,
            "cost:       {:.2} per hour, {:.3} per million tokens of answers within the SLO",
            plan.split.per_hour(classes),
            cost_per_mtok(plan, classes)
        );
    }
    let _ = writeln!(out, "{} simulations", plan.simulations);
    out
}

fn shifts(out: &mut String, about: &About<'_>, plan: &Plan) {
    for regret in &plan.regret {
        let _ = match &regret.outcome {
            Ok(shifted) => {
                let cut = match shifted.cut > 0.0 {
                    true => format!(
                        " ({:.1}% of the prompts cut to what the profile covers)",
                        100.0 * shifted.cut
                    ),
                    false => String::new(),
                };
                writeln!(
                    out,
                    "if {:<9} {:.2} requests/s; {} would serve {:.2}: regret {:.0}%{cut}",
                    format!("{}:", regret.shift),
                    shifted.ours,
                    shifted.best_split.name(&about.question.classes),
                    shifted.best,
                    100.0 * shifted.regret()
                )
            }
            Err(reason) => writeln!(out, "if {}: not known: {reason}", regret.shift),
        };
    }
}

fn basis(out: &mut String, about: &About<'_>) {
    for profile in about.profiles {
        let kind = match profile.kind {
            Kind::Estimated => "ESTIMATED from data sheets, nobody ran it",
            Kind::Measured => "measured",
        };
        let _ = writeln!(out, "profile:    {}: {kind}", profile.name);
        let bars: Vec<String> = profile
            .error_bars
            .iter()
            .map(|bar| format!("{} {:+.0}%", bar.metric, 100.0 * bar.error))
            .collect();
        let bars = match bars.is_empty() {
            true => {
                "none: no plan of this profile was compared with a cluster; the interval is of chance alone".to_owned()
            }
            false => bars.join(", "),
        };
        let _ = writeln!(out, "error bar:  {bars}");
    }
    if let Spread::Ticks(tick) = about.spread {
        let _ = writeln!(
            out,
            "trace:      its times are quantised to {} s; requests were spread evenly by chance over each tick",
            tick.seconds()
        );
    }
}

fn times(out: &mut String, about: &About<'_>, plan: &Plan) {
    let outcome = &plan.outcome;
    let _ = writeln!(out, "\n{:<6} {:>10} {:>10} {:>10}", "", "p50", "p90", "p99");
    for metric in Metric::ALL {
        let cells = [0.5, 0.9, 0.99].map(|share| match outcome.percentile(metric, share) {
            Some(time) => format!("{:.1} ms", time.seconds() * 1e3),
            None => "refused".to_owned(),
        });
        let _ = writeln!(
            out,
            "{:<6} {:>10} {:>10} {:>10}",
            metric.name(),
            cells[0],
            cells[1],
            cells[2]
        );
    }
    for clause in &about.question.slo.clauses {
        let _ = writeln!(out, "{clause}: {:.2}% within", 100.0 * outcome.attainment(clause));
    }
    let (prefill, decode) = outcome.nodes.split_at(outcome.prefill_nodes);
    for (side, nodes) in [("prefill", prefill), ("decode", decode)]
        .into_iter()
        .filter(|(_, nodes)| !nodes.is_empty())
    {
        let mean = |of: fn(&baton_planner::sim::NodeUse) -> f64| nodes.iter().map(of).sum::<f64>() / nodes.len() as f64;
        let _ = writeln!(
            out,
            "{side} nodes compute prompts {:.0}% and decode {:.0}% of the time; KV at most {:.0}% full; {} preemptions",
            100.0 * mean(|n| n.prefilling),
            100.0 * mean(|n| n.decoding),
            100.0 * nodes.iter().map(|n| n.kv_peak).fold(0.0, f64::max),
            nodes.iter().map(|n| n.preemptions).sum::<u64>()
        );
    }
}

fn rivals(out: &mut String, about: &About<'_>, plan: &Plan) {
    let _ = writeln!(out, "\nat the same {:.2} requests/s:", plan.rate);
    for rival in &plan.rivals {
        let chosen = rival.split == plan.split;
        if rival.split.prefill().abs_diff(plan.split.prefill()) > SHOWN && rival.split.prefill() != 0 {
            continue;
        }
        let shares: Vec<String> = about
            .question
            .slo
            .clauses
            .iter()
            .zip(&rival.attainment)
            .map(|(clause, share)| format!("{} {:.1}%", clause.metric.name(), 100.0 * share))
            .collect();
        let goodput = rival
            .goodput
            .map_or("outside the profile".to_owned(), |goodput| format!("{goodput:.2}/s"));
        let verdict = match chosen {
            true => "chosen".to_owned(),
            false => format!("beaten: {}", rival.beaten.words()),
        };
        let name = rival.split.name(&about.question.classes);
        let _ = writeln!(out, "{name:>10} {goodput:>10}  {}  {verdict}", shares.join("  "));
    }
}
