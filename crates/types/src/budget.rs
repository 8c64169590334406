//! Time that is left. Clocks of two machines are never compared: what crosses a boundary is a remainder.

use std::time::Duration;

/// What is left of a request's time. Travels as microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Budget(pub Duration);

impl Budget {
    /// From the wire form.
    pub fn from_us(us: u64) -> Self {
        Self(Duration::from_micros(us))
    }

    /// The wire form: microseconds, saturating.
    pub fn as_us(self) -> u64 {
        u64::try_from(self.0.as_micros()).unwrap_or(u64::MAX)
    }

    /// Nothing is left.
    pub fn is_spent(self) -> bool {
        self.0.is_zero()
    }
}
