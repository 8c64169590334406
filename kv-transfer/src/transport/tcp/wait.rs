//! How a connection's thread waits: it polls for some microseconds, because a wake-up costs about ten, and gives way meanwhile
//! to others that want its core, for both ends may be there; then it sleeps until the socket or another thread has something
//! for it. At rest it takes no CPU.

use baton_node_runtime::{Clock, Moment};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long a thread polls after it last moved something.
pub(super) const SPIN: Duration = Duration::from_micros(100);
/// How long a writer's own thread does.
pub(super) const SPIN_INLINE: Duration = Duration::from_micros(50);
/// Pauses between two polls.
const PAUSES: u32 = 8;

/// One polling phase: from the first time that nothing moved.
pub(super) struct Spin {
    clock: Clock,
    bound: Duration,
    begun: Option<Moment>,
}

impl Spin {
    pub(super) fn new(clock: Clock, bound: Duration) -> Self {
        static ALONE: OnceLock<bool> = OnceLock::new();
        // With one core, whoever is waited for runs only while nobody polls.
        let alone = *ALONE.get_or_init(|| std::thread::available_parallelism().is_ok_and(|cores| cores.get() == 1));
        Self {
            clock,
            bound: if alone { Duration::ZERO } else { bound },
            begun: None,
        }
    }

    /// Something moved: the phase is over.
    pub(super) fn moved(&mut self) {
        self.begun = None;
    }

    /// Nothing moved. False where it is time to sleep.
    pub(super) fn again(&mut self) -> bool {
        let begun = *self.begun.get_or_insert_with(|| self.clock.now());
        // Whoever is waited for may want this core.
        std::thread::yield_now();
        for _ in 0..PAUSES {
            std::hint::spin_loop();
        }
        self.clock.elapsed(begun) < self.bound
    }
}

/// Wakes one thread out of [`Wake::sleep`].
pub(super) struct Wake {
    event: OwnedFd,
    asleep: AtomicBool,
    stopped: AtomicBool,
}

impl Wake {
    /// # Errors
    /// The system gives no descriptor.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            asleep: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        })
    }

    /// Ends the thread's sleep where it sleeps or is about to.
    pub(super) fn wake(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            // It can only fail where it is at its bound, and then the thread wakes too.
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        }
    }

    /// Tells the thread to end.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// From now on [`Self::wake`] ends the next sleep: to be said before the thread looks for the last time whether there is
    /// something to do.
    pub(super) fn about_to_sleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
    }

    /// Waits until the socket is ready, or someone wakes the thread; false where neither happened in time.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn sleep(&self, socket: BorrowedFd<'_>, ready: PollFlags, bound: Option<Duration>) -> io::Result<bool> {
        let happened = self.poll(socket, ready, bound);
        if !self.asleep.swap(false, Ordering::SeqCst) {
            let _ = rustix::io::read(&self.event, &mut [0_u8; 8]);
        }
        happened
    }

    fn poll(&self, socket: BorrowedFd<'_>, ready: PollFlags, bound: Option<Duration>) -> io::Result<bool> {
        if self.is_stopped() {
            return Ok(true);
        }
        let mut fds = [
            PollFd::from_borrowed_fd(socket, ready),
            PollFd::new(&self.event, PollFlags::IN),
        ];
        // A bound that the system cannot say is far enough away to be looked at again then.
        let bound = bound.map(|bound| {
            Timespec::try_from(bound).unwrap_or(Timespec {
                tv_sec: 3600,
                tv_nsec: 0,
            })
        });
        match poll(&mut fds, bound.as_ref()) {
            Ok(0) => Ok(false),
            Ok(_) | Err(Errno::INTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}
