//! The book of grants as the transports see it: every question goes to the receiving machine.

use super::receiving::Receiving;
use crate::PathKind;
use crate::session::{ClaimTicket, Connection, Event};
use crate::transport::{Claim, Claims, ExtentHeader, Landing, Place, Reject, WriterConnection};
use baton_types::{BlockId, Epoch};
use std::sync::Arc;

/// The book for one transport: a grant is for one kind of path.
pub(super) struct GrantBook {
    pub receiving: Arc<Receiving>,
    pub path: PathKind,
}

impl GrantBook {
    fn connection(&self, from: &WriterConnection) -> Connection {
        Connection {
            path: self.path,
            writer: from.instance,
            number: from.connection,
        }
    }
}

impl Landing for GrantBook {
    fn claim(&self, from: &WriterConnection, header: &ExtentHeader) -> Result<Box<dyn Claim>, Reject> {
        let layer_bytes = self.receiving.geometry().layer_bytes();
        let (offset, len) = (
            header.layers.start as usize * layer_bytes,
            header.layers.len() * layer_bytes,
        );
        if header.len as usize != len {
            return Err(Reject::OutsideGrant);
        }
        let connection = self.connection(from);
        let ticket = self
            .receiving
            .with(|machine, now| machine.claim(now, connection, header.epoch, header.ordinal, &header.layers))?;
        let block = ticket.block();
        Ok(Box::new(GrantClaim {
            receiving: Arc::clone(&self.receiving),
            ticket: Some(ticket),
            block,
            offset,
            len,
        }))
    }

    fn claim_all(&self, from: &WriterConnection, headers: &[ExtentHeader]) -> Box<dyn Claims> {
        let layer_bytes = self.receiving.geometry().layer_bytes();
        let connection = self.connection(from);
        let claimed = self.receiving.with(|machine, now| {
            let claim = |header: &ExtentHeader| {
                if header.len as usize != header.layers.len() * layer_bytes {
                    return Err(Reject::OutsideGrant);
                }
                let ticket = machine.claim(now, connection, header.epoch, header.ordinal, &header.layers)?;
                Ok(GrantedPart {
                    place: Place {
                        block: ticket.block(),
                        offset: header.layers.start as usize * layer_bytes,
                    },
                    len: header.len,
                    ticket: Some(ticket),
                })
            };
            headers.iter().map(claim).collect()
        });
        Box::new(GrantClaims {
            receiving: Arc::clone(&self.receiving),
            claimed,
        })
    }

    fn fenced(&self, from: &WriterConnection, epoch: Epoch) {
        self.receiving.event(Event::Marker {
            from: self.connection(from),
            epoch,
        });
    }

    fn corrupt(&self, from: &WriterConnection, header: &ExtentHeader) {
        self.receiving.event(Event::Corrupt {
            from: self.connection(from),
            epoch: header.epoch,
        });
    }

    fn closed(&self, from: &WriterConnection) {
        self.receiving.event(Event::ConnectionClosed {
            from: self.connection(from),
        });
    }
}

struct GrantClaim {
    receiving: Arc<Receiving>,
    /// Absent once it has landed.
    ticket: Option<ClaimTicket>,
    block: BlockId,
    offset: usize,
    len: usize,
}

impl Claim for GrantClaim {
    fn block(&self) -> BlockId {
        self.block
    }

    fn offset(&self) -> usize {
        self.offset
    }

    fn len(&self) -> usize {
        self.len
    }

    fn land(mut self: Box<Self>) -> Result<(), Reject> {
        let Some(ticket) = self.ticket.take() else {
            return Err(Reject::DeadEpoch);
        };
        self.receiving
            .with(|machine, now| machine.land(now, ticket, self.len as u64))
    }
}

impl Drop for GrantClaim {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.receiving.with(|machine, now| machine.release(now, &ticket));
        }
    }
}

/// Claims of one frame: one look into the machine for all of them.
struct GrantClaims {
    receiving: Arc<Receiving>,
    claimed: Vec<Result<GrantedPart, Reject>>,
}

struct GrantedPart {
    place: Place,
    len: u32,
    /// Absent once the claim has ended.
    ticket: Option<ClaimTicket>,
}

impl GrantClaims {
    /// Ends every claim that lives: `whole` ones land, the others are torn.
    fn end(&mut self, whole: &[bool]) -> Vec<Result<(), Reject>> {
        let living = |claimed: &Result<GrantedPart, Reject>| matches!(claimed, Ok(part) if part.ticket.is_some());
        if !self.claimed.iter().any(living) {
            return Vec::new();
        }
        let claimed = &mut self.claimed;
        self.receiving.with(|machine, now| {
            let mut landed = Vec::with_capacity(whole.len());
            for (index, part) in claimed.iter_mut().enumerate() {
                let Ok(GrantedPart { len, ticket, .. }) = part else {
                    continue;
                };
                let Some(ticket) = ticket.take() else { continue };
                match whole.get(index) {
                    Some(true) => landed.push(machine.land(now, ticket, u64::from(*len))),
                    Some(false) | None => machine.release(now, &ticket),
                }
            }
            landed
        })
    }
}

impl Claims for GrantClaims {
    fn place(&self, index: usize) -> Result<Place, Reject> {
        match self.claimed.get(index) {
            Some(Ok(part)) => Ok(part.place),
            Some(Err(reject)) => Err(*reject),
            None => Err(Reject::OutsideGrant),
        }
    }

    fn land(mut self: Box<Self>, whole: &[bool]) -> Vec<Result<(), Reject>> {
        self.end(whole)
    }
}

impl Drop for GrantClaims {
    fn drop(&mut self) {
        self.end(&[]);
    }
}
