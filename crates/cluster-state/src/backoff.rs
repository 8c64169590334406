//! How long to wait between attempts at a store that does not answer: doubling, with jitter, so that a thousand nodes do
//! not fall upon an etcd in the moment that it returns.

use baton_types::fill_random;
use std::time::Duration;

/// The first pause.
const FIRST: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(crate) struct Backoff {
    bound: Duration,
    max: Duration,
}

impl Backoff {
    /// Pauses grow up to `max`.
    pub(crate) fn new(max: Duration) -> Self {
        Self {
            bound: FIRST.min(max),
            max,
        }
    }

    /// The next pause: between half and all of a bound that doubles each time.
    pub(crate) fn pause(&mut self) -> Duration {
        let mut random = [0; 4];
        fill_random(&mut random);
        let share = f64::from(u32::from_le_bytes(random)) / f64::from(u32::MAX);
        let pause = self.bound.mul_f64(0.5 + 0.5 * share);
        self.bound = (2 * self.bound).min(self.max);
        pause
    }

    /// The store answered.
    pub(crate) fn reset(&mut self) {
        *self = Self::new(self.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_its_bound_and_starts_over() {
        let max = Duration::from_secs(2);
        let mut backoff = Backoff::new(max);
        assert!((FIRST / 2..=FIRST).contains(&backoff.pause()));
        for _ in 0..10 {
            assert!(backoff.pause() <= max);
        }
        assert!(backoff.pause() >= max / 2);
        backoff.reset();
        assert!(backoff.pause() <= FIRST);
    }
}
