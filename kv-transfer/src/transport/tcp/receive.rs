//! The receiver's end of one connection: claims each extent before its payload, receives into the claimed block, lands it.
//!
//! Invariants: nothing of a peer's making is trusted before the head's checksum and the geometry were checked; a byte goes
//! into the arena only under a claim; what was rejected goes into a scratch buffer; a payload whose checksum is wrong ends
//! the connection. Between frames the connection may be silent, within one it may not.

use super::wire::{self, Announced, DESCRIPTOR_BYTES, Frame, PREFIX_BYTES, WireError};
use crate::PathKind;
use crate::transport::raw::{CRC32C, Destination, PARTS_MAX, Scatter};
use crate::transport::writers::WriterEntry;
use crate::transport::{ExtentHeader, metric};
use baton_node_runtime::Clock;
use baton_types::ArenaView;
use crc_fast::Digest;
use std::convert::Infallible;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

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
    pub(super) stream: TcpStream,
    pub(super) clock: Clock,
    pub(super) progress_timeout: Duration,
    pub(super) stop: CancellationToken,
}

impl Socket {
    /// Waits for bytes: without bound where the writer may be silent.
    async fn readable(&self, idle: bool) -> Result<(), End> {
        let readable = async {
            if idle {
                return self.stream.readable().await.map_err(|error| lost(&error));
            }
            let waited = self.progress_timeout;
            match self.clock.timeout(waited, self.stream.readable()).await {
                Ok(ready) => ready.map_err(|error| lost(&error)),
                Err(_) => Err(End::Stalled { waited }),
            }
        };
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(End::Stopped),
            ready = readable => ready,
        }
    }

    /// One call: how much came, none where nothing is there yet.
    fn attempt(&self, receive: impl FnOnce(BorrowedFd<'_>) -> io::Result<usize>) -> Result<Option<usize>, End> {
        if self.stop.is_cancelled() {
            return Err(End::Stopped);
        }
        match self.stream.try_io(Interest::READABLE, || receive(self.stream.as_fd())) {
            Ok(got) => Ok(Some(got)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(lost(&error)),
        }
    }

    /// Receives some bytes, at least one; `idle` where the writer may be silent, or close.
    async fn some(&self, idle: bool, into: &mut [u8]) -> Result<usize, End> {
        loop {
            let got = self.attempt(|socket| {
                let mut parts = Scatter::default();
                parts.push_bytes(into);
                parts.receive(socket)
            })?;
            match got {
                Some(0) => return Err(if idle { End::Closed } else { End::Torn }),
                Some(got) => return Ok(got),
                None => self.readable(idle).await?,
            }
        }
    }
}

fn lost(error: &io::Error) -> End {
    End::Lost { kind: error.kind() }
}

/// One connection of a writer. Fields drop in order: claims, socket, and last the entry that says so.
pub(super) struct Receiver {
    batch: Batch,
    socket: Socket,
    arena: ArenaView,
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
            batch: Batch::new(crc),
            socket,
            arena,
            entry,
        }
    }

    /// Receives until the connection ends, for whatever reason.
    pub(super) async fn run(mut self) {
        let Err(end) = self.receive().await;
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

    async fn receive(&mut self) -> Result<Infallible, End> {
        let mut ahead = Ahead {
            bytes: [0; PREFIX_BYTES],
            have: 0,
        };
        let mut head = Vec::new();
        loop {
            while ahead.have < PREFIX_BYTES {
                let idle = ahead.have == 0;
                ahead.have += self.socket.some(idle, &mut ahead.bytes[ahead.have..]).await?;
            }
            ahead.have = 0;
            // A writer that never stops keeps nobody else from running.
            tokio::task::consume_budget().await;
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
                        have += self.socket.some(false, &mut head[have..]).await?;
                    }
                    let announced = wire::decode_head(&head, frame, self.arena.geometry())?;
                    self.claim(announced);
                    self.payloads(&mut ahead).await?;
                }
            }
        }
    }

    /// Asks for every extent of a frame before any of its payload is received.
    fn claim(&mut self, announced: Vec<Announced>) {
        let (landing, from) = (self.entry.landing(), self.entry.from());
        for Announced { header, crc } in announced {
            let claimed = landing.claim(from, &header);
            let destination = claimed.and_then(|claim| Destination::new(&self.arena, &header, claim));
            let destination = destination
                .inspect_err(|reject| metric::rejected(PathKind::Tcp, *reject))
                .ok();
            self.batch.items.push(Item {
                header,
                crc,
                destination,
            });
        }
    }

    /// Receives the payloads of a frame, and as much of the next one's prefix as comes along.
    async fn payloads(&mut self, ahead: &mut Ahead) -> Result<(), End> {
        while !self.batch.is_done() {
            let Self { batch, socket, .. } = self;
            let got = socket.attempt(|socket| batch.parts(&mut ahead.bytes).receive(socket))?;
            match got {
                Some(0) => return Err(End::Torn),
                Some(got) => {
                    ahead.have = batch.arrived(got)?;
                    tokio::task::consume_budget().await;
                }
                None => socket.readable(false).await?,
            }
        }
        self.batch.finish();
        Ok(())
    }
}

