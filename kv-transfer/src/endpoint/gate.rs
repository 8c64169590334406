//! Who may write on a path next: a bound on the bytes under way, and a queue in front of it that is served by deadline, so
//! that a bulk hand-over does not hold up an urgent one for longer than what is under way takes.
//!
//! Order: by deadline, ties by arrival; one that has waited `AGEING` goes before all that came later. The first that does not
//! fit holds up those behind it, so that a large one is not passed for ever; one that is larger than the bound goes alone.
//!
//! The gate also keeps the path's time: how long it was at work for each write.

use super::paths::Sample;
use baton_node_runtime::{Clock, Moment};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// One that waited this long is served before all that came later.
const AGEING: Duration = Duration::from_secs(5);

/// The gate of one path.
#[derive(Debug)]
pub(super) struct Gate {
    clock: Clock,
    bytes_max: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Bytes that may still come under way.
    free: u64,
    under_way: usize,
    waiting: BTreeMap<(Moment, u64), Waiting>,
    arrivals: u64,
    /// When the last write ended.
    ended: Moment,
}

#[derive(Debug)]
struct Waiting {
    cost: u64,
    /// Gives the room, unless its owner has gone.
    called: oneshot::Sender<()>,
}

/// Room for one write. Dropped, it lets the next one in.
#[derive(Debug)]
pub(super) struct Room {
    gate: Arc<Gate>,
    cost: u64,
    bytes: u64,
    began: Moment,
    alone: bool,
}

/// A place in the queue. Dropped before it is called, it leaves; dropped after, the room is given back.
struct Place {
    gate: Arc<Gate>,
    key: (Moment, u64),
    cost: u64,
    called: Option<oneshot::Receiver<()>>,
}

