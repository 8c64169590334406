//! The writer's end of one connection: takes batches off its lane, hands them to the socket, and hears that they were applied.
//!
//! A connection has a thread of its own, which polls while there is something to do and sleeps else. A small write on an idle
//! connection is carried by the thread that asks for it, acknowledgement included, so that nobody has to be woken: whoever
//! holds the lock on the [`Wire`] carries. Claims are let go when the kernel has taken the bytes. A peer that takes nothing,
//! or acknowledges nothing, for `progress_timeout` ends the path.

use super::acks::Awaited;
use super::outbox::{Outbox, Sent};
use super::wait::{SPIN, SPIN_INLINE, Spin, Wake};
use crate::transport::PathError;
use crate::transport::lanes::{Drive, LaneQueue};
use baton_node_runtime::{Clock, Moment};
use rustix::event::PollFlags;
use std::io::{self, ErrorKind};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// How long a writer's own thread carries, others' bytes included.
const INLINE: Duration = Duration::from_micros(150);
/// Steps that sent something between two looks for acknowledgements.
const STEPS_UNHEARD: u32 = 16;

/// What carries: one at a time. Fields drop in order: the socket is closed before the claims go.
struct Wire {
    stream: Arc<TcpStream>,
    outbox: Outbox,
    awaited: Awaited,
    queue: LaneQueue,
    clock: Clock,
    /// When something last moved, or there was nothing to be moved.
    moved: Moment,
    steps_unheard: u32,
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Moved,
    /// The socket takes nothing and says nothing now.
    Blocked,
    /// Nothing is left to be sent or heard.
    Idle,
}

