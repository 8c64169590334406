//! The receiver's driver: performs the effects of the one receiving machine. It owns the machine, the reservations behind
//! its epochs, the roles' handles and the control lines, all under one lock: events are taken one at a time, and their
//! effects performed before the next.
//!
//! Nothing under the lock waits. What needs waiting (destroying connections) is left to the service's task.

use super::blocks::{DestinationBlocks, QuarantinedBlocks, ReservedBlocks};
use super::digest::Comparison;
use super::incoming::{ExpectSpec, Incoming, IncomingEvent};
use super::stats::Counters;
use crate::control::Line;
use crate::session::{Effect, Event, Header, Limits, NotExpected, Receiver, ToReceiver};
use crate::{ExpectError, PathKind};
use baton_node_runtime::{Clock, Moment};
use baton_types::{BlockHash, Epoch, Instance, KvGeometry, Ticket};
use futures::future::BoxFuture;
use std::any::Any;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};

/// Events that a role may leave unread: a few per attempt.
const EVENTS: usize = 64;

/// What the driver is made of.
pub(super) struct ReceivingParts {
    pub limits: Limits,
    pub arena_blocks: usize,
    pub geometry: KvGeometry,
    pub blocks: Arc<dyn DestinationBlocks>,
    pub counters: Arc<Counters>,
    pub clock: Clock,
}

pub(super) struct Receiving {
    core: Mutex<Core>,
    arena_blocks: usize,
    geometry: KvGeometry,
    blocks: Arc<dyn DestinationBlocks>,
    counters: Arc<Counters>,
    clock: Clock,
    started: Moment,
    room_changed: AtomicBool,
    /// The service's task has something to do: an earlier deadline, room, connections to destroy.
    wake: Notify,
    /// A writer's connections are destroyed.
    disconnected: Notify,
}

struct Role {
    hashes: Vec<BlockHash>,
    blocks: usize,
    events: mpsc::Sender<IncomingEvent>,
}

/// What the service's task does for the machine, and answers.
#[derive(Default)]
pub(super) struct Errands {
    /// Writers whose connections of a kind are to be destroyed, and through which epoch.
    pub(super) disconnects: Vec<(Instance, PathKind, Epoch)>,
    /// Digests that are to be compared.
    pub(super) comparisons: Vec<Comparison>,
}

pub(super) struct Core {
    pub(super) machine: Receiver,
    roles: HashMap<Ticket, Role>,
    reserved: HashMap<Epoch, Box<dyn ReservedBlocks>>,
    quarantined: HashMap<Epoch, Box<dyn QuarantinedBlocks>>,
    lines: HashMap<Instance, (u64, Line)>,
    next_line: u64,
    /// What is to be done without the lock.
    errands: Errands,
    /// Connections that are to be destroyed, or are being.
    disconnecting: BTreeSet<(Instance, PathKind)>,
    /// When the service's task will look by itself.
    armed: Duration,
    closed: bool,
    /// Others' objects to be dropped once the lock is open.
    garbage: Vec<Box<dyn Any + Send>>,
}

impl Receiving {
    pub(super) fn new(parts: ReceivingParts) -> Self {
        let ReceivingParts {
            limits,
            arena_blocks,
            geometry,
            blocks,
            counters,
            clock,
        } = parts;
        let core = Core {
            machine: Receiver::new(limits),
            roles: HashMap::new(),
            reserved: HashMap::new(),
            quarantined: HashMap::new(),
            lines: HashMap::new(),
            next_line: 0,
            errands: Errands::default(),
            disconnecting: BTreeSet::new(),
            armed: Duration::MAX,
            closed: false,
            garbage: Vec::new(),
        };
        Self {
            core: Mutex::new(core),
            arena_blocks,
            geometry,
            blocks,
            counters,
            clock,
            started: clock.now(),
            room_changed: AtomicBool::new(false),
            wake: Notify::new(),
            disconnected: Notify::new(),
        }
    }

