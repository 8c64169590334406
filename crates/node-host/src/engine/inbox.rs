//! The door to the engine thread: a bounded queue of sequences, and a bell.

use super::gauges::Gauges;
use super::sequence::SequenceSpec;
use super::{Beginning, EngineLoad};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A sequence that was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many wait as may.
    #[error("{capacity} requests wait already; no more than that may")]
    QueueFull {
        /// The bound.
        capacity: usize,
        /// When there may be a place.
        retry_after: Duration,
    },
    /// The node is going down.
    #[error("the node is shutting down")]
    ShuttingDown,
}

impl SubmitError {
    /// This node later, or another one, may take it.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::QueueFull { .. } | Self::ShuttingDown => true,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    arrived: VecDeque<SequenceSpec>,
    rung: bool,
    closed: bool,
    /// Sequences that were submitted to be computed and have no blocks yet: arrived or waiting inside the engine.
    waiting: usize,
}

#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<State>,
    bell: Condvar,
    capacity: usize,
    /// Sequences that may have blocks at once.
    running_max: AtomicUsize,
}

/// What the engine thread found when it looked.
pub(super) struct Arrivals {
    pub sequences: VecDeque<SequenceSpec>,
    pub closed: bool,
}

impl Inbox {
    pub fn new(capacity: usize, running_max: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            bell: Condvar::new(),
            capacity,
            running_max: AtomicUsize::new(running_max),
        })
    }

    pub fn running_max(&self) -> usize {
        self.running_max.load(Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what has come; where nothing has, waits for the bell, at most `patience` where that is given.
    pub fn look(&self, wait: bool, patience: Option<Duration>) -> Arrivals {
        let mut state = self.state();
        if wait && !state.rung && !state.closed {
            state = match patience {
                Some(patience) => {
                    self.bell
                        .wait_timeout(state, patience)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
                None => self.bell.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
        state.rung = false;
        Arrivals {
            sequences: std::mem::take(&mut state.arrived),
            closed: state.closed,
        }
    }

    /// A waiting sequence has got its blocks, or is gone.
    pub fn left_the_queue(&self) {
        let mut state = self.state();
        state.waiting = state.waiting.saturating_sub(1);
    }
}

/// Where requests bring their sequences. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    pub(super) inbox: Arc<Inbox>,
    pub(super) gauges: Arc<Gauges>,
}

impl EngineHandle {
    /// Brings a sequence. One that resumes has its blocks and is always taken; one that waits for blocks needs a place in
    /// the queue.
    ///
    /// # Errors
    /// A full queue, or a node that is going down.
    pub fn submit(&self, sequence: SequenceSpec) -> Result<(), SubmitError> {
        let mut state = self.inbox.state();
        if state.closed {
            return Err(SubmitError::ShuttingDown);
        }
        if matches!(sequence.beginning, Beginning::Compute) {
            let capacity = self.inbox.capacity;
            if state.waiting >= capacity {
                return Err(SubmitError::QueueFull {
                    capacity,
                    retry_after: self.gauges.load().retry_after(),
                });
            }
            state.waiting += 1;
        }
        state.arrived.push_back(sequence);
        state.rung = true;
        self.inbox.bell.notify_one();
        Ok(())
    }

    /// So many sequences may have blocks at once from now on; those that have them keep them.
    pub fn set_running_max(&self, running_max: usize) {
        self.inbox.running_max.store(running_max, Ordering::Relaxed);
        self.wake();
    }

    /// Something that the engine should look at has changed: a control flag, or room in the pool.
    pub fn wake(&self) {
        self.inbox.state().rung = true;
        self.inbox.bell.notify_one();
    }

    /// Ends the thread: every sequence fails, nothing more is taken.
    pub fn close(&self) {
        self.inbox.state().closed = true;
        self.inbox.bell.notify_one();
    }

    /// The load now; those that have come but were not looked at yet are counted.
    pub fn load(&self) -> EngineLoad {
        let mut load = self.gauges.load();
        let state = self.inbox.state();
        for sequence in &state.arrived {
            if matches!(sequence.beginning, Beginning::Compute) {
                load.queued += 1;
                load.queued_tokens += (sequence.prompt.len() + sequence.generated.len()) as u64;
            }
        }
        load
    }
}
