//! The receiver's end of one connection: claims the extents of a frame before their payloads, receives into the claimed blocks,
//! lands them, and says so.
//!
//! Invariants: nothing of a peer's making is trusted before the head's checksum and the geometry were checked; a byte goes
//! into the arena only under a claim; what was rejected goes into a scratch buffer; a payload whose checksum is wrong ends
//! the connection. Between frames the connection may be silent, within one it may not. The thread polls while bytes come,
//! and sleeps else.

use super::acks::Acknowledger;
use super::wait::{SPIN, Spin, Wake};
use super::wire::{self, CRC_BYTES, DESCRIPTOR_BYTES, Frame, PREFIX_BYTES, WireError};
use crate::PathKind;
use crate::transport::raw::{CRC32C, Destinations, Scatter};
use crate::transport::writers::WriterEntry;
use crate::transport::{ExtentHeader, metric};
use baton_node_runtime::{CancellationToken, Clock};
use baton_types::ArenaView;
use crc_fast::Digest;
use rustix::event::PollFlags;
use std::convert::Infallible;
use std::io::{self, ErrorKind};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// Bytes asked of one call. What comes is what the writer's socket buffers, so it is still in the cache when its checksum is
/// taken.
const RECEIVE_BYTES: usize = 4 << 20;
/// Where rejected payloads go.
const SCRATCH_BYTES: usize = 64 << 10;

/// Why a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum End {
    #[error("the writer closed it")]
    Closed,
    #[error("it was closed here")]
    Stopped,
    #[error("it ended within a frame")]
    Torn,
    #[error("nothing came within a frame for {waited:?}")]
    Stalled { waited: Duration },
    #[error("the connection was lost: {kind}")]
    Lost { kind: ErrorKind },
    #[error("malformed frame: {0}")]
    Malformed(#[from] WireError),
    #[error("the checksum of ordinal {} is wrong", .header.ordinal)]
    Corrupt { header: ExtentHeader },
}

/// A socket with the bounds on waiting for it.
pub(super) struct Socket {
    /// It does not block.
    pub(super) stream: TcpStream,
    pub(super) clock: Clock,
    pub(super) progress_timeout: Duration,
    pub(super) wake: Arc<Wake>,
}

impl Socket {
    /// Receives some bytes, at least one; `idle` where the writer may be silent, or close. What is to be acknowledged goes
    /// out meanwhile.
    fn receive(
        &self,
        idle: bool,
        acknowledger: &mut Acknowledger,
        mut receive: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> Result<usize, End> {
        let mut spin = Spin::new(self.clock, SPIN);
        loop {
            if self.wake.is_stopped() {
                return Err(End::Stopped);
            }
            match receive(self.stream.as_fd()) {
                Ok(0) => return Err(if idle { End::Closed } else { End::Torn }),
                Ok(got) => return Ok(got),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(lost(&error)),
            }
            if acknowledger.is_waiting() {
                acknowledger.say(&self.stream).map_err(|error| lost(&error))?;
            }
            if !spin.again() {
                self.sleep(idle, acknowledger.is_waiting())?;
            }
        }
    }

    /// Waits for bytes: without bound where the writer may be silent.
    fn sleep(&self, idle: bool, acknowledging: bool) -> Result<(), End> {
        let mut ready = PollFlags::IN;
        ready.set(PollFlags::OUT, acknowledging);
        let waited = self.progress_timeout;
        self.wake.about_to_sleep();
        let happened = self.wake.sleep(self.stream.as_fd(), ready, (!idle).then_some(waited));
        match happened.map_err(|error| lost(&error))? {
            true => Ok(()),
            false => Err(End::Stalled { waited }),
        }
    }

    /// Receives some bytes of a head.
    fn some(&self, idle: bool, acknowledger: &mut Acknowledger, into: &mut [u8]) -> Result<usize, End> {
        self.receive(idle, acknowledger, |socket| {
            let mut parts = Scatter::default();
            parts.push_bytes(into);
            parts.receive(socket)
        })
    }
}

fn lost(error: &io::Error) -> End {
    End::Lost { kind: error.kind() }
}

/// One connection of a writer. Fields drop in order: claims, socket, and last the entry that says so.
pub(super) struct Receiver {
    /// The frame that is being received.
    batch: Option<Batch>,
    socket: Socket,
    acknowledger: Acknowledger,
    crc: bool,
    arena: ArenaView,
    scratch: Vec<u8>,
    entry: WriterEntry,
}

/// The next frame's first bytes.
struct Ahead {
    bytes: [u8; PREFIX_BYTES],
    have: usize,
}

impl Receiver {
    /// `crc`: payloads carry checksums.
    pub(super) fn new(socket: Socket, crc: bool, arena: ArenaView, entry: WriterEntry) -> Self {
        Self {
            batch: None,
            socket,
            acknowledger: Acknowledger::new(),
            crc,
            arena,
            scratch: Vec::new(),
            entry,
        }
    }

