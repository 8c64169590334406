//! The last errors of a node, for its heartbeat: a ring of eight.

use baton_node_runtime::{Clock, Moment};
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const KEPT: usize = 8;
/// Longer messages are cut: heartbeats stay small.
const MESSAGE_BYTES_MAX: usize = 400;

/// The ring.
#[derive(Debug, Default)]
pub struct LastErrors(Mutex<VecDeque<(Moment, String)>>);

impl LastErrors {
    /// Remembers one; the oldest is forgotten.
    pub fn push(&self, clock: &Clock, error: &dyn std::fmt::Display) {
        let mut message = error.to_string();
        if message.len() > MESSAGE_BYTES_MAX {
            let end = (0..=MESSAGE_BYTES_MAX)
                .rev()
                .find(|at| message.is_char_boundary(*at))
                .unwrap_or(0);
            message.truncate(end);
        }
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ring.push_front((clock.now(), message));
        ring.truncate(KEPT);
    }

    /// Age and message, the newest first.
    pub fn list(&self, clock: &Clock) -> Vec<(Duration, String)> {
        let now = clock.now();
        let ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ring.iter()
            .map(|(at, message)| (now.saturating_since(*at), message.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_eight_are_kept_and_cut_at_a_character() {
        let (errors, clock) = (LastErrors::default(), Clock::new());
        for n in 0..10 {
            errors.push(&clock, &format!("error {n}"));
        }
        let list = errors.list(&clock);
        assert_eq!(list.len(), 8);
        assert_eq!(list[0].1, "error 9");
        errors.push(
            &clock,
            &"x".repeat(399).chars().chain("äöü".chars()).collect::<String>(),
        );
        assert_eq!(errors.list(&clock)[0].1.len(), 399);
    }
}
