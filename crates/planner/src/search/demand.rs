//! The cheapest nodes for a rate.

use super::split::{CLASSES_MAX, Within, splits};
use super::trial::Trials;
use super::{Matched, PlanError, Side, Split, parallel};

/// More nodes of one class on one side are not tried.
const NODES_MAX: usize = 512;
/// More combinations of counts are not looked at.
const COMBINATIONS_MAX: usize = 2_000_000;
/// So many times what the means say is tried, one after another, to find any nodes that serve the rate.
const SPARE: [f64; 9] = [1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 3.0, 5.0, 8.0];
/// Combinations of about the same cost of which one must do.
const TRIED: usize = 6;
/// Cheaper combinations that are tried in the end, at most.
const CHEAPER_MAX: usize = 48;
/// Costs nearer than this share are the same.
const COST_PRECISION: f64 = 0.01;

/// A combination, its cost per hour, and what it carries by means over the rate.
#[derive(Debug, Clone, Copy)]
struct Choice {
    split: Split,
    cost: f64,
    spare: f64,
}

/// The cheapest combination that keeps the SLO at this rate; none where none of those that were tried does.
pub(super) fn cheapest(trials: &Trials<'_>, matched: &Matched, rate: f64) -> Result<Option<Split>, PlanError> {
    let all = choices(trials, matched, rate)?;
    let Some(first) = any(trials, rate, &all)? else {
        return Ok(None);
    };
    let mut best = first;
    let mut failed: Vec<Split> = Vec::new();
    // Between a cost that cannot do by far and one that does: halved, with the most promising of each cost.
    let mut low = all
        .iter()
        .filter(|o| o.spare >= 0.4)
        .map(|o| o.cost)
        .fold(best.cost, f64::min);
    while best.cost / low > 1.0 + COST_PRECISION {
        let middle = (low * best.cost).sqrt();
        let mut near: Vec<Choice> = all
            .iter()
            .filter(|o| o.cost > low && o.cost <= middle)
            .copied()
            .collect();
        near.sort_by(|a, b| b.spare.total_cmp(&a.spare));
        near.truncate(TRIED);
        match first_of(trials, rate, &near, &mut failed)? {
            Some(found) => best = found,
            None => low = middle,
        }
    }
    // What was passed over on the way: each that is cheaper, and not less than one that did not do.
    let mut tried = 0;
    loop {
        let mut cheaper: Vec<Choice> = all
            .iter()
            .filter(|o| o.cost < best.cost && o.spare >= 0.5)
            .filter(|o| !failed.iter().any(|failed| o.split.is_within(failed)))
            .copied()
            .collect();
        cheaper.sort_by(|a, b| b.spare.total_cmp(&a.spare));
        cheaper.truncate(2);
        if cheaper.is_empty() || tried >= CHEAPER_MAX {
            return Ok(Some(best.split));
        }
        tried += cheaper.len();
        if let Some(found) = first_of(trials, rate, &cheaper, &mut failed)? {
            best = found;
        }
    }
}

/// All combinations that may do.
fn choices(trials: &Trials<'_>, matched: &Matched, rate: f64) -> Result<Vec<Choice>, PlanError> {
    let classes = &trials.question.classes;
    let mut most = [[0; 2]; CLASSES_MAX];
    for (class, of) in classes.iter().enumerate() {
        for (index, side) in [Side::Prefill, Side::Decode].into_iter().enumerate() {
            let alone = matched.node_rate(class, side);
            let wanted = if alone > 0.0 {
                (rate * SPARE[4] / alone).ceil() as usize + 3
            } else {
                0
            };
            // Where a node may do both, decode nodes may do without prefill nodes.
            let wanted = if side == Side::Decode && alone > 0.0 {
                let both = (rate * SPARE[4] / matched.node_rate(class, Side::Prefill)).ceil() as usize;
                wanted + both
            } else {
                wanted
            };
            most[class][index] = wanted.min(NODES_MAX).min(of.count_max.unwrap_or(NODES_MAX));
        }
    }
    let combinations = most
        .iter()
        .flatten()
        .fold(1usize, |all, most| all.saturating_mul(most + 1));
    if combinations > COMBINATIONS_MAX {
        return Err(PlanError::Combinations { combinations });
    }
    let choice = |split: Split| Choice {
        split,
        cost: split.per_hour(classes),
        spare: matched.rate_at_most(&split) / rate,
    };
    let mut all: Vec<Choice> = splits(classes, Within::UpTo(most)).into_iter().map(choice).collect();
    all.retain(|option| option.spare >= 0.3);
    Ok(all)
}

/// Some combination that does: the cheapest that have ever more to spare by means.
fn any(trials: &Trials<'_>, rate: f64, all: &[Choice]) -> Result<Option<Choice>, PlanError> {
    for spare in SPARE {
        let mut enough: Vec<Choice> = all.iter().filter(|o| o.spare >= spare).copied().collect();
        if enough.is_empty() {
            break;
        }
        enough.sort_by(|a, b| a.cost.total_cmp(&b.cost).then(b.spare.total_cmp(&a.spare)));
        enough.truncate(2);
        if let Some(found) = first_of(trials, rate, &enough, &mut Vec::new())? {
            return Ok(Some(found));
        }
    }
    // All that there is.
    let mut most: Vec<Choice> = all.to_vec();
    most.sort_by(|a, b| b.spare.total_cmp(&a.spare));
    most.truncate(TRIED);
    first_of(trials, rate, &most, &mut Vec::new())
}

/// The cheapest of these that keeps the SLO; the others are noted.
fn first_of(
    trials: &Trials<'_>,
    rate: f64,
    options: &[Choice],
    failed: &mut Vec<Split>,
) -> Result<Option<Choice>, PlanError> {
    for chunk in options.chunks(2) {
        let meets = parallel::map(chunk, |option| trials.meets(option.split, rate));
        let mut found: Option<Choice> = None;
        for (option, meets) in chunk.iter().zip(meets) {
            if !meets? {
                failed.push(option.split);
            } else if found.is_none_or(|found| option.cost < found.cost) {
                found = Some(*option);
            }
        }
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}