    /// What makes [`Self::run`] end.
    pub(super) fn wake(&self) -> Arc<Wake> {
        Arc::clone(&self.socket.wake)
    }

    /// Cancelled when it is to end.
    pub(super) fn stopped(&self) -> CancellationToken {
        self.entry.stopped().clone()
    }

    /// Receives on this thread until the connection ends, for whatever reason.
    pub(super) fn run(mut self) {
        let Err(end) = self.receive();
        let (from, path) = (self.entry.from(), PathKind::Tcp);
        let (writer, connection) = (from.instance, from.connection);
        match &end {
            End::Closed | End::Stopped => tracing::debug!(%writer, connection, %end, "data connection ended"),
            End::Torn | End::Stalled { .. } | End::Lost { .. } => {
                tracing::warn!(%writer, connection, %end, "data connection broke");
            }
            End::Malformed(_) => {
                metric::malformed(path);
                tracing::warn!(%writer, connection, %end, "data connection broke the protocol");
            }
            End::Corrupt { header } => {
                metric::corrupt(path);
                let epoch = header.epoch.0;
                tracing::error!(%writer, connection, epoch, ordinal = header.ordinal, "payload arrived corrupt");
                // The batch holds the block until this value drops.
                self.entry.landing().corrupt(from, header);
            }
        }
    }

    fn receive(&mut self) -> Result<Infallible, End> {
        let mut ahead = Ahead {
            bytes: [0; PREFIX_BYTES],
            have: 0,
        };
        let mut head = Vec::new();
        loop {
            while ahead.have < PREFIX_BYTES {
                let (idle, into) = (ahead.have == 0, &mut ahead.bytes[ahead.have..]);
                ahead.have += self.socket.some(idle, &mut self.acknowledger, into)?;
            }
            ahead.have = 0;
            let frame = wire::decode_prefix(&ahead.bytes)?;
            head.clear();
            head.extend_from_slice(&ahead.bytes);
            match frame {
                Frame::Fence { epoch } => {
                    wire::decode_head(&head, frame, self.arena.geometry())?;
                    self.entry.landing().fenced(self.entry.from(), epoch);
                }
                Frame::Extents { count, .. } => {
                    head.resize(PREFIX_BYTES + (count - 1) * DESCRIPTOR_BYTES, 0);
                    let mut have = PREFIX_BYTES;
                    while have < head.len() {
                        have += self.socket.some(false, &mut self.acknowledger, &mut head[have..])?;
                    }
                    let headers = wire::decode_head(&head, frame, self.arena.geometry())?;
                    self.claim(headers);
                    self.payloads(&mut ahead)?;
                    self.land()?;
                }
            }
        }
    }

    /// Asks for every extent of a frame before any of its payload is received.
    fn claim(&mut self, headers: Vec<ExtentHeader>) {
        let claims = self.entry.landing().claim_all(self.entry.from(), &headers);
        let rejected = |reject| metric::rejected(PathKind::Tcp, reject);
        let to = Destinations::new(&self.arena, &headers, claims, rejected);
        self.batch = Some(Batch::new(headers, to, self.crc));
    }

    /// Receives the payloads and the trailer of a frame, and as much of the next one's prefix as comes along.
    fn payloads(&mut self, ahead: &mut Ahead) -> Result<(), End> {
        let Self {
            batch: Some(batch),
            socket,
            acknowledger,
            scratch,
            ..
        } = self
        else {
            return Ok(());
        };
        while !batch.is_done() {
            let got = socket.receive(false, acknowledger, |socket| {
                batch.parts(scratch, &mut ahead.bytes).receive(socket)
            })?;
            ahead.have = batch.arrived(got);
        }
        Ok(())
    }

