//! The target's book of grants: one epoch at a time, each part of it taken once.

use baton_kv_transfer::transport::{Claim, ExtentHeader, Landing, Reject, WriterConnection};
use baton_types::{BlockId, Epoch, Instance, KvGeometry};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// What became of one layer of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Wanted,
    Arriving,
    Arrived,
}

struct Grant {
    epoch: Epoch,
    writer: Instance,
    blocks: Vec<BlockId>,
    parts: Vec<Part>,
    arrived: usize,
}

impl Grant {
    /// The parts of some layers of one block.
    fn parts(&mut self, geometry: &KvGeometry, header: &ExtentHeader) -> Option<&mut [Part]> {
        let first = header.ordinal as usize * geometry.layers as usize;
        self.parts
            .get_mut(first + header.layers.start as usize..first + header.layers.end as usize)
    }
}

/// The book.
pub struct Book {
    geometry: KvGeometry,
    grant: Mutex<Option<Grant>>,
    this: Weak<Self>,
}

impl Book {
    pub fn new(geometry: KvGeometry) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            geometry,
            grant: Mutex::new(None),
            this: this.clone(),
        })
    }

    fn grant_now(&self) -> MutexGuard<'_, Option<Grant>> {
        // No code that can panic runs under this lock, so what it guards is whole.
        self.grant.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next grant; the one before it is over.
    pub fn grant(&self, epoch: Epoch, writer: Instance, blocks: Vec<BlockId>) {
        let parts = vec![Part::Wanted; blocks.len() * self.geometry.layers as usize];
        *self.grant_now() = Some(Grant {
            epoch,
            writer,
            blocks,
            parts,
            arrived: 0,
        });
    }

    /// Everything of the present grant arrived.
    pub fn is_complete(&self) -> bool {
        self.grant_now()
            .as_ref()
            .is_some_and(|grant| grant.arrived == grant.parts.len())
    }
}

impl Landing for Book {
    fn claim(&self, from: &WriterConnection, header: &ExtentHeader) -> Result<Box<dyn Claim>, Reject> {
        let mut grant = self.grant_now();
        let grant = grant.as_mut().filter(|grant| grant.epoch == header.epoch);
        let grant = grant.ok_or(Reject::DeadEpoch)?;
        if grant.writer != from.instance {
            return Err(Reject::WrongWriter);
        }
        let block = *grant.blocks.get(header.ordinal as usize).ok_or(Reject::OutsideGrant)?;
        let parts = grant.parts(&self.geometry, header).ok_or(Reject::OutsideGrant)?;
        if parts.iter().any(|part| *part != Part::Wanted) {
            return Err(Reject::Duplicate);
        }
        parts.fill(Part::Arriving);
        let book = self.this.upgrade().ok_or(Reject::DeadEpoch)?;
        Ok(Box::new(BookClaim {
            book,
            header: header.clone(),
            block,
        }))
    }

    fn fenced(&self, _from: &WriterConnection, _epoch: Epoch) {}

    fn corrupt(&self, from: &WriterConnection, header: &ExtentHeader) {
        eprintln!("ordinal {} of {} arrived corrupt", header.ordinal, from.instance);
    }

    fn closed(&self, _from: &WriterConnection) {}
}

struct BookClaim {
    book: Arc<Book>,
    header: ExtentHeader,
    block: BlockId,
}

impl Claim for BookClaim {
    fn block(&self) -> BlockId {
        self.block
    }

    fn offset(&self) -> usize {
        self.header.layers.start as usize * self.book.geometry.layer_bytes()
    }

    fn len(&self) -> usize {
        self.header.len as usize
    }

    fn land(self: Box<Self>) -> Result<(), Reject> {
        let mut grant = self.book.grant_now();
        let grant = grant.as_mut().filter(|grant| grant.epoch == self.header.epoch);
        let grant = grant.ok_or(Reject::DeadEpoch)?;
        let parts = grant.parts(&self.book.geometry, &self.header);
        let parts = parts.ok_or(Reject::OutsideGrant)?;
        parts.fill(Part::Arrived);
        grant.arrived += self.header.layers.len();
        Ok(())
    }
}