impl Wire {
    fn step(&mut self) -> Result<Step, PathError> {
        if self.outbox.is_empty()
            && let Some(item) = self.queue.try_next()
        {
            if !self.awaited.is_waiting() {
                self.moved = self.clock.now();
            }
            self.outbox.push(item);
        }
        let mut moved = false;
        if !self.outbox.is_empty() {
            match self.outbox.send(self.stream.as_fd()) {
                Ok(mut sent) => {
                    moved = true;
                    while let Some(frame) = self.outbox.sent(&mut sent) {
                        match frame {
                            Sent::Extents(ticket) => self.awaited.sent(ticket),
                            Sent::Fence => {}
                        }
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => moved = true,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(lost(&error)),
            }
        }
        self.steps_unheard += 1;
        if self.awaited.is_waiting() && (!moved || self.outbox.is_empty() || self.steps_unheard > STEPS_UNHEARD) {
            self.steps_unheard = 0;
            moved |= self.awaited.hear(&self.stream)?;
        }
        match (moved, self.is_idle()) {
            (true, _) => Ok(Step::Moved),
            (false, true) => Ok(Step::Idle),
            (false, false) => Ok(Step::Blocked),
        }
    }

    fn is_idle(&self) -> bool {
        self.outbox.is_empty() && !self.awaited.is_waiting()
    }

    /// Carries until nothing is left (then true), nothing has moved for `spin`, or `most` has passed.
    fn carry(&mut self, wake: &Wake, spin: Duration, most: Duration) -> Result<bool, PathError> {
        let (mut spin, begun) = (Spin::new(self.clock, spin), self.clock.now());
        loop {
            match self.step()? {
                Step::Moved => {
                    spin.moved();
                    self.moved = self.clock.now();
                    if self.moved.saturating_since(begun) > most {
                        return Ok(false);
                    }
                }
                Step::Idle => return Ok(true),
                Step::Blocked if spin.again() => {}
                Step::Blocked => return Ok(false),
            }
            if wake.is_stopped() {
                return Ok(false);
            }
        }
    }

    /// What the socket is to be waited for.
    fn interest(&self) -> PollFlags {
        // Without `IN` where nothing is awaited: an acknowledgement that a writer's own thread awaits wakes nobody else.
        let mut interest = PollFlags::RDHUP;
        interest.set(PollFlags::IN, self.awaited.is_waiting());
        interest.set(PollFlags::OUT, !self.outbox.is_empty());
        interest
    }
}

/// How a sender is made.
pub(super) struct SenderOptions {
    /// It does not block.
    pub(super) stream: TcpStream,
    pub(super) crc: bool,
    pub(super) queue: LaneQueue,
    pub(super) clock: Clock,
    pub(super) progress_timeout: Duration,
}

/// One connection of a path.
pub(super) struct Sender {
    stream: Arc<TcpStream>,
    /// None once the connection is over.
    wire: Mutex<Option<Wire>>,
    wake: Wake,
    clock: Clock,
    progress_timeout: Duration,
}

impl Sender {
    /// Its queue tells it of new items from now on.
    ///
    /// # Errors
    /// The system gives no descriptor.
    pub(super) fn new(options: SenderOptions) -> io::Result<Arc<Self>> {
        let SenderOptions {
            stream,
            crc,
            queue,
            clock,
            progress_timeout,
        } = options;
        let (wake, stream) = (Wake::new()?, Arc::new(stream));
        Ok(Arc::new_cyclic(|this: &Weak<Self>| {
            queue.driven_by(this.clone());
            let wire = Wire {
                stream: Arc::clone(&stream),
                outbox: Outbox::new(crc),
                awaited: Awaited::default(),
                queue,
                clock,
                moved: clock.now(),
                steps_unheard: 0,
            };
            Self {
                stream,
                wire: Mutex::new(Some(wire)),
                wake,
                clock,
                progress_timeout,
            }
        }))
    }

    /// Makes [`Self::run`] end.
    pub(super) fn stop(&self) {
        self.wake.stop();
    }

    /// Carries on this thread until the path ends.
    pub(super) fn run(&self) {
        let ended = self.carry();
        let Some(mut wire) = self.wire().take() else { return };
        if let Err(error) = ended {
            wire.queue.state().fail(error);
        }
        // Nothing more goes out, whoever still holds the descriptor.
        let _ = self.stream.shutdown(Shutdown::Both);
        for item in wire.outbox.take_items() {
            wire.queue.give_back(item);
        }
    }

    fn wire(&self) -> MutexGuard<'_, Option<Wire>> {
        // A panic in a carrier ends the process in order; what it left is not carried on but dropped.
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ok where the path was stopped.
    fn carry(&self) -> Result<(), PathError> {
        while !self.wake.is_stopped() {
            let (idle, interest, moved) = {
                let mut wire = self.wire();
                let Some(wire) = wire.as_mut() else { return Ok(()) };
                wire.carry(&self.wake, SPIN, Duration::MAX)?;
                self.wake.about_to_sleep();
                let idle = wire.carry(&self.wake, Duration::ZERO, Duration::MAX)?;
                (idle, wire.interest(), wire.moved)
            };
            let left = self.progress_timeout.saturating_sub(self.clock.elapsed(moved));
            let bound = (!idle).then_some(left);
            let happened = self.wake.sleep(self.stream.as_fd(), interest, bound);
            let happened = happened.map_err(|error| lost(&error))?;
            if idle {
                self.look()?;
            } else if !happened {
                self.check_progress()?;
            }
        }
        Ok(())
    }

    /// Something happened though nothing was to be done: a new item, or the end of the connection.
    fn look(&self) -> Result<(), PathError> {
        match self.wire().as_mut() {
            Some(wire) if wire.is_idle() => wire.awaited.hear(&self.stream).map(|_| ()),
            Some(_) | None => Ok(()),
        }
    }

    fn check_progress(&self) -> Result<(), PathError> {
        let waited = self.progress_timeout;
        match self.wire().as_ref() {
            Some(wire) if !wire.is_idle() && self.clock.elapsed(wire.moved) >= waited => {
                Err(PathError::Stalled { waited })
            }
            Some(_) | None => Ok(()),
        }
    }
}

impl Drive for Sender {
    fn drive(&self, inline: bool) {
        if inline
            && let Ok(mut wire) = self.wire.try_lock()
            && let Some(wire) = wire.as_mut()
        {
            match wire.carry(&self.wake, SPIN_INLINE, INLINE) {
                // Whoever queued something meanwhile found the lock taken and wakes the thread.
                Ok(true) => return,
                Ok(false) => {}
                // Stops all lanes of the path, hence this one's thread.
                Err(error) => wire.queue.state().fail(error),
            }
        }
        self.wake.wake();
    }
}

fn lost(error: &io::Error) -> PathError {
    PathError::Lost { kind: error.kind() }
}
