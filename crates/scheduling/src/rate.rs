//! How often something may happen: a token bucket.

use std::time::Duration;

/// Allows `per_second` on average, and `burst` at once. Moments are durations since any fixed one.
#[derive(Debug, Clone, PartialEq)]
pub struct RateLimit {
    per_second: f64,
    burst: f64,
    level: f64,
    at: Duration,
}

impl RateLimit {
    /// A full bucket. Both must be more than 0; a burst below 1 counts as 1, since nothing would pass else.
    pub fn new(per_second: f64, burst: f64) -> Self {
        let burst = burst.max(1.0);
        Self {
            per_second,
            burst,
            level: burst,
            at: Duration::ZERO,
        }
    }

    /// Takes one.
    ///
    /// # Errors
    /// How long it takes until there is one.
    pub fn take(&mut self, now: Duration) -> Result<(), Duration> {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.level = (self.level + passed * self.per_second).min(self.burst);
        if self.level >= 1.0 {
            self.level -= 1.0;
            return Ok(());
        }
        let wait = (1.0 - self.level) / self.per_second;
        Err(Duration::try_from_secs_f64(wait).unwrap_or(Duration::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let mut limit = RateLimit::new(2.0, 3.0);
        let at = Duration::from_millis;
        let passed = (0..5).filter(|_| limit.take(at(10)).is_ok()).count();
        assert_eq!(passed, 3);
        assert_eq!(limit.take(at(10)), Err(at(500)));
        assert!(limit.take(at(509)).is_err());
        assert!(limit.take(at(511)).is_ok());
    }

    proptest! {
        #[test]
        fn no_more_than_rate_and_burst_pass_and_the_hint_is_true(
            gaps in prop::collection::vec(0u64..400, 1..200), rate in 0.5f64..50.0, burst in 1.0f64..10.0,
        ) {
            let mut limit = RateLimit::new(rate, burst);
            let (mut now, mut passed) = (Duration::ZERO, 0u32);
            for gap in gaps {
                now += Duration::from_millis(gap);
                match limit.take(now) {
                    Ok(()) => passed += 1,
                    Err(wait) => {
                        let soon = wait + Duration::from_micros(1);
                        prop_assert!(limit.clone().take(now + soon).is_ok());
                    }
                }
            }
            prop_assert!(f64::from(passed) <= burst + rate * now.as_secs_f64() + 1e-6);
        }
    }
}
