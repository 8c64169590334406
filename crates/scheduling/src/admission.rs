//! Whether a coordinator lets one more request in.

use std::time::Duration;

/// The bounds of one coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdmissionLimits {
    /// Requests in all: waiting, prefilling, decoding.
    pub requests_max: u32,
    /// Requests that wait for a place on a node.
    pub queued_max: u32,
}

/// What it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AdmissionLoad {
    /// Requests in all.
    pub requests: u32,
    /// Of these, those that wait for a place on a node.
    pub queued: u32,
    /// How long one place takes to come free, by what was seen; zero while nothing was.
    pub wait_per_place: Duration,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// Let it in.
    Admit,
    /// Send it away now rather than let it wait for nothing.
    Refuse {
        /// Why.
        refusal: Refusal,
        /// When to ask again.
        retry_after: Duration,
    },
}

/// Why a request is sent away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// All places are taken.
    #[error("{requests} requests are running; no more than that are let in")]
    Requests {
        /// The bound that is reached.
        requests: u32,
    },
    /// The queue is full.
    #[error("{queued} requests wait for a node; no more than that may")]
    Queue {
        /// The bound that is reached.
        queued: u32,
    },
}

const RETRY_AFTER_MIN: Duration = Duration::from_millis(100);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);

/// Decides for a request that has just come.
pub fn admit(limits: &AdmissionLimits, load: &AdmissionLoad) -> Admission {
    let refusal = if load.requests >= limits.requests_max {
        Refusal::Requests {
            requests: limits.requests_max,
        }
    } else if load.queued >= limits.queued_max {
        Refusal::Queue {
            queued: limits.queued_max,
        }
    } else {
        return Admission::Admit;
    };
    let retry_after = load
        .wait_per_place
        .saturating_mul(load.queued.max(1))
        .clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX);
    Admission::Refuse { refusal, retry_after }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: AdmissionLimits = AdmissionLimits {
        requests_max: 4,
        queued_max: 2,
    };

    #[test]
    fn the_bound_that_was_reached_is_named() {
        let load = |requests, queued| AdmissionLoad {
            requests,
            queued,
            wait_per_place: Duration::from_secs(1),
        };
        assert_eq!(admit(&LIMITS, &load(3, 1)), Admission::Admit);
        assert_eq!(
            admit(&LIMITS, &load(4, 0)),
            Admission::Refuse {
                refusal: Refusal::Requests { requests: 4 },
                retry_after: Duration::from_secs(1)
            }
        );
        assert_eq!(
            admit(&LIMITS, &load(3, 2)),
            Admission::Refuse {
                refusal: Refusal::Queue { queued: 2 },
                retry_after: Duration::from_secs(2)
            }
        );
    }

    proptest! {
        #[test]
        fn bounds_hold_and_hints_are_sane(requests in 0u32..9, queued in 0u32..9, wait_ms in 0u64..100_000) {
            let load = AdmissionLoad { requests, queued, wait_per_place: Duration::from_millis(wait_ms) };
            match admit(&LIMITS, &load) {
                Admission::Admit => prop_assert!(requests < 4 && queued < 2),
                Admission::Refuse { retry_after, .. } => {
                    prop_assert!(requests >= 4 || queued >= 2);
                    prop_assert!(retry_after >= RETRY_AFTER_MIN && retry_after <= RETRY_AFTER_MAX);
                }
            }
        }
    }
}
