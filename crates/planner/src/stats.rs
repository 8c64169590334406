//! How sure a mean is, and whether two differ. Requests that come near each other see the same queue, so intervals are made
//! of batches of requests that followed each other, not of single ones.
//! Source: Law, *Simulation Modeling and Analysis*, chapters 9 (batch means) and 10 (paired differences under common random numbers).

/// Batches that a run is cut into.
const BATCHES: usize = 20;
/// Student's t of 19 degrees of freedom: 95% of the mass is within plus and minus it.
const T_95: f64 = 2.093;

/// A mean and where it is, with 95% confidence.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Interval {
    /// The mean.
    pub mid: f64,
    /// From.
    pub low: f64,
    /// To.
    pub high: f64,
}

impl Interval {
    /// It is in there.
    pub fn contains(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }

    /// Each figure times this.
    pub fn scaled(&self, by: f64) -> Self {
        Self {
            mid: self.mid * by,
            low: self.low * by,
            high: self.high * by,
        }
    }
}

/// The mean of values that followed each other. With too few of them for batches it may be anywhere.
pub fn mean(values: &[f64]) -> Interval {
    let count = values.len() as f64;
    let mid = values.iter().sum::<f64>() / count.max(1.0);
    if values.len() < 2 * BATCHES {
        return Interval {
            mid,
            low: f64::NEG_INFINITY,
            high: f64::INFINITY,
        };
    }
    let means: Vec<f64> = (0..BATCHES)
        .map(|batch| {
            let part = &values[batch * values.len() / BATCHES..(batch + 1) * values.len() / BATCHES];
            part.iter().sum::<f64>() / part.len() as f64
        })
        .collect();
    let center = means.iter().sum::<f64>() / BATCHES as f64;
    let variance = means.iter().map(|mean| (mean - center).powi(2)).sum::<f64>() / (BATCHES - 1) as f64;
    let half = T_95 * (variance / BATCHES as f64).sqrt();
    Interval {
        mid,
        low: mid - half,
        high: mid + half,
    }
}

/// Whether one of two is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The first is.
    Yes,
    /// The second is.
    No,
    /// Their difference may be chance.
    CannotTell,
}

impl Verdict {
    /// As reports say it.
    pub fn words(self) -> &'static str {
        match self {
            Self::Yes => "yes",
            Self::No => "no",
            Self::CannotTell => "cannot tell",
        }
    }
}

/// Whether `a` is larger than `b` on average: the same requests, one value each.
pub fn beats(a: &[f64], b: &[f64]) -> Verdict {
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    let interval = mean(&differences);
    if interval.low > 0.0 {
        Verdict::Yes
    } else if interval.high < 0.0 {
        Verdict::No
    } else {
        Verdict::CannotTell
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    #[test]
    fn intervals_hold_the_mean_about_as_often_as_they_say() {
        let mut rng = Pcg64Mcg::seed_from_u64(5);
        let hits = (0..400).filter(|_| {
            let values: Vec<f64> = (0..400).map(|_| rng.random::<f64>()).collect();
            mean(&values).contains(0.5)
        });
        let hits = hits.count();
        assert!((365..=395).contains(&hits), "{hits} of 400");
    }

    #[test]
    fn a_difference_is_told_where_there_is_one() {
        let mut rng = Pcg64Mcg::seed_from_u64(6);
        let noise: Vec<f64> = (0..1000).map(|_| rng.random::<f64>() * 10.0).collect();
        let plus = |by: f64| noise.iter().map(|v| v + by).collect::<Vec<f64>>();
        assert_eq!(beats(&plus(0.1), &noise), Verdict::Yes);
        assert_eq!(beats(&noise, &plus(0.1)), Verdict::No);
        assert_eq!(beats(&noise, &noise), Verdict::CannotTell);
        assert_eq!(beats(&[1.0; 5], &[0.0; 5]), Verdict::CannotTell, "too few");
    }
}
