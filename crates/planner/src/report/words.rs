//! Sentences and figures that the terminal, the JSON and the page share.

use crate::search::{Fix, Nearest, NodeClass, Plan, Side};

/// What can be instead of what was asked for.
pub fn nearest(nearest: &Nearest, classes: &[NodeClass]) -> String {
    match nearest {
        Nearest::Slo(slo) => format!("infeasible: nearest feasible is --slo {slo}, with next to no load"),
        Nearest::Rate(rate, split) => format!(
            "infeasible: nearest feasible is --rate {:.2}, with all of these nodes: {}",
            floor(*rate),
            split.name(classes)
        ),
    }
}

/// To two digits, never up: what is said to be feasible must be.
fn floor(rate: f64) -> f64 {
    (rate * 100.0).floor() / 100.0
}

/// The nodes of a fix, such as `one more prefill node`.
pub fn fix(fix: &Fix, classes: &[NodeClass]) -> String {
    let kind = |class: usize| match classes {
        [_] => String::new(),
        _ => format!("{} ", classes[class].name),
    };
    match fix.nodes[..] {
        [(class, side)] => format!("one more {}{} node", kind(class), side.name()),
        [(a, Side::Prefill), (b, Side::Decode)] if classes.len() == 1 && a == b => {
            "one more node of each side".to_owned()
        }
        _ => {
            let nodes = fix
                .nodes
                .iter()
                .map(|(class, side)| format!("one more {}{} node", kind(*class), side.name()));
            nodes.collect::<Vec<_>>().join(" and ")
        }
    }
}

/// In one sentence, with the cheapest fix.
pub fn bottleneck(plan: &Plan, classes: &[NodeClass], priced: bool) -> String {
    let bottleneck = &plan.bottleneck;
    let breaks = bottleneck.clause.map_or(String::new(), |clause| {
        let clause = clause.to_string();
        let name = clause.split('=').next().unwrap_or_default();
        format!("; under more load {name} breaks first")
    });
    let Some(first) = bottleneck
        .fixes
        .first()
        .filter(|fix| fix.per_request(plan.rate).is_finite())
    else {
        return format!(
            "{}{breaks}; one more node of any kind, or one of each side, brings less than 1%",
            bottleneck.name
        );
    };
    let gain = 100.0 * (first.rate / plan.rate - 1.0);
    let cost = match priced {
        true => format!(
            " for {:.2} per hour, {:.2} per hour for each further request/s",
            first.per_hour,
            first.per_request(plan.rate)
        ),
        false => String::new(),
    };
    format!(
        "{}{breaks}; the next-cheapest fix: {} brings {gain:.0}%{cost}",
        bottleneck.name,
        fix(first, classes)
    )
}

/// Cost of a million tokens of answers that were within the SLO.
pub fn cost_per_mtok(plan: &Plan, classes: &[NodeClass]) -> f64 {
    let good = plan.outcome.requests.iter().filter(|request| request.good);
    let tokens: f64 = good.map(|request| f64::from(request.tokens)).sum();
    let per_second = tokens / plan.outcome.span.seconds().max(1e-9);
    plan.split.per_hour(classes) / 3600.0 / per_second.max(1e-9) * 1e6
}