impl Gate {
    pub(super) fn new(bytes_max: usize, clock: Clock) -> Arc<Self> {
        let bytes_max = (bytes_max as u64).max(1);
        Arc::new(Self {
            clock,
            bytes_max,
            state: Mutex::new(State {
                free: bytes_max,
                under_way: 0,
                waiting: BTreeMap::new(),
                arrivals: 0,
                ended: clock.now(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until so many bytes may be written by somebody with that deadline. Cancel safe: who stops waiting is gone from
    /// the queue.
    pub(super) async fn room(self: &Arc<Self>, deadline: Moment, bytes: u64) -> Room {
        let cost = bytes.min(self.bytes_max);
        let mut place = {
            let now = self.clock.now();
            let mut state = self.lock();
            let key = (deadline.min(now + AGEING), state.arrivals);
            state.arrivals += 1;
            let (called, calls) = oneshot::channel();
            state.waiting.insert(key, Waiting { cost, called });
            state.let_in();
            Place {
                gate: Arc::clone(self),
                key,
                cost,
                called: Some(calls),
            }
        };
        if let Some(called) = &mut place.called {
            // Never an error: the sending half stands in the queue until it is used.
            let _ = called.await;
        }
        place.called = None;
        let began = self.clock.now();
        let mut state = self.lock();
        state.under_way += 1;
        Room {
            gate: Arc::clone(self),
            cost,
            bytes,
            began,
            alone: state.under_way == 1,
        }
    }
}

impl State {
    fn let_in(&mut self) {
        while let Some(first) = self.waiting.first_entry() {
            if first.get().cost > self.free {
                return;
            }
            let Waiting { cost, called } = first.remove();
            // One whose owner has just gone needs no room.
            if called.send(()).is_ok() {
                self.free -= cost;
            }
        }
    }

    fn give_back(&mut self, cost: u64) {
        self.free += cost;
        self.let_in();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(mut called) = self.called.take() else { return };
        let mut state = self.gate.lock();
        state.waiting.remove(&self.key);
        match called.try_recv() {
            Ok(()) => state.give_back(self.cost),
            // It may have been what held up the others.
            Err(_) => state.let_in(),
        }
    }
}

impl Room {
    /// The write was applied: how long the path was at work for it.
    pub(super) fn applied(self) -> Sample {
        let now = self.gate.clock.now();
        let mut state = self.gate.lock();
        let since = self.began.max(state.ended);
        state.ended = now;
        drop(state);
        Sample {
            bytes: self.bytes,
            took: now.saturating_since(since),
            alone: self.alone,
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.under_way -= 1;
        state.give_back(self.cost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use proptest::prelude::*;
    use std::future::Future;
    use std::pin::Pin;

    const SECOND: Duration = Duration::from_secs(1);

    type Asking = Pin<Box<dyn Future<Output = Room>>>;

    /// Asks, and is in the queue when this returns.
    fn ask(gate: &Arc<Gate>, deadline: Moment, bytes: u64) -> Result<Room, Asking> {
        let gate = Arc::clone(gate);
        let mut asking: Asking = Box::pin(async move { gate.room(deadline, bytes).await });
        match asking.as_mut().now_or_never() {
            Some(room) => Ok(room),
            None => Err(asking),
        }
    }

    fn is_in(asking: &mut Asking) -> Option<Room> {
        asking.as_mut().now_or_never()
    }

    #[tokio::test(start_paused = true)]
    async fn the_most_urgent_goes_next() {
        let clock = Clock::new();
        let (gate, now) = (Gate::new(10, clock), clock.now());
        let bulk = ask(&gate, now + 3 * SECOND, 8).ok().unwrap();
        let mut more = ask(&gate, now + 3 * SECOND, 8).unwrap_err();
        let mut urgent = ask(&gate, now + SECOND, 4).unwrap_err();
        assert!(is_in(&mut urgent).is_none(), "8 of 10 are under way");
        drop(bulk);
        assert!(is_in(&mut more).is_none(), "it came first, and has time");
        let urgent = is_in(&mut urgent).unwrap();
        drop(urgent);
        assert!(is_in(&mut more).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_has_waited_long_is_not_overtaken() {
        let clock = Clock::new();
        let (gate, now) = (Gate::new(10, clock), clock.now());
        let held = ask(&gate, now, 10).ok().unwrap();
        let mut patient = ask(&gate, now + 3600 * SECOND, 10).unwrap_err();
        clock.sleep(AGEING).await;
        let mut urgent = ask(&gate, clock.now() + SECOND, 1).unwrap_err();
        drop(held);
        assert!(is_in(&mut urgent).is_none());
        let patient = is_in(&mut patient).unwrap();
        drop(patient);
        assert!(is_in(&mut urgent).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_larger_than_the_bound_goes_alone() {
        let clock = Clock::new();
        let (gate, now) = (Gate::new(10, clock), clock.now());
        let small = ask(&gate, now, 1).ok().unwrap();
        let mut huge = ask(&gate, now, 1000).unwrap_err();
        let mut behind = ask(&gate, now, 1).unwrap_err();
        assert!(is_in(&mut behind).is_none(), "the first holds up those behind it");
        drop(small);
        let huge = is_in(&mut huge).unwrap();
        assert!(is_in(&mut behind).is_none());
        drop(huge);
        assert!(is_in(&mut behind).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_the_queue_holds_up_nobody() {
        let clock = Clock::new();
        let (gate, now) = (Gate::new(10, clock), clock.now());
        let held = ask(&gate, now, 5).ok().unwrap();
        let large = ask(&gate, now, 10).unwrap_err();
        let mut small = ask(&gate, now, 5).unwrap_err();
        drop(large);
        let small = is_in(&mut small).unwrap();
        let called_and_gone = ask(&gate, now, 5).unwrap_err();
        drop(held);
        drop(called_and_gone);
        assert!(ask(&gate, now, 5).is_ok(), "the room of the one that left");
        drop(small);
        assert_eq!(gate.lock().free, 10);
    }

    #[tokio::test(start_paused = true)]
    async fn times_of_writes_side_by_side_add_up_to_what_passed() {
        let clock = Clock::new();
        let (gate, now) = (Gate::new(100, clock), clock.now());
        let first = ask(&gate, now, 10).ok().unwrap();
        clock.sleep(SECOND).await;
        let second = ask(&gate, now, 20).ok().unwrap();
        clock.sleep(SECOND).await;
        let took = |sample: Sample| (sample.bytes, sample.took.as_secs(), sample.alone);
        assert_eq!(took(first.applied()), (10, 2, true));
        clock.sleep(3 * SECOND).await;
        assert_eq!(took(second.applied()), (20, 3, false));
        clock.sleep(SECOND).await;
        let third = ask(&gate, now, 30).ok().unwrap();
        clock.sleep(SECOND).await;
        assert_eq!(
            took(third.applied()),
            (30, 1, true),
            "the time between them is nobody's"
        );
    }

    proptest! {
        /// Never more than the bound is under way (save one alone), and everybody who stays comes through.
        #[test]
        fn the_bound_holds_and_nobody_is_lost(
            steps in proptest::collection::vec((0..4u8, 0..8usize, 1..30u64, 0..20u64), 1..200)
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            runtime.block_on(async {
                let clock = Clock::new();
                let gate = Gate::new(20, clock);
                let (mut rooms, mut asking): (Vec<Room>, Vec<Asking>) = (Vec::new(), Vec::new());
                for (what, which, bytes, seconds) in steps {
                    match what {
                        0 | 1 => match ask(&gate, clock.now() + seconds as u32 * SECOND, bytes) {
                            Ok(room) => rooms.push(room),
                            Err(waiting) => asking.push(waiting),
                        },
                        2 if which < rooms.len() => drop(rooms.swap_remove(which)),
                        3 if which < asking.len() => drop(asking.swap_remove(which)),
                        _ => clock.sleep(seconds as u32 * SECOND).await,
                    }
                    asking.retain_mut(|waiting| match is_in(waiting) {
                        Some(room) => {
                            rooms.push(room);
                            false
                        }
                        None => true,
                    });
                    let under_way: u64 = rooms.iter().map(|room| room.bytes).sum();
                    assert!(under_way <= 20 || rooms.len() == 1);
                    assert!(asking.is_empty() || !rooms.is_empty(), "the gate stands open and somebody waits");
                }
                drop((rooms, asking));
                let state = gate.lock();
                assert_eq!((state.free, state.under_way, state.waiting.len()), (20, 0, 0));
            });
        }
    }
}
