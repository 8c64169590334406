//! Many times in few places: bins of equal width on a logarithmic scale.

use crate::Nanos;

/// Bins per doubling: neighbouring bins are 1.4% apart.
const BINS_PER_DOUBLING: f64 = 50.0;
/// The first bin ends here.
const FIRST_NANOS: f64 = 1e3;
/// Up to about 18 minutes.
const BINS: usize = 1500;

/// Counts of times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; BINS],
            total: 0,
        }
    }
}

fn bin(seconds: f64) -> usize {
    let doublings = (seconds * 1e9 / FIRST_NANOS).log2();
    ((doublings * BINS_PER_DOUBLING).ceil().max(0.0) as usize).min(BINS - 1)
}

/// The longest time of a bin, seconds.
fn end(bin: usize) -> f64 {
    FIRST_NANOS * (bin as f64 / BINS_PER_DOUBLING).exp2() / 1e9
}

impl Histogram {
    /// Counts a time so many times.
    pub fn add(&mut self, seconds: f64, count: u64) {
        self.counts[bin(seconds)] += count;
        self.total += count;
    }

    /// One that was counted as `counted` was longer.
    pub(super) fn replace(&mut self, counted: f64, longer: f64) {
        let from = &mut self.counts[bin(counted)];
        // Sums of runs are rounded to bins together; the last place may differ.
        if *from > 0 {
            *from -= 1;
            self.counts[bin(longer)] += 1;
        }
    }

    /// Counts evenly rising times, each so many times.
    pub(super) fn add_rising(&mut self, segment: &crate::profile::Segment, count: u64) {
        let last = segment.first + segment.rise * (segment.steps - 1) as f64;
        let (low, high) = (bin(segment.first.min(last)), bin(segment.first.max(last)));
        if low == high {
            return self.add(segment.first, segment.steps * count);
        }
        let mut before = 0;
        for bin in low..=high {
            let within = if bin == high {
                segment.steps
            } else {
                segment.within(end(bin))
            };
            // From the shorter side, whichever that is.
            self.counts[bin] += within.saturating_sub(before) * count;
            before = before.max(within);
        }
        self.total += segment.steps * count;
    }

    /// How many were counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The time within which this share of them is; zero where there are none.
    pub fn percentile(&self, share: f64) -> Nanos {
        let wanted = (self.total as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bin, count) in self.counts.iter().enumerate() {
            seen += count;
            if *count > 0 && seen >= wanted {
                return Nanos::from_seconds(end(bin));
            }
        }
        Nanos::ZERO
    }

    /// Pairs of a time in seconds and how many were at most that, and more than the time before.
    pub fn bins(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        let counts = self.counts.iter().enumerate();
        counts
            .filter(|(_, count)| **count > 0)
            .map(|(bin, count)| (end(bin), *count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::Segment;

    #[test]
    fn percentiles_are_within_a_bin() {
        let mut histogram = Histogram::default();
        (1..=1000).for_each(|ms| histogram.add(f64::from(ms) / 1e3, 1));
        for share in [0.01, 0.5, 0.9, 0.99, 1.0] {
            let off = histogram.percentile(share).seconds() / share - 1.0;
            assert!((-1e-9..0.015).contains(&off), "{share}: {off}");
        }
        assert_eq!(Histogram::default().percentile(0.5), Nanos::ZERO);
    }

    #[test]
    fn rising_times_count_as_each_by_itself() {
        for (first, rise) in [(0.01, 1e-5), (0.01, 0.0), (0.02, -1e-5), (0.01, 1e-3)] {
            let segment = Segment {
                steps: 900,
                first,
                rise,
            };
            let (mut together, mut apart) = (Histogram::default(), Histogram::default());
            together.add_rising(&segment, 3);
            (0..900).for_each(|k| apart.add(first + rise * f64::from(k), 3));
            assert_eq!(together.total(), apart.total());
            let off = together
                .counts
                .iter()
                .zip(&apart.counts)
                .map(|(a, b)| a.abs_diff(*b))
                .sum::<u64>();
            assert!(off <= 12, "{first} {rise}: {off}");
        }
    }
}