struct Item {
    header: ExtentHeader,
    crc: u32,
    /// None: rejected, its payload is discarded.
    destination: Option<Destination>,
}

/// The extents of the frame that is being received.
struct Batch {
    check: bool,
    items: Vec<Item>,
    /// The item that is being received, and how much of it came.
    at: usize,
    have: usize,
    /// Over what came of it.
    digest: Digest,
    landed: usize,
    landed_bytes: usize,
    scratch: Vec<u8>,
}

impl Batch {
    fn new(check: bool) -> Self {
        Self {
            check,
            items: Vec::new(),
            at: 0,
            have: 0,
            digest: Digest::new(CRC32C),
            landed: 0,
            landed_bytes: 0,
            scratch: Vec::new(),
        }
    }

    fn is_done(&self) -> bool {
        self.at == self.items.len()
    }

    /// Where the next bytes go: up to the first rejected extent, or all, and then into the next frame's prefix.
    fn parts<'a>(&'a mut self, prefix: &'a mut [u8; PREFIX_BYTES]) -> Scatter<'a> {
        let mut parts = Scatter::default();
        let mut have = self.have;
        for item in &mut self.items[self.at..] {
            if parts.len() + 1 >= PARTS_MAX {
                return parts;
            }
            match &mut item.destination {
                Some(destination) => parts.push_destination(destination, have),
                None => {
                    self.scratch.resize(SCRATCH_BYTES, 0);
                    let len = SCRATCH_BYTES.min(item.header.len as usize - have);
                    parts.push_bytes(&mut self.scratch[..len]);
                    return parts;
                }
            }
            have = 0;
        }
        parts.push_bytes(prefix);
        parts
    }

    /// So many bytes came into [`Self::parts`]: lands what is whole. Gives those that belong to the next prefix.
    fn arrived(&mut self, mut bytes: usize) -> Result<usize, End> {
        while let Some(item) = self.items.get_mut(self.at) {
            let taken = bytes.min(item.header.len as usize - self.have);
            if let (true, Some(destination)) = (self.check, &item.destination) {
                destination.digest(&mut self.digest, self.have, taken);
            }
            self.have += taken;
            bytes -= taken;
            if self.have < item.header.len as usize {
                return Ok(0);
            }
            if let Some(destination) = &item.destination
                && self.check
                && self.digest.finalize_reset() as u32 != item.crc
            {
                debug_assert_eq!(destination.len(), self.have);
                return Err(End::Corrupt {
                    header: item.header.clone(),
                });
            }
            match item.destination.take().map(Destination::land) {
                Some(Ok(())) => {
                    self.landed += 1;
                    self.landed_bytes += self.have;
                }
                Some(Err(reject)) => metric::rejected(PathKind::Tcp, reject),
                None => {}
            }
            self.at += 1;
            self.have = 0;
        }
        Ok(bytes)
    }

    /// Makes ready for the next frame.
    fn finish(&mut self) {
        metric::landed(PathKind::Tcp, self.landed, self.landed_bytes);
        self.items.clear();
        (self.at, self.have, self.landed, self.landed_bytes) = (0, 0, 0, 0);
    }
}
