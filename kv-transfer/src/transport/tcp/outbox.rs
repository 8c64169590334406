//! Frames on their way into the socket: what is sent next, its checksums taken just before, and what is gone.

use super::wire;
use crate::PathKind;
use crate::transport::lanes::{LaneItem, Ticket};
use crate::transport::metric;
use crate::transport::raw::{CRC32C, Gather, PARTS_MAX, Source};
use crc_fast::Digest;
use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

/// Bytes handed to one call: what is read for a checksum is still in the cache when the system copies it, and a call that
/// the socket's buffer cuts short has not looked at many parts in vain.
const GATHER_BYTES: usize = 256 << 10;

/// One item with the head of its frame, and the trailer as far as it is known.
struct Frame {
    head: Vec<u8>,
    item: LaneItem,
    trailer: Vec<u8>,
    crc: bool,
}

impl Frame {
    fn new(item: LaneItem, crc: bool) -> Self {
        let mut head = Vec::new();
        match &item {
            LaneItem::Fence(marker) => wire::encode_fence(marker.epoch, &mut head),
            LaneItem::Batch(batch) => {
                let headers = batch.extents.iter().map(|source| source.header());
                wire::encode_extents(batch.epoch, headers, &mut head);
            }
        }
        let crc = crc && matches!(item, LaneItem::Batch(_));
        Self {
            head,
            item,
            trailer: Vec::new(),
            crc,
        }
    }

    fn extents(&self) -> usize {
        match &self.item {
            LaneItem::Batch(batch) => batch.extents.len(),
            LaneItem::Fence(_) => 0,
        }
    }

    /// The payload that is that part.
    fn source(&self, part: usize) -> Option<&Source> {
        match &self.item {
            LaneItem::Batch(batch) => batch.extents.get(part.checked_sub(1)?),
            LaneItem::Fence(_) => None,
        }
    }

    /// The head, the payloads, the trailer.
    fn parts(&self) -> usize {
        1 + self.extents() + usize::from(self.crc)
    }

    fn part_bytes(&self, part: usize) -> usize {
        match (part, &self.item) {
            (0, _) => self.head.len(),
            (part, LaneItem::Batch(batch)) => match batch.extents.get(part - 1) {
                Some(source) => source.len(),
                None => batch.extents.len() * wire::CRC_BYTES,
            },
            (_, LaneItem::Fence(_)) => 0,
        }
    }
}

/// A piece of a frame's part that goes into the next call.
#[derive(Debug, Clone, Copy)]
struct Piece {
    part: usize,
    from: usize,
    len: usize,
}

/// The frames of one connection that are not sent yet.
pub(super) struct Outbox {
    crc: bool,
    frames: VecDeque<Frame>,
    /// Which part of the first frame is sent next, and how much of that is gone.
    part: usize,
    gone: usize,
    /// Up to where its payloads were fed to the digest: that may be ahead of what is sent.
    digested: (usize, usize),
    digest: Digest,
    /// What the next call takes.
    pieces: Vec<Piece>,
}

impl Outbox {
    pub(super) fn new(crc: bool) -> Self {
        Self {
            crc,
            frames: VecDeque::new(),
            part: 0,
            gone: 0,
            digested: (0, 0),
            digest: Digest::new(CRC32C),
            pieces: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(super) fn push(&mut self, item: LaneItem) {
        self.frames.push_back(Frame::new(item, self.crc));
    }

    /// What is not sent whole.
    pub(super) fn take_items(&mut self) -> impl Iterator<Item = LaneItem> {
        self.frames.drain(..).map(|frame| frame.item)
    }

    /// Sends what the socket takes now of the first frame; returns how much that was.
    ///
    /// # Errors
    /// What the system says, `WouldBlock` where the socket takes nothing now.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.choose();
        let Some(frame) = self.frames.front() else { return Ok(0) };
        let mut gather = Gather::with_room_for(self.pieces.len());
        for Piece { part, from, len } in &self.pieces {
            match (part, &frame.item) {
                (0, _) | (_, LaneItem::Fence(_)) => gather.push_bytes(&frame.head[*from..from + len]),
                (part, LaneItem::Batch(batch)) => match batch.extents.get(part - 1) {
                    Some(source) => gather.push_source(source, *from, *len),
                    None => gather.push_bytes(&frame.trailer[*from..from + len]),
                },
            }
        }
        gather.send(socket)
    }

    /// Chooses what one call takes, and feeds what is new of it to the digest.
    fn choose(&mut self) {
        self.pieces.clear();
        let Some(frame) = self.frames.front_mut() else { return };
        let (mut part, mut from, mut room) = (self.part, self.gone, GATHER_BYTES);
        while room > 0 && part < frame.parts() && self.pieces.len() < PARTS_MAX {
            let left = frame.part_bytes(part) - from;
            let len = room.min(left);
            self.pieces.push(Piece { part, from, len });
            let to = (part, from + len);
            if frame.crc
                && self.digested < to
                && let Some(source) = frame.source(part)
            {
                let start = if self.digested.0 == part { self.digested.1 } else { 0 };
                source.digest(&mut self.digest, start, to.1 - start);
                self.digested = to;
                if len == left {
                    let crc = self.digest.finalize_reset() as u32;
                    frame.trailer.extend_from_slice(&crc.to_le_bytes());
                }
            }
            room -= len;
            part += 1;
            from = 0;
        }
    }

    /// So many more bytes are gone. Gives the first frame's item where that is sent whole: to be asked again with zero.
    pub(super) fn sent(&mut self, bytes: &mut usize) -> Option<Sent> {
        let frame = self.frames.front()?;
        while self.part < frame.parts() {
            let left = frame.part_bytes(self.part) - self.gone;
            if *bytes < left {
                self.gone += *bytes;
                *bytes = 0;
                return None;
            }
            *bytes -= left;
            self.part += 1;
            self.gone = 0;
        }
        (self.part, self.digested) = (0, (0, 0));
        match self.frames.pop_front()?.item {
            LaneItem::Batch(batch) => {
                metric::sent(PathKind::Tcp, batch.extents.len(), batch.bytes());
                Some(Sent::Extents(batch.taken()))
            }
            LaneItem::Fence(marker) => {
                marker.carried();
                Some(Sent::Fence)
            }
        }
    }
}

/// A frame that was handed to the wire.
pub(super) enum Sent {
    /// To be acknowledged.
    Extents(Ticket),
    Fence,
}
