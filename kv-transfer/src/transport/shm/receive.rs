//! The receiver's half of one connection: notices become claims that land at once, and the end is awaited until it is proven.
//!
//! A mapping cannot be taken back from its writer. So a connection ends, and [`crate::transport::Landing::closed`] is called,
//! only when the writer has said that it unmapped the arena, or when its process is dead (its pidfd is readable). Until then
//! the entry stays in the book of writers, whatever the ring or the socket did: a stopped process may go on at any time.

use super::ring::{Consumer, Malformed, Notice};
use super::socket::{Bell, DETACHED, STOP, hear, receive_signal, send_signal};
use crate::PathKind;
use crate::transport::writers::WriterEntry;
use crate::transport::{ExtentHeader, Reject, metric};
use baton_node_runtime::Clock;
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

const KIND: PathKind = PathKind::Shm;
/// Notices read between two turns of other tasks.
const NOTICES_PER_TURN: usize = 128;
/// How long the ring is watched after the last notice before the task sleeps. Waking it costs the writer a system call and
/// the first notice some 10 us.
const SPIN: Duration = Duration::from_micros(50);
/// Looks at the ring between two turns of other tasks.
const LOOKS_PER_TURN: usize = 64;

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The writer said that it unmapped the arena.
    Detached,
    /// The writer's process is dead.
    Died,
    /// No proof came and nobody waits for it any longer: this process ends.
    Abandoned,
}

/// What is heard of the writer besides its notices.
pub(super) struct Signals {
    pub(super) socket: UnixStream,
    /// Readable when the writer's process is dead.
    pub(super) process: AsyncFd<OwnedFd>,
    /// The connection is to end.
    pub(super) stop: CancellationToken,
    /// Proof is awaited no longer.
    pub(super) abandon: CancellationToken,
}

/// What the ring gives, and where it goes. Fields drop in order: the entry last.
pub(super) struct Intake {
    pub(super) consumer: Consumer,
    /// Rung by the writer.
    pub(super) bell: AsyncFd<OwnedFd>,
    /// Wakes the writer.
    pub(super) writer: Bell,
    pub(super) clock: Clock,
    pub(super) layer_bytes: usize,
    pub(super) entry: WriterEntry,
}

/// One connection of a writer.
pub(super) struct Receiver {
    pub(super) signals: Signals,
    pub(super) intake: Intake,
}

/// What the signals ask for.
enum Signal {
    Stop,
    Proof(End),
    /// The socket is of no use any more.
    SocketOver,
}

impl Receiver {
    pub(super) async fn run(self) {
        let Self { signals, mut intake } = self;
        let (end, sound) = attend(&signals, &mut intake).await;
        // What it published before its end has arrived, and counts where its epoch lives.
        if sound && end != End::Abandoned {
            while matches!(intake.drain(), Ok(1..)) {}
        }
        match end {
            End::Detached | End::Died => {
                tracing::debug!(writer = ?intake.entry.from(), ?end, "shared memory given back");
                intake.entry.given_back();
            }
            End::Abandoned => {
                let writer = intake.entry.from().instance;
                tracing::warn!(%writer, "a writer holds this process's memory and gives no sign; ending all the same");
                intake.entry.abandon();
            }
        }
    }
}

/// Serves the connection to its proven end; whether the ring was sound to then.
async fn attend(signals: &Signals, intake: &mut Intake) -> (End, bool) {
    let (mut sound, mut asked, mut hears) = (true, false, true);
    loop {
        let signal = tokio::select! {
            biased;
            signal = signals.next(!asked, hears) => signal,
            malformed = intake.run(), if sound => {
                metric::malformed(KIND);
                tracing::debug!(writer = ?intake.entry.from(), %malformed, "ring malformed");
                sound = false;
                Signal::Stop
            }
        };
        match signal {
            Signal::Stop if !asked => {
                asked = true;
                send_signal(&signals.socket, STOP);
            }
            Signal::Stop => {}
            Signal::SocketOver => hears = false,
            Signal::Proof(end) => return (end, sound),
        }
    }
}

impl Signals {
    /// The next one. Cancel safe.
    async fn next(&self, may_ask: bool, hears: bool) -> Signal {
        tokio::select! {
            biased;
            signal = receive_signal(&self.socket), if hears => match signal {
                Ok(Some(DETACHED)) => Signal::Proof(End::Detached),
                // It closed without a word, or means harm: nothing it says over this socket proves anything. Only its death does.
                Ok(Some(_) | None) | Err(_) => Signal::SocketOver,
            },
            _ = self.process.readable() => Signal::Proof(End::Died),
            () = self.abandon.cancelled() => Signal::Proof(End::Abandoned),
            () = self.stop.cancelled(), if may_ask => Signal::Stop,
        }
    }
}

impl Intake {
    /// Takes notices for as long as they are sound. Cancel safe.
    async fn run(&mut self) -> Malformed {
        let mut active = self.clock.now();
        loop {
            match self.look() {
                Err(malformed) => return malformed,
                Ok(true) => active = self.clock.now(),
                Ok(false) if self.clock.elapsed(active) < SPIN => {}
                Ok(false) => {
                    if self.consumer.arm() {
                        // A bell that cannot be heard would mean a broken descriptor of our own.
                        let _ = hear(&self.bell).await;
                        self.consumer.disarm();
                    }
                    active = self.clock.now();
                    continue;
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// Looks at the ring for a while; whether there was something.
    fn look(&mut self) -> Result<bool, Malformed> {
        for _ in 0..LOOKS_PER_TURN {
            if self.drain()? > 0 {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        Ok(false)
    }

    /// Takes some of the notices that there are; how many.
    fn drain(&mut self) -> Result<usize, Malformed> {
        let (mut taken, mut extents, mut bytes) = (0, 0, 0);
        let result = loop {
            if taken == NOTICES_PER_TURN {
                break Ok(taken);
            }
            let notice = match self.consumer.next() {
                Ok(Some(notice)) => notice,
                Ok(None) => break Ok(taken),
                Err(malformed) => break Err(malformed),
            };
            taken += 1;
            match self.take(notice) {
                Ok(0) => {}
                Ok(len) => (extents, bytes) = (extents + 1, bytes + len),
                Err(reject) => metric::rejected(KIND, reject),
            }
        };
        if taken > 0 {
            if self.consumer.release() {
                self.writer.ring();
            }
            metric::landed(KIND, extents, bytes);
        }
        result
    }

    /// Takes one notice: the bytes that landed by it.
    fn take(&self, notice: Notice) -> Result<usize, Reject> {
        let (landing, from) = (self.entry.landing(), self.entry.from());
        match notice {
            Notice::Fence { epoch } => {
                landing.fenced(from, epoch);
                Ok(0)
            }
            Notice::Extent { epoch, ordinal, layers } => {
                let bytes = layers.len() * self.layer_bytes;
                let len = u32::try_from(bytes).map_err(|_| Reject::OutsideGrant)?;
                let header = ExtentHeader {
                    epoch,
                    ordinal,
                    layers,
                    len,
                };
                // The bytes are there already. The claim says whether they may be counted, and counting is all there is to do.
                landing.claim(from, &header)?.land()?;
                Ok(bytes)
            }
        }
    }
}