    pub(super) fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// Brings something to the machine and performs what follows from it.
    pub(super) fn with<T>(&self, bring: impl FnOnce(&mut Receiver, Duration) -> T) -> T {
        let now = self.clock.now().saturating_since(self.started);
        let mut core = self.lock();
        let result = bring(&mut core.machine, now);
        if self.perform_all(&mut core, now) {
            self.counters.received_state(&core.machine);
        }
        let garbage = std::mem::take(&mut core.garbage);
        drop(core);
        drop(garbage);
        result
    }

    pub(super) fn event(&self, event: Event) {
        self.with(|machine, now| machine.handle(now, event));
        self.counters.received_state(&self.lock().machine);
    }

    /// Blocks became free. Callable from anywhere, even from within the block pool's own calls.
    pub(super) fn room_changed(&self) {
        self.room_changed.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    pub(super) fn expect(self: &Arc<Self>, spec: ExpectSpec) -> Result<Incoming, ExpectError> {
        let context_blocks = self.geometry.blocks_for(spec.context_tokens);
        let blocks = spec.blocks.max(context_blocks);
        let limit = self.arena_blocks;
        let count = u32::try_from(blocks).ok().filter(|_| blocks <= limit);
        let count = count.ok_or(ExpectError::TooLarge { blocks, limit })?;
        if spec.deadline.is_zero() {
            return Err(ExpectError::Deadline);
        }
        let now = self.clock.now().saturating_since(self.started);
        let ExpectSpec {
            ticket,
            attempt,
            mut hashes,
            context_tokens,
            deadline,
            ..
        } = spec;
        hashes.truncate(context_blocks);
        let mut core = self.lock();
        if core.closed {
            return Err(ExpectError::ShuttingDown);
        }
        core.machine.may_expect(ticket).map_err(|reason| match reason {
            NotExpected::Duplicate(attempt) => ExpectError::Duplicate { attempt },
            NotExpected::TooMany(limit) => ExpectError::TooMany { limit },
        })?;
        let (sender, events) = mpsc::channel(EVENTS);
        core.roles.insert(
            ticket,
            Role {
                hashes,
                blocks,
                events: sender,
            },
        );
        let deadline = now.saturating_add(deadline);
        let context_tokens = context_tokens as u64;
        core.machine.handle(
            now,
            Event::Expect {
                ticket,
                attempt,
                blocks: count,
                context_tokens,
                deadline,
            },
        );
        self.perform_all(&mut core, now);
        Ok(Incoming::new(ticket, events, Arc::clone(self)))
    }

    /// The role's handle is gone.
    pub(super) fn forget(&self, ticket: Ticket) {
        let role = self.lock().roles.remove(&ticket);
        drop(role);
        self.event(Event::Forget { ticket });
    }

    /// A sender's control connection is there. Gives its number.
    pub(super) fn line_opened(&self, instance: Instance, line: Line) -> Option<u64> {
        self.line_replaced(instance);
        let mut core = self.lock();
        if core.closed {
            return None;
        }
        core.next_line += 1;
        let number = core.next_line;
        core.lines.insert(instance, (number, line));
        Some(number)
    }

    /// Whatever that process had here before is over, and its connections are destroyed when this resolves: or some cannot
    /// be within `patience`, and nothing is granted on those kinds of path until they are.
    pub(super) async fn clear_way_for(&self, instance: Instance, patience: Duration) {
        self.line_replaced(instance);
        let cleared = async {
            loop {
                let changed = self.disconnected.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if !self.lock().disconnecting.iter().any(|(gone, _)| *gone == instance) {
                    return;
                }
                changed.await;
            }
        };
        if self.clock.timeout(patience, cleared).await.is_err() {
            tracing::warn!(%instance, "a sender is back before all that it had here is proven over");
        }
    }

    fn line_replaced(&self, instance: Instance) {
        let old = self.lock().lines.get(&instance).map(|(number, _)| *number);
        if let Some(number) = old {
            self.line_lost(instance, number);
        }
    }

    pub(super) fn line_lost(&self, instance: Instance, number: u64) {
        let mut core = self.lock();
        if core.lines.get(&instance).is_some_and(|(current, _)| *current == number) {
            if let Some((_, line)) = core.lines.remove(&instance) {
                line.close();
            }
            drop(core);
            self.event(Event::PeerLost { instance });
        }
    }

    /// A sender speaks on its line of that number.
    pub(super) fn hear(&self, from: Instance, number: u64, header: Header, message: ToReceiver) {
        // Late words of a line that was replaced are not to be taken for the new one's.
        let current = self
            .lock()
            .lines
            .get(&from)
            .is_some_and(|(current, _)| *current == number);
        if current {
            self.event(Event::Message { from, header, message });
        }
    }

    /// For the service's task: does what is due, and gives it its errands and when to come again.
    pub(super) fn due(&self) -> (Errands, Moment) {
        let room_changed = self.room_changed.swap(false, Ordering::AcqRel);
        self.with(|machine, now| {
            if room_changed {
                machine.handle(now, Event::RoomChanged);
            }
            if machine.next_tick() <= now {
                machine.handle(now, Event::Tick);
            }
        });
        let mut core = self.lock();
        core.armed = core.machine.next_tick();
        (std::mem::take(&mut core.errands), self.started + core.armed)
    }

    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Waits for a proof that is late, and says so: once when it is, once when it came.
    pub(super) async fn await_silent(&self, writer: Instance, path: PathKind, proof: BoxFuture<'_, ()>) {
        let (handovers, blocks) = self.lock().machine.quarantined_of(writer, path);
        let since = self.clock.now();
        tracing::warn!(
            %writer, %path, handovers, blocks,
            "writer is silent: its blocks stay in quarantine until it proves that it writes no more, or dies"
        );
        proof.await;
        let waited = self.clock.elapsed(since);
        tracing::info!(%writer, %path, handovers, blocks, ?waited, "writer can write no more: its blocks are back");
    }

    /// The writer's connections of that kind were destroyed.
    pub(super) fn disconnect_done(&self, instance: Instance, path: PathKind, through: Epoch) {
        self.lock().disconnecting.remove(&(instance, path));
        self.event(Event::Disconnected {
            instance,
            path,
            through,
        });
        self.disconnected.notify_waiters();
    }

    /// The digest of what arrived was compared with the sender's.
    pub(super) fn verified(&self, epoch: Epoch, matches: bool) {
        if !matches {
            tracing::error!(epoch = epoch.0, "what arrived has another digest than what was sent");
            self.counters.digest_mismatch();
        }
        self.event(Event::Verified { epoch, matches });
    }

    /// Every attempt ends, no line is left, and none comes.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.event(Event::Shutdown);
        let lines: Vec<(Instance, u64)> = self
            .lock()
            .lines
            .iter()
            .map(|(peer, (number, _))| (*peer, *number))
            .collect();
        for (instance, number) in lines {
            self.line_lost(instance, number);
        }
    }

