//! The writer's end of one connection: takes batches off its lane and hands them to the socket, many extents to one call.
//!
//! Claims are let go when the kernel has taken the bytes. A peer that takes nothing for `progress_timeout` ends the path.

use super::wire;
use crate::PathKind;
use crate::transport::lanes::{LaneItem, LaneQueue};
use crate::transport::raw::{Gather, PARTS_MAX};
use crate::transport::{PathError, metric};
use baton_node_runtime::Clock;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Bytes gathered before a call: more would leave the cache between checksum and copy.
const GATHER_BYTES: usize = 1 << 20;

/// One connection of a path. Fields drop in order: the socket is closed before the claims go.
pub(super) struct Sender {
    pub(super) stream: TcpStream,
    pub(super) outbox: Outbox,
    pub(super) queue: LaneQueue,
    pub(super) clock: Clock,
    pub(super) progress_timeout: Duration,
}

impl Sender {
    /// Carries until the path ends.
    pub(super) async fn run(mut self) {
        match self.carry().await {
            Ok(()) => {}
            Err(error) => self.queue.state().fail(error),
        }
        for frame in self.outbox.frames.drain(..) {
            self.queue.give_back(frame.item);
        }
    }

    /// Ok where the path was stopped or dropped.
    async fn carry(&mut self) -> Result<(), PathError> {
        let stop = self.queue.stopped();
        loop {
            if self.outbox.is_empty() {
                let item = tokio::select! {
                    biased;
                    () = stop.cancelled() => return Ok(()),
                    item = self.queue.next() => item,
                    broken = ended(&self.stream) => return Err(broken),
                };
                let Some(item) = item else { return Ok(()) };
                self.outbox.push(item);
            }
            while self.outbox.has_room() {
                let Some(item) = self.queue.try_next() else { break };
                self.outbox.push(item);
            }
            let Self { stream, outbox, .. } = self;
            match stream.try_io(Interest::WRITABLE, || outbox.gather().send(stream.as_fd())) {
                Ok(sent) => {
                    outbox.sent(sent);
                    tokio::task::consume_budget().await;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let writable = self.clock.timeout(self.progress_timeout, stream.writable());
                    let ready = tokio::select! {
                        biased;
                        () = stop.cancelled() => return Ok(()),
                        ready = writable => ready,
                    };
                    ready
                        .map_err(|_| PathError::Stalled {
                            waited: self.progress_timeout,
                        })?
                        .map_err(|error| lost(&error))?;
                }
                Err(error) => return Err(lost(&error)),
            }
            if stop.is_cancelled() {
                return Ok(());
            }
        }
    }
}

fn lost(error: &io::Error) -> PathError {
    PathError::Lost { kind: error.kind() }
}

/// Resolves when the receiver closes the connection, or says something, which it never does. Cancel safe.
async fn ended(stream: &TcpStream) -> PathError {
    loop {
        if let Err(error) = stream.readable().await {
            return lost(&error);
        }
        match stream.try_read(&mut [0]) {
            Ok(0) => {
                return PathError::Lost {
                    kind: ErrorKind::UnexpectedEof,
                };
            }
            Ok(_) => {
                return PathError::Lost {
                    kind: ErrorKind::InvalidData,
                };
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return lost(&error),
        }
    }
}

/// One item with the head of its frame.
struct Frame {
    head: Vec<u8>,
    item: LaneItem,
}

impl Frame {
    /// The head, then the payloads.
    fn parts(&self) -> usize {
        match &self.item {
            LaneItem::Batch(batch) => 1 + batch.extents.len(),
            LaneItem::Fence(_) => 1,
        }
    }

    fn part_bytes(&self, part: usize) -> usize {
        match (part, &self.item) {
            (0, _) | (_, LaneItem::Fence(_)) => self.head.len(),
            (part, LaneItem::Batch(batch)) => batch.extents[part - 1].len(),
        }
    }
}

/// Frames on their way into the socket.
pub(super) struct Outbox {
    crc: bool,
    frames: VecDeque<Frame>,
    /// Parts and bytes in `frames`.
    parts: usize,
    bytes: usize,
    /// The part of the first frame that is sent next, and how much of that is gone.
    part: usize,
    gone: usize,
}

impl Outbox {
    pub(super) fn new(crc: bool) -> Self {
        Self {
            crc,
            frames: VecDeque::new(),
            parts: 0,
            bytes: 0,
            part: 0,
            gone: 0,
        }
    }

    fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    fn has_room(&self) -> bool {
        self.bytes < GATHER_BYTES && self.parts < PARTS_MAX
    }

    /// Frames an item; checksums are taken here, once.
    fn push(&mut self, item: LaneItem) {
        let mut head = Vec::new();
        match &item {
            LaneItem::Fence(marker) => wire::encode_fence(marker.epoch, &mut head),
            LaneItem::Batch(batch) => {
                let extents = batch.extents.iter();
                let crc = self.crc;
                let announced = extents.map(|source| (source.header(), if crc { source.crc32c() } else { 0 }));
                wire::encode_extents(batch.epoch, announced, &mut head);
            }
        }
        let frame = Frame { head, item };
        self.parts += frame.parts();
        self.bytes += (0..frame.parts()).map(|part| frame.part_bytes(part)).sum::<usize>();
        self.frames.push_back(frame);
    }

    /// As much as one call can take of what is not sent yet.
    fn gather(&self) -> Gather<'_> {
        let mut gather = Gather::default();
        let (mut part, mut gone) = (self.part, self.gone);
        for frame in &self.frames {
            while part < frame.parts() && !gather.is_full() {
                match (part, &frame.item) {
                    (0, _) | (_, LaneItem::Fence(_)) => gather.push_bytes(&frame.head[gone..]),
                    (part, LaneItem::Batch(batch)) => gather.push_source(&batch.extents[part - 1], gone),
                }
                part += 1;
                gone = 0;
            }
            part = 0;
            gone = 0;
        }
        gather
    }

    /// So many more bytes are gone: lets go of what was sent whole.
    fn sent(&mut self, mut bytes: usize) {
        self.bytes -= bytes;
        while let Some(frame) = self.frames.front() {
            let left = frame.part_bytes(self.part) - self.gone;
            if bytes < left {
                self.gone += bytes;
                return;
            }
            bytes -= left;
            self.gone = 0;
            self.part += 1;
            if self.part < frame.parts() {
                continue;
            }
            self.part = 0;
            self.parts -= frame.parts();
            match self.frames.pop_front().map(|frame| frame.item) {
                Some(LaneItem::Batch(batch)) => {
                    metric::sent(PathKind::Tcp, batch.extents.len(), batch.bytes());
                    batch.carried();
                }
                Some(LaneItem::Fence(marker)) => marker.carried(),
                None => {}
            }
        }
    }
}
