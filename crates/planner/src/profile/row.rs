//! Runs of decode steps in closed form: while the batch stays the same, step `k` attends to `start + batch x k` tokens, and
//! its time is linear in that between the profile's points. So the time of many steps is a sum per segment between points.

use super::OutOfRange;

/// The decode step of one batch size, over the tokens of all its sequences.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodeRow {
    batch: u32,
    context: Vec<f64>,
    seconds: Vec<f64>,
    field: &'static str,
}

/// Consecutive steps whose times rise evenly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Segment {
    /// How many.
    pub steps: u64,
    /// Seconds of the first.
    pub first: f64,
    /// Seconds that each adds to the one before.
    pub rise: f64,
}

impl Segment {
    fn sum(&self, steps: u64) -> f64 {
        let n = steps as f64;
        n * self.first + self.rise * n * (n - 1.0) / 2.0
    }

    /// Steps of it that take at most so long.
    pub fn within(&self, seconds: f64) -> u64 {
        let last = self.first + self.rise * (self.steps - 1) as f64;
        if self.first.max(last) <= seconds {
            return self.steps;
        }
        if self.first.min(last) > seconds {
            return 0;
        }
        let crossing = (seconds - self.first) / self.rise;
        if self.rise > 0.0 {
            (crossing.floor() as u64 + 1).min(self.steps)
        } else {
            self.steps - (crossing.ceil() as u64).min(self.steps)
        }
    }
}

impl DecodeRow {
    pub(super) fn new(batch: u32, context: Vec<f64>, seconds: Vec<f64>, field: &'static str) -> Self {
        Self {
            batch,
            context,
            seconds,
            field,
        }
    }

    /// Sequences of the batch.
    pub fn batch(&self) -> u32 {
        self.batch
    }

    /// Calls `each` with the segments of `steps` steps from `start` tokens on; stops early where it answers false.
    ///
    /// # Errors
    /// Where a step is outside the profile.
    pub fn segments(&self, start: u64, steps: u64, mut each: impl FnMut(Segment) -> bool) -> Result<(), OutOfRange> {
        let (batch, last) = (u64::from(self.batch.max(1)), self.context.len() - 1);
        let (mut at, mut left) = (start, steps);
        let mut i = self.context.partition_point(|point| *point <= at as f64);
        while left > 0 {
            let here = at as f64;
            while i <= last && self.context[i] < here {
                i += 1;
            }
            if i > last && here > self.context[last] || here < self.context[0] {
                return Err(OutOfRange {
                    field: self.field,
                    value: here,
                    low: self.context[0],
                    high: self.context[last],
                });
            }
            let above = i.clamp(1, last.max(1));
            let (slope, first) = if last == 0 {
                (0.0, self.seconds[0])
            } else {
                let (c, s) = (&self.context[above - 1..=above], &self.seconds[above - 1..=above]);
                let slope = (s[1] - s[0]) / (c[1] - c[0]);
                (slope, s[0] + slope * (here - c[0]))
            };
            let room = self.context[above.min(last)] as u64 - at;
            let count = (room / batch + 1).min(left);
            let segment = Segment {
                steps: count,
                first,
                rise: slope * batch as f64,
            };
            if !each(segment) {
                return Ok(());
            }
            at += count * batch;
            left -= count;
        }
        Ok(())
    }

    /// Seconds of `steps` steps.
    ///
    /// # Errors
    /// Outside the profile.
    pub fn seconds(&self, start: u64, steps: u64) -> Result<f64, OutOfRange> {
        let mut sum = 0.0;
        self.segments(start, steps, |segment| {
            sum += segment.sum(segment.steps);
            true
        })?;
        Ok(sum)
    }

    /// The first of `steps` steps (counted from 1) at whose end at least `seconds` have passed, and when it ends; the last
    /// one where all end before.
    ///
    /// # Errors
    /// Outside the profile.
    pub fn first_after(&self, start: u64, steps: u64, seconds: f64) -> Result<(u64, f64), OutOfRange> {
        let (mut done, mut sum) = (0, 0.0);
        self.segments(start, steps, |segment| {
            if sum + segment.sum(segment.steps) < seconds {
                (done, sum) = (done + segment.steps, sum + segment.sum(segment.steps));
                return true;
            }
            let (mut low, mut high) = (1, segment.steps);
            while low < high {
                let middle = low + (high - low) / 2;
                if sum + segment.sum(middle) >= seconds {
                    high = middle
                } else {
                    low = middle + 1
                }
            }
            (done, sum) = (done + low, sum + segment.sum(low));
            false
        })?;
        Ok((done, sum))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(batch: u32) -> DecodeRow {
        DecodeRow::new(
            batch,
            vec![0.0, 100.0, 130.0, 1000.0],
            vec![1.0, 2.0, 1.5, 9.0],
            "decode.total",
        )
    }

    fn step(at: u64) -> f64 {
        let at = at as f64;
        match at {
            _ if at <= 100.0 => 1.0 + at / 100.0,
            _ if at <= 130.0 => 2.0 - (at - 100.0) / 60.0,
            _ => 1.5 + (at - 130.0) * 7.5 / 870.0,
        }
    }

    proptest! {
        #[test]
        fn a_run_is_the_sum_of_its_steps(batch in 1u32..40, start in 0u64..200, steps in 1u64..20, part in 0.0f64..1.2, bound in 0.5f64..9.0) {
            let row = row(batch);
            let each: Vec<f64> = (0..steps).map(|k| step(start + k * u64::from(batch))).collect();
            let all: f64 = each.iter().sum();
            prop_assert!((row.seconds(start, steps).unwrap() - all).abs() < 1e-9);
            let wanted = part * all;
            let (done, sum) = row.first_after(start, steps, wanted).unwrap();
            let until = |k: u64| each[..k as usize].iter().sum::<f64>();
            prop_assert!((sum - until(done)).abs() < 1e-9);
            prop_assert!(done == steps || sum >= wanted - 1e-9);
            prop_assert!(done == 1 || until(done - 1) < wanted + 1e-9);
            let mut within = 0;
            row.segments(start, steps, |segment| { within += segment.within(bound); true }).unwrap();
            let expected = each.iter().filter(|s| **s <= bound).count() as u64;
            prop_assert!(within.abs_diff(expected) <= u64::from(each.iter().any(|s| (s - bound).abs() < 1e-9)));
        }
    }

    #[test]
    fn a_step_beyond_the_profile_is_refused() {
        assert!(row(10).seconds(900, 11).is_ok());
        let error = row(10).seconds(900, 12).unwrap_err();
        assert_eq!((error.value, error.high), (1010.0, 1000.0));
    }
}
