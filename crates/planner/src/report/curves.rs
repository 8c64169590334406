//! Distributions as few points.

use crate::sim::Outcome;
use crate::slo::Metric;

/// Points of a curve, at most.
const POINTS: usize = 240;

/// Pairs of a time in seconds and the share of values within it, both rising. Of requests those that were refused are within none.
pub(super) fn shares(outcome: &Outcome, metric: Metric) -> Vec<(f64, f64)> {
    let mut points: Vec<(f64, f64)> = match metric {
        Metric::Itl => {
            let all = outcome.itl.total().max(1) as f64;
            let mut seen = 0;
            let bins = outcome.itl.bins();
            bins.map(|(time, count)| {
                seen += count;
                (time, seen as f64 / all)
            })
            .collect()
        }
        Metric::Ttft | Metric::Tpot | Metric::E2e => {
            let all = outcome.requests.len().max(1) as f64;
            let time = |request: &crate::sim::Served| match metric {
                Metric::Ttft => request.ttft,
                Metric::Tpot => request.tpot(),
                Metric::E2e | Metric::Itl => request.e2e,
            };
            let mut times: Vec<f64> = outcome.requests.iter().filter_map(time).map(|t| t.seconds()).collect();
            times.sort_by(f64::total_cmp);
            let ranked = times.into_iter().zip(1..);
            ranked.map(|(time, rank)| (time, f64::from(rank) / all)).collect()
        }
    };
    points.dedup_by(|later, kept| {
        let same = later.0 == kept.0;
        if same {
            kept.1 = later.1;
        }
        same
    });
    let round = |(time, share): (f64, f64)| ((time * 1e6).round() / 1e6, (share * 1e5).round() / 1e5);
    thinned(&points).into_iter().map(round).collect()
}

/// Points that are evenly apart in share, with the first, and finer where the last hundredth is.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        return Vec::new();
    };
    let mut kept = vec![*first];
    let mut next = first.1;
    for point in points {
        if point.1 >= next {
            if kept.last() != Some(point) {
                kept.push(*point);
            }
            let step = if point.1 > 0.98 { 0.1 } else { 1.0 } / (POINTS as f64 * 0.8);
            next = point.1 + step;
        }
    }
    if kept.last() != Some(last) {
        kept.push(*last);
    }
    kept
}

#[cfg(test)]
mod tests {
    #[test]
    fn few_points_keep_the_ends_and_the_tail() {
        let points: Vec<(f64, f64)> = (1..=10_000).map(|i| (f64::from(i), f64::from(i) / 1e4)).collect();
        let kept = super::thinned(&points);
        assert!(kept.len() <= super::POINTS + 2, "{}", kept.len());
        assert_eq!((kept[0], kept[kept.len() - 1]), (points[0], points[9999]));
        assert!(kept.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1));
        assert!(kept.iter().filter(|(_, share)| *share > 0.98).count() > 25);
        assert!(super::thinned(&[]).is_empty());
    }
}