    /// Every transport was shut down: nothing can be written here any more.
    pub(super) fn nothing_writes(&self) {
        let abandoned = std::mem::take(&mut self.lock().errands.comparisons);
        self.with(|machine, now| {
            for Comparison { epoch, .. } in abandoned {
                machine.handle(now, Event::Verified { epoch, matches: false });
            }
            for (instance, path) in machine
                .writers()
                .into_iter()
                .flat_map(|instance| PathKind::ALL.map(|path| (instance, path)))
            {
                machine.handle(
                    now,
                    Event::Disconnected {
                        instance,
                        path,
                        through: Epoch(u64::MAX),
                    },
                );
            }
        });
        self.lock().disconnecting.clear();
        self.disconnected.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        // A panic under this lock ends the process through its supervisor; until then the books are still the best there are.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says whether there was anything to perform.
    fn perform_all(&self, core: &mut Core, now: Duration) -> bool {
        let mut changed = false;
        loop {
            let effects = core.machine.take_effects();
            if effects.is_empty() {
                break;
            }
            changed = true;
            for effect in effects {
                self.perform(core, now, effect);
            }
        }
        if core.machine.next_tick() < core.armed {
            core.armed = core.machine.next_tick();
            self.wake.notify_one();
        }
        changed
    }

    fn perform(&self, core: &mut Core, now: Duration, effect: Effect) {
        match effect {
            Effect::Allocate { epoch, ticket } => self.allocate(core, now, epoch, ticket),
            Effect::Discard { epoch } => {
                if let Some(reserved) = core.reserved.remove(&epoch) {
                    reserved.release();
                }
            }
            Effect::Regrant { old, new } => {
                tracing::debug!(old = old.0, epoch = new.0, "goes on under a new epoch");
                if let Some(reserved) = core.reserved.remove(&old) {
                    core.reserved.insert(new, reserved);
                }
            }
            Effect::Verify { epoch, blocks, digest } => {
                core.errands.comparisons.push(Comparison { epoch, blocks, digest });
                self.wake.notify_one();
            }
            Effect::Send { to, header, message } => {
                if let Some((_, line)) = core.lines.get(&to) {
                    line.tell_sender(&header, &message);
                }
            }
            Effect::Granted {
                ticket,
                epoch,
                held,
                fresh,
            } => {
                tracing::debug!(%ticket, epoch = epoch.0, held, fresh, "granted");
                let (held, fresh) = (held as usize, fresh as usize);
                tell(core, ticket, IncomingEvent::Granted { epoch, held, fresh });
            }
            Effect::FirstBlock { ticket } => tell(core, ticket, IncomingEvent::FirstBlock),
            Effect::Commit {
                ticket,
                attempt,
                epoch,
                held,
                payload,
                bytes,
                path,
                fallbacks,
            } => {
                let Some(reserved) = core.reserved.remove(&epoch) else {
                    return;
                };
                tracing::debug!(%ticket, epoch = epoch.0, bytes, %path, "committed");
                self.counters.received(path, bytes);
                let held_blocks = held as usize;
                let blocks = reserved.commit();
                let event = IncomingEvent::Committed {
                    attempt,
                    blocks,
                    held_blocks,
                    payload,
                    bytes,
                    path,
                    fallbacks,
                };
                tell(core, ticket, event);
                core.roles.remove(&ticket);
            }
            Effect::Failed {
                ticket,
                attempt,
                path,
                error,
            } => {
                tracing::debug!(%ticket, attempt = attempt.0, %error, "attempt failed");
                self.counters.failed(path, "in");
                tell(core, ticket, IncomingEvent::AttemptFailed { attempt, error });
            }
            Effect::Quarantine { epoch } => {
                if let Some(reserved) = core.reserved.remove(&epoch) {
                    core.quarantined.insert(epoch, reserved.quarantine());
                }
            }
            Effect::Release { epoch } => {
                if let Some(quarantined) = core.quarantined.remove(&epoch) {
                    quarantined.release();
                }
            }
            Effect::Disconnect {
                instance,
                path,
                through,
            } => {
                tracing::info!(%instance, %path, "what a sender has here on this path is being destroyed");
                core.errands.disconnects.push((instance, path, through));
                core.disconnecting.insert((instance, path));
                self.wake.notify_one();
            }
        }
    }

    fn allocate(&self, core: &mut Core, now: Duration, epoch: Epoch, ticket: Ticket) {
        let reserved = match core.roles.get(&ticket) {
            Some(role) => self.blocks.reserve(&role.hashes, role.blocks).ok(),
            None => None,
        };
        let event = match reserved {
            None => Event::NoRoom { epoch },
            Some(reserved) => {
                let held = u32::try_from(reserved.held().len()).unwrap_or(u32::MAX);
                let fresh = reserved.fresh().to_vec();
                core.reserved.insert(epoch, reserved);
                Event::Allocated { epoch, held, fresh }
            }
        };
        core.machine.handle(now, event);
    }
}

/// Tells the role. One that reads nothing, or is gone, loses what it was told; its blocks go back.
fn tell(core: &mut Core, ticket: Ticket, event: IncomingEvent) {
    let lost = match core.roles.get(&ticket).map(|role| &role.events) {
        None => event,
        Some(events) => match events.try_send(event) {
            Ok(()) => return,
            Err(mpsc::error::TrySendError::Full(event) | mpsc::error::TrySendError::Closed(event)) => event,
        },
    };
    core.garbage.push(Box::new(lost));
}
