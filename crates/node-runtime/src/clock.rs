//! The one source of time. It is tokio's clock, so that a test under `start_paused` moves it as it likes; nothing else in
//! Baton reads a clock.

use std::fmt;
use std::future::Future;
use std::ops::{Add, AddAssign};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A handle on time. Cheap to copy.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clock(());

/// A point in this process's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(tokio::time::Instant);

/// The time that was allowed has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elapsed;

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the time allowed has passed")
    }
}

impl std::error::Error for Elapsed {}

impl Clock {
    /// The process's clock.
    pub fn new() -> Self {
        Self(())
    }

    /// Now.
    pub fn now(self) -> Moment {
        Moment(tokio::time::Instant::now())
    }

    /// Waits for so long.
    pub async fn sleep(self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    /// Waits until then; returns at once where it has passed.
    pub async fn sleep_until(self, moment: Moment) {
        tokio::time::sleep_until(moment.0).await;
    }

    /// Runs `future` for at most so long; drops it then.
    ///
    /// # Errors
    /// [`Elapsed`] where it did not end in time.
    pub async fn timeout<F: Future>(self, duration: Duration, future: F) -> Result<F::Output, Elapsed> {
        tokio::time::timeout(duration, future).await.map_err(|_| Elapsed)
    }

    /// Runs `future` until then at the latest; drops it then.
    ///
    /// # Errors
    /// [`Elapsed`] where it did not end in time.
    pub async fn timeout_at<F: Future>(self, moment: Moment, future: F) -> Result<F::Output, Elapsed> {
        tokio::time::timeout_at(moment.0, future).await.map_err(|_| Elapsed)
    }

    /// Since that moment; zero where it lies ahead.
    pub fn elapsed(self, since: Moment) -> Duration {
        self.now().saturating_since(since)
    }

    /// Seconds since 1970 on the wall clock, for people only: it may jump, nothing is decided by it.
    pub fn unix_seconds(self) -> u64 {
        self.unix_us() / 1_000_000
    }

    /// As [`Self::unix_seconds`], in microseconds.
    pub fn unix_us(self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    }
}

impl Moment {
    /// Time from `earlier` to this; zero where `earlier` is later.
    pub fn saturating_since(self, earlier: Self) -> Duration {
        self.0.saturating_duration_since(earlier.0)
    }
}

impl Add<Duration> for Moment {
    type Output = Self;

    /// Saturates about thirty years ahead, which is never.
    fn add(self, duration: Duration) -> Self {
        const NEVER: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
        Self(self.0.checked_add(duration.min(NEVER)).unwrap_or(self.0))
    }
}

impl AddAssign<Duration> for Moment {
    fn add_assign(&mut self, duration: Duration) {
        *self = *self + duration;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn follows_the_paused_clock() {
        let clock = Clock::new();
        let start = clock.now();
        clock.sleep(Duration::from_secs(3600)).await;
        assert!(clock.elapsed(start) >= Duration::from_secs(3600));
        assert_eq!(
            clock
                .timeout(Duration::from_secs(5), std::future::pending::<()>())
                .await,
            Err(Elapsed)
        );
        assert_eq!(clock.timeout(Duration::from_secs(5), async { 7 }).await, Ok(7));
        assert_eq!(start.saturating_since(clock.now()), Duration::ZERO);
        assert!(start + Duration::MAX > clock.now());
    }
}
