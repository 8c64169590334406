//! How long a path was at work for one hand-over. The receiver may have applied the last write, and said so, before the sender hears
//! that the write is done: what is under way counts as well.

use baton_node_runtime::Moment;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Of one hand-over on one path.
#[derive(Debug, Default)]
pub(super) struct Busy(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    done: Duration,
    done_until: Option<Moment>,
    under_way: Vec<Moment>,
}

impl Busy {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn begins(&self, now: Moment) {
        self.lock().under_way.push(now);
    }

    /// The write that began then is over; `took`: how long the path was at work for it, where it was applied.
    pub fn ends(&self, began: Moment, took: Option<Duration>, now: Moment) {
        let mut state = self.lock();
        if let Some(index) = state.under_way.iter().position(|other| *other == began) {
            state.under_way.swap_remove(index);
        }
        if let Some(took) = took {
            state.done += took;
            state.done_until = Some(now);
        }
    }

    /// Up to now.
    pub fn total(&self, now: Moment) -> Duration {
        let state = self.lock();
        let since = state.under_way.iter().min().copied().max(state.done_until);
        let since = since.filter(|_| !state.under_way.is_empty());
        state.done + since.map_or(Duration::ZERO, |since| now.saturating_since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_node_runtime::Clock;

    #[test]
    fn what_is_under_way_counts_once_and_with_what_is_done() {
        let start = Clock::new().now();
        let at = |ms| start + Duration::from_millis(ms);
        let busy = Busy::default();
        assert_eq!(busy.total(at(5)), Duration::ZERO);
        busy.begins(at(10));
        busy.begins(at(12));
        assert_eq!(busy.total(at(15)), Duration::from_millis(5));
        busy.ends(at(10), Some(Duration::from_millis(10)), at(20));
        assert_eq!(
            busy.total(at(23)),
            Duration::from_millis(13),
            "the second one since the first was done"
        );
        busy.ends(at(12), None, at(25));
        assert_eq!(
            busy.total(at(30)),
            Duration::from_millis(10),
            "what was not applied is not counted"
        );
    }
}
