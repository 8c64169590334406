//! The plan for people.

use baton_planner::profile::{Kind, Profile};
use baton_planner::search::{Answer, Plan, Prices, Question};
use baton_planner::slo::Metric;
use baton_planner::workload::Spread;
use std::fmt::Write as _;

/// What was planned with.
pub struct About<'a> {
    pub profile: &'a Profile,
    pub question: &'a Question,
    pub spread: Spread,
    pub prices: Option<Prices>,
}

/// Divisions shown on each side of the chosen one.
const SHOWN: usize = 4;

pub fn text(about: &About<'_>, answer: &Answer) -> String {
    let plan = match answer {
        Answer::Feasible(plan) => plan,
        Answer::Infeasible { nearest } => {
            return format!("infeasible: nearest feasible is --slo {nearest}, with next to no load");
        }
    };
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{}: {:.2} requests/s within the SLO (95%: {:.2} to {:.2}), of {:.2} that come",
        plan.split,
        plan.goodput.mid,
        plan.goodput.low,
        plan.goodput.high,
        plan.outcome.offered()
    );
    basis(&mut out, about);
    times(&mut out, about, plan);
    rivals(&mut out, about, plan);
    let _ = writeln!(out, "\nbottleneck: {}", bottleneck(plan));
    let matched = &plan.matched;
    let _ = writeln!(
        out,
        "by means:   a prefill node computes {:.2} requests/s, a decode node {:.2} ({} at once, {:.1} ms per step, bound by {:?})",
        matched.prefill_rate,
        matched.decode_rate,
        matched.batch,
        matched.step_s * 1e3,
        matched.limit
    );
    for shifted in &plan.regret {
        let _ = match &shifted.outcome {
            Ok((ours, split, best)) => writeln!(
                out,
                "if {:<9} {ours:.2} requests/s; {split} would serve {best:.2}: regret {:.0}%",
                format!("{}:", shifted.shift),
                100.0 * regret(*ours, *best)
            ),
            Err(reason) => writeln!(out, "if {}: not known: {reason}", shifted.shift),
        };
    }
    if let Some(prices) = about.prices {
        let _ = writeln!(
            out,
            "cost:       {:.2} per hour, {:.3} per million tokens of answers within the SLO",
            prices.per_hour(plan.split),
            cost_per_mtok(plan, prices)
        );
    }
    let _ = writeln!(out, "{} simulations", plan.simulations);
    out
}

fn basis(out: &mut String, about: &About<'_>) {
    let profile = about.profile;
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
        true => "none: no plan of this profile was compared with a cluster; the interval is of chance alone".to_owned(),
        false => bars.join(", "),
    };
    let _ = writeln!(out, "error bar:  {bars}");
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
        if rival.split.prefill.abs_diff(plan.split.prefill) > SHOWN && rival.split.prefill != 0 {
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
        let name = rival.split.to_string();
        let _ = writeln!(out, "{name:>10} {goodput:>10}  {}  {verdict}", shares.join("  "));
    }
}

/// Share of the best goodput that is lost.
pub fn regret(ours: f64, best: f64) -> f64 {
    if best > 0.0 {
        ((best - ours) / best).max(0.0)
    } else {
        0.0
    }
}

/// In one sentence.
pub fn bottleneck(plan: &Plan) -> String {
    let bottleneck = &plan.bottleneck;
    let breaks = bottleneck.clause.map_or(String::new(), |clause| {
        format!(
            "; under more load {}_p{} breaks first",
            clause.metric.name(),
            clause.per_mille / 10
        )
    });
    let [prefill, decode] = bottleneck
        .with_one_more
        .map(|rate| 100.0 * (rate / plan.rate - 1.0).max(0.0));
    let fix = if prefill.max(decode) < 1.0 {
        "one more node of either kind brings less than 1%".to_owned()
    } else if prefill >= decode {
        format!("one more prefill node brings {prefill:.0}%, one more decode node {decode:.0}%")
    } else {
        format!("one more decode node brings {decode:.0}%, one more prefill node {prefill:.0}%")
    };
    format!("{}{breaks}; {fix}", bottleneck.name)
}

/// Cost of a million tokens of answers that were within the SLO.
pub fn cost_per_mtok(plan: &Plan, prices: Prices) -> f64 {
    let good = plan.outcome.requests.iter().filter(|request| request.good);
    let tokens: f64 = good.map(|request| f64::from(request.tokens)).sum();
    let per_second = tokens / plan.outcome.span.seconds().max(1e-9);
    prices.per_hour(plan.split) / 3600.0 / per_second.max(1e-9) * 1e6
}
