//! The cheapest nodes for a rate.

use super::trial::{Split, Trials};
use super::{PlanError, Prices, RateMatch, parallel};

/// More nodes are not tried.
const NODES_MAX: usize = 512;

/// The cheapest division that keeps the SLO at this rate; none where [`NODES_MAX`] nodes do not.
pub(super) fn cheapest(
    trials: &Trials<'_>,
    matched: &RateMatch,
    rate: f64,
    prices: Prices,
) -> Result<Option<Split>, PlanError> {
    let (p, d) = matched.needed(rate);
    let share = p as f64 / (p + d) as f64;
    let at = |nodes| any(trials, rate, &around(nodes, share));
    // Local prefill, and prefixes that are found again, can make do with less than the means say.
    let mut low = ((p + d) / 2).max(1);
    let mut high = (p + d).max(2);
    let mut found = at(high)?;
    while found.is_none() {
        if high >= NODES_MAX {
            return Ok(None);
        }
        (low, high) = (high, (high * 3 / 2 + 1).min(NODES_MAX));
        found = at(high)?;
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match at(middle)? {
            Some(split) => (found, high) = (Some(split), middle),
            None => low = middle,
        }
    }
    let Some(found) = found else { return Ok(None) };
    // With unequal prices a few more of the cheaper nodes may cost less.
    let cost = prices.per_hour(found);
    let mut cheaper: Vec<Split> = (high..=high + 4)
        .flat_map(|nodes| around(nodes, share))
        .filter(|split| prices.per_hour(*split) < cost)
        .collect();
    cheaper.sort_by(|a, b| prices.per_hour(*a).total_cmp(&prices.per_hour(*b)));
    for chunk in cheaper.chunks(4) {
        if let Some(split) = any(trials, rate, chunk)? {
            return Ok(Some(split));
        }
    }
    Ok(Some(found))
}

/// Divisions of so many nodes near a share of prefill nodes, and the one without any; the nearest first.
fn around(nodes: usize, share: f64) -> Vec<Split> {
    let center = (nodes as f64 * share).round() as usize;
    let reach = (nodes / 4).max(2);
    let mut splits: Vec<Split> = super::budget::splits(nodes)
        .into_iter()
        .filter(|split| split.prefill == 0 || split.prefill.abs_diff(center) <= reach)
        .collect();
    splits.sort_by_key(|split| split.prefill.abs_diff(center));
    splits
}

/// The first of these that keeps the SLO.
fn any(trials: &Trials<'_>, rate: f64, splits: &[Split]) -> Result<Option<Split>, PlanError> {
    for chunk in splits.chunks(2) {
        let meets = parallel::map(chunk, |split| trials.meets(*split, rate));
        for (split, meets) in chunk.iter().zip(meets) {
            if meets? {
                return Ok(Some(*split));
            }
        }
    }
    Ok(None)
}
