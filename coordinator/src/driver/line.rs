//! One model's line: requests that have never been placed take turns, one at a time, fairly among tenants. Whoever has the
//! turn keeps it until it has its nodes; then the next one is told.

use baton_scheduling::{Entry, FairQueue};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// Fewer than this are not worth looking through for those that left.
const LOOK_MIN: usize = 64;

/// The line.
#[derive(Default)]
pub(super) struct Line(Mutex<State>);

#[derive(Default)]
struct State {
    taken: bool,
    waiting: FairQueue<oneshot::Sender<Turn>>,
    /// How many there are when those that left are looked for.
    look_at: usize,
}

/// The turn; passed on when dropped.
pub(super) struct Turn(Option<Arc<Line>>);

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(line) = self.0.take() {
            line.pass_on();
        }
    }
}

impl Line {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the turn. Who stops waiting leaves the line.
    pub(super) async fn turn(self: &Arc<Self>, who: Entry<()>) -> Turn {
        let turn = {
            let mut state = self.lock();
            if !state.taken {
                state.taken = true;
                return Turn(Some(Arc::clone(self)));
            }
            if state.waiting.len() >= state.look_at.max(LOOK_MIN) {
                state.waiting.retain(|turn| !turn.is_closed());
                state.look_at = 2 * state.waiting.len();
            }
            let (pass, turn) = oneshot::channel();
            state.waiting.push(who.with(pass));
            turn
        };
        turn.await
            .expect("who holds a turn passes it on, and the line lives as long as that")
    }

    fn pass_on(self: &Arc<Self>) {
        loop {
            let mut state = self.lock();
            let Some(next) = state.waiting.pop() else {
                state.taken = false;
                return;
            };
            drop(state);
            match next.send(Turn(Some(Arc::clone(self)))) {
                Ok(()) => return,
                Err(mut left) => left.0 = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_scheduling::Priority;
    use futures::FutureExt;

    fn who(tenant: usize, priority: Priority) -> Entry<()> {
        Entry {
            tenant,
            weight: 1,
            priority,
            tokens: 10,
            item: (),
        }
    }

    #[tokio::test]
    async fn turns_go_by_priority_and_skip_who_left() {
        let line = Arc::new(Line::default());
        let first = line.turn(who(0, Priority::Low)).await;
        let mut low = Box::pin(line.turn(who(0, Priority::Low)));
        let mut left = Box::pin(line.turn(who(1, Priority::High)));
        let mut high = Box::pin(line.turn(who(2, Priority::High)));
        assert!((&mut low).now_or_never().is_none());
        assert!((&mut left).now_or_never().is_none());
        assert!((&mut high).now_or_never().is_none());
        drop(left);
        drop(first);
        assert!((&mut low).now_or_never().is_none());
        let turn = (&mut high).now_or_never().expect("its turn");
        drop(turn);
        // It was told, and left before it knew: the turn goes on.
        let mut last = Box::pin(line.turn(who(3, Priority::Normal)));
        assert!((&mut last).now_or_never().is_none());
        drop(low);
        assert!((&mut last).now_or_never().is_some());
        assert!(
            line.turn(who(0, Priority::Low)).now_or_never().is_some(),
            "nobody has it"
        );
    }

    #[tokio::test]
    async fn who_leaves_takes_no_memory_for_long() {
        let line = Arc::new(Line::default());
        let _turn = line.turn(who(0, Priority::Normal)).await;
        for _ in 0..10_000 {
            assert!(line.turn(who(1, Priority::Normal)).now_or_never().is_none());
        }
        assert!(line.lock().waiting.len() <= 2 * LOOK_MIN);
    }
}
