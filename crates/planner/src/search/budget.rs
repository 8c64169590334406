//! The best division of some nodes: the one that keeps the SLO at the highest rate.

use super::trial::Trials;
use super::{Matched, PlanError, Split, parallel};

/// Rates are found within this share.
pub(super) const PRECISION: f64 = 0.02;

/// Divisions that are simulated, at most: of more, those that carry the most by means.
const SPLITS_MAX: usize = 1100;

/// A division, and the highest rate at which it keeps the SLO.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// The division.
    pub split: Split,
    /// Requests per second.
    pub rate: f64,
}

/// The best of all these divisions; none where the SLO is kept by none at any rate that was tried.
pub(super) fn best(trials: &Trials<'_>, matched: &Matched, mut all: Vec<Split>) -> Result<Option<Found>, PlanError> {
    if all.len() > SPLITS_MAX {
        all.sort_by(|a, b| matched.rate(b).total_cmp(&matched.rate(a)));
        all.truncate(SPLITS_MAX);
        all.sort_unstable();
    }
    let Some(seed) = matched.best(&all) else {
        return Ok(None);
    };
    let Some(mut best) = begin(trials, matched, seed, &all)? else {
        return Ok(None);
    };
    best.rate = trials.highest(best.split, best.rate, PRECISION)?;
    // Whoever does not keep the SLO where the best so far still does cannot be better: more load never helps.
    let better = best.rate * (1.0 + PRECISION);
    let meet = parallel::map(&all, |split| Ok((*split, trials.meets(*split, better)?)));
    let meet: Vec<(Split, bool)> = meet.into_iter().collect::<Result<_, PlanError>>()?;
    let rivals: Vec<Split> = meet
        .into_iter()
        .filter(|(_, meets)| *meets)
        .map(|(split, _)| split)
        .collect();
    let highest = parallel::map(&rivals, |split| trials.highest(*split, better, PRECISION));
    for (split, rate) in rivals.iter().zip(highest) {
        let rate = rate?;
        if rate > best.rate {
            best = Found { split: *split, rate };
        }
    }
    Ok(Some(best))
}

/// Some division that keeps the SLO at some rate: the matched one, or else any.
fn begin(trials: &Trials<'_>, matched: &Matched, seed: Split, all: &[Split]) -> Result<Option<Found>, PlanError> {
    let high = matched.rate(&seed) * 1.2;
    if let Some(rate) = trials.first_met(seed, high)? {
        return Ok(Some(Found { split: seed, rate }));
    }
    let low = high / 100.0;
    let meets = parallel::map(all, |split| trials.meets(*split, low));
    for (split, meets) in all.iter().zip(meets) {
        if meets? {
            return Ok(Some(Found {
                split: *split,
                rate: low,
            }));
        }
    }
    Ok(None)
}
