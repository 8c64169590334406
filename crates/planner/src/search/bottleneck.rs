//! What limits a plan, and what would help, the cheapest first.

use super::trial::Trials;
use super::{Limit, Matched, PlanError, Side, Split, budget, parallel};
use crate::slo::{Clause, Metric};

/// What would help.
#[derive(Debug, Clone, PartialEq)]
pub struct Fix {
    /// Nodes that are bought: the class and the side of each.
    pub nodes: Vec<(usize, Side)>,
    /// The highest rate at which the SLO is kept then, requests per second.
    pub rate: f64,
    /// What it costs per hour.
    pub per_hour: f64,
}

impl Fix {
    /// Cost per hour of one more request per second; infinite where it brings none.
    pub fn per_request(&self, rate: f64) -> f64 {
        let more = self.rate - rate;
        if more > rate * 0.01 {
            self.per_hour / more
        } else {
            f64::INFINITY
        }
    }
}

/// What limits the plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Bottleneck {
    /// In a word.
    pub name: &'static str,
    /// The clause that breaks first under more load.
    pub clause: Option<Clause>,
    /// What would help, the cheapest for what it brings first; what brings less than 1% comes last.
    pub fixes: Vec<Fix>,
}

pub(super) fn bottleneck(
    trials: &Trials<'_>,
    matched: &Matched,
    split: Split,
    rate: f64,
) -> Result<Bottleneck, PlanError> {
    let fixes = fixes(trials, split, rate)?;
    // A bit more than it can carry shows what breaks.
    let slo = &trials.question.slo;
    let over = trials.outcome(split, rate * 1.15).ok();
    let missing = |clause: &&Clause| {
        over.as_ref()
            .map_or(0.0, |over| clause.share() - over.attainment(clause))
    };
    let clause = slo
        .clauses
        .iter()
        .max_by(|a, b| missing(a).total_cmp(&missing(b)))
        .copied();
    let kv = over.as_ref().is_some_and(|over| {
        over.nodes[over.prefill_nodes..]
            .iter()
            .any(|used| used.preemptions > 0 || used.kv_peak > 0.98)
    });
    let best = |side| {
        let of = fixes
            .iter()
            .filter(|fix| matches!(fix.nodes[..], [(_, one)] if one == side));
        of.map(|fix| fix.rate).fold(0.0, f64::max)
    };
    let by_step_time = matched
        .classes
        .iter()
        .flatten()
        .any(|class| class.limit == Limit::StepTime);
    let name = match clause.map(|clause| clause.metric) {
        _ if best(Side::Decode) > best(Side::Prefill) && kv => "decode KV capacity",
        _ if best(Side::Decode) > best(Side::Prefill) => "decode",
        Some(Metric::Itl | Metric::Tpot) if split.prefill() == 0 || by_step_time => "prefill stalls decoding",
        _ => "prefill",
    };
    Ok(Bottleneck { name, clause, fixes })
}

/// One more node of each class on each side, and one of each side together.
fn fixes(trials: &Trials<'_>, split: Split, rate: f64) -> Result<Vec<Fix>, PlanError> {
    let classes = &trials.question.classes;
    let price = |(class, side): &(usize, Side)| match side {
        Side::Prefill => classes[*class].prices.prefill,
        Side::Decode => classes[*class].prices.decode,
    };
    let may = |side: Side| {
        let allowed = classes.iter().enumerate().filter(move |(_, class)| match side {
            Side::Prefill => class.prefill,
            Side::Decode => class.decode,
        });
        allowed.map(|(class, _)| (class, side)).collect::<Vec<_>>()
    };
    let (prefill, decode) = (may(Side::Prefill), may(Side::Decode));
    let mut bought: Vec<Vec<(usize, Side)>> = prefill.iter().chain(&decode).map(|one| vec![*one]).collect();
    for one in &prefill {
        bought.extend(decode.iter().map(|other| vec![*one, *other]));
    }
    let highest = |nodes: &Vec<(usize, Side)>| {
        let more = nodes
            .iter()
            .fold(split, |split, (class, side)| split.one_more(*class, *side));
        match trials.meets(more, rate)? {
            true => trials.highest(more, rate, budget::PRECISION),
            false => Ok::<f64, PlanError>(0.0),
        }
    };
    let rates = parallel::map(&bought, highest);
    let mut fixes = Vec::new();
    for (nodes, rate) in bought.into_iter().zip(rates) {
        fixes.push(Fix {
            per_hour: nodes.iter().map(price).sum(),
            rate: rate?,
            nodes,
        });
    }
    fixes.sort_by(|a, b| {
        let by_cost = a.per_request(rate).total_cmp(&b.per_request(rate));
        by_cost.then(b.rate.total_cmp(&a.rate))
    });
    Ok(fixes)
}
