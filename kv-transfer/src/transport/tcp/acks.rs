//! Acknowledgements: how the receiver says that frames were applied, and how the writer learns it.

use super::wire::{self, ACK_BYTES};
use crate::transport::PathError;
use crate::transport::lanes::Ticket;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;

/// The receiver's end: what was applied, and what of the news is on its way.
pub(super) struct Acknowledger {
    applied: u64,
    said: u64,
    bytes: [u8; ACK_BYTES],
    gone: usize,
}

impl Acknowledger {
    pub(super) fn new() -> Self {
        Self {
            applied: 0,
            said: 0,
            bytes: [0; ACK_BYTES],
            gone: ACK_BYTES,
        }
    }

    /// One more frame was applied.
    pub(super) fn applied(&mut self) {
        self.applied += 1;
    }

    /// Not all of the news is out: the socket did not take it.
    pub(super) fn is_waiting(&self) -> bool {
        self.gone < ACK_BYTES || self.said < self.applied
    }

    /// Says what is to be said, as far as the socket takes it now. A writer that does not listen holds up nothing: the next
    /// acknowledgement covers those before it.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn say(&mut self, mut stream: &TcpStream) -> io::Result<()> {
        while self.is_waiting() {
            if self.gone == ACK_BYTES {
                (self.bytes, self.said, self.gone) = (wire::encode_ack(self.applied), self.applied, 0);
            }
            match stream.write(&self.bytes[self.gone..]) {
                Ok(sent) => self.gone += sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The writer's end: which frames were sent, and whose writes wait for them.
#[derive(Default)]
pub(super) struct Awaited {
    sent: u64,
    applied: u64,
    /// By number of the frame, rising.
    waiting: VecDeque<(u64, Ticket)>,
    bytes: [u8; ACK_BYTES],
    have: usize,
}

impl Awaited {
    /// A frame was handed to the wire.
    pub(super) fn sent(&mut self, ticket: Ticket) {
        self.sent += 1;
        self.waiting.push_back((self.sent, ticket));
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.applied < self.sent
    }

    /// Takes what the receiver said; false where it said nothing.
    ///
    /// # Errors
    /// The connection is over, or what came cannot be true.
    pub(super) fn hear(&mut self, mut stream: &TcpStream) -> Result<bool, PathError> {
        let lost = |kind| PathError::Lost { kind };
        match stream.read(&mut self.bytes[self.have..]) {
            Ok(0) => return Err(lost(ErrorKind::UnexpectedEof)),
            Ok(got) => self.have += got,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(false),
            Err(error) => return Err(lost(error.kind())),
        }
        if self.have < ACK_BYTES {
            return Ok(true);
        }
        self.have = 0;
        let applied = wire::decode_ack(&self.bytes).map_err(|_| lost(ErrorKind::InvalidData))?;
        if applied <= self.applied || applied > self.sent {
            return Err(lost(ErrorKind::InvalidData));
        }
        self.applied = applied;
        while self.waiting.front().is_some_and(|(number, _)| *number <= applied) {
            if let Some((_, ticket)) = self.waiting.pop_front() {
                ticket.applied();
            }
        }
        Ok(true)
    }
}