    /// Lands what is wanted, and says that the frame was applied. Where a checksum is wrong nothing of the frame lands, and
    /// its claims live on until that has been reported.
    fn land(&mut self) -> Result<(), End> {
        if let Some(header) = self.batch.as_ref().and_then(Batch::first_wrong) {
            let header = header.clone();
            return Err(End::Corrupt { header });
        }
        let Some(batch) = self.batch.take() else { return Ok(()) };
        let (mut extents, mut bytes) = (0, 0);
        let wanted: Vec<bool> = (0..batch.headers.len())
            .map(|index| batch.to.is_wanted(index))
            .collect();
        let lens = batch.headers.iter().zip(&wanted).filter(|(_, wanted)| **wanted);
        for (landed, (header, _)) in batch.to.land(&wanted).into_iter().zip(lens) {
            match landed {
                Ok(()) => {
                    extents += 1;
                    bytes += header.len as usize;
                }
                Err(reject) => metric::rejected(PathKind::Tcp, reject),
            }
        }
        metric::landed(PathKind::Tcp, extents, bytes);
        self.acknowledger.applied();
        let said = self.acknowledger.say(&self.socket.stream);
        said.map_err(|error| lost(&error))
    }
}

/// The extents of the frame that is being received.
struct Batch {
    headers: Vec<ExtentHeader>,
    to: Destinations,
    check: bool,
    /// The extent that is being received, and how much of it came; behind the last, the trailer.
    at: usize,
    have: usize,
    /// Over what came of it.
    digest: Digest,
    /// Of each extent; of no meaning where it is not wanted.
    crcs: Vec<u32>,
    trailer: Vec<u8>,
}

impl Batch {
    fn new(headers: Vec<ExtentHeader>, to: Destinations, check: bool) -> Self {
        let checked = if check { headers.len() } else { 0 };
        Self {
            to,
            check,
            at: 0,
            have: 0,
            digest: Digest::new(CRC32C),
            crcs: Vec::with_capacity(checked),
            trailer: vec![0; checked * CRC_BYTES],
            headers,
        }
    }

    fn is_done(&self) -> bool {
        self.at == self.headers.len() && self.have == self.trailer.len()
    }

    /// Where the next bytes go: up to the first extent that is not wanted; or to the end, the trailer, and then the next
    /// frame's prefix.
    fn parts<'a>(&'a mut self, scratch: &'a mut Vec<u8>, prefix: &'a mut [u8; PREFIX_BYTES]) -> Scatter<'a> {
        let mut parts = Scatter::default();
        let Some(header) = self.headers.get(self.at) else {
            parts.push_bytes(&mut self.trailer[self.have..]);
            parts.push_bytes(prefix);
            return parts;
        };
        if !self.to.is_wanted(self.at) {
            scratch.resize(SCRATCH_BYTES, 0);
            parts.push_bytes(&mut scratch[..SCRATCH_BYTES.min(header.len as usize - self.have)]);
            return parts;
        }
        let (room, next) = parts.push_destinations(&mut self.to, self.at, self.have, RECEIVE_BYTES);
        if room > 0 && next == self.headers.len() && !parts.is_full() {
            parts.push_bytes(&mut self.trailer);
            parts.push_bytes(prefix);
        }
        parts
    }

    /// So many bytes came into [`Self::parts`]. Gives those that belong to the next prefix.
    fn arrived(&mut self, mut bytes: usize) -> usize {
        while let Some(header) = self.headers.get(self.at) {
            let left = header.len as usize - self.have;
            let taken = bytes.min(left);
            if self.check {
                self.to.digest(self.at, &mut self.digest, self.have, taken);
            }
            self.have += taken;
            bytes -= taken;
            if taken < left {
                return 0;
            }
            if self.check {
                // The algorithm's values have 32 bits.
                self.crcs.push(self.digest.finalize_reset() as u32);
            }
            self.at += 1;
            self.have = 0;
        }
        let taken = bytes.min(self.trailer.len() - self.have);
        self.have += taken;
        bytes - taken
    }

    /// The first wanted extent whose checksum is wrong.
    fn first_wrong(&self) -> Option<&ExtentHeader> {
        let (said, _) = self.trailer.as_chunks::<CRC_BYTES>();
        let wrong = |(index, said): (usize, &[u8; CRC_BYTES])| {
            self.to.is_wanted(index) && self.crcs.get(index) != Some(&u32::from_le_bytes(*said))
        };
        let index = said.iter().enumerate().position(wrong)?;
        self.headers.get(index)
    }
}
