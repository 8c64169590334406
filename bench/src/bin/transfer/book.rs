//! The target's book of grants: one epoch at a time, each part of it taken once.

use baton_kv_transfer::transport::{Claim, Claims, ExtentHeader, Landing, Place, Reject, WriterConnection};
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

    fn claim(
        &mut self,
        geometry: &KvGeometry,
        from: &WriterConnection,
        header: &ExtentHeader,
    ) -> Result<Place, Reject> {
        if self.epoch != header.epoch {
            return Err(Reject::DeadEpoch);
        }
        if self.writer != from.instance {
            return Err(Reject::WrongWriter);
        }
        let block = *self.blocks.get(header.ordinal as usize).ok_or(Reject::OutsideGrant)?;
        let parts = self.parts(geometry, header).ok_or(Reject::OutsideGrant)?;
        if parts.iter().any(|part| *part != Part::Wanted) {
            return Err(Reject::Duplicate);
        }
        parts.fill(Part::Arriving);
        let offset = header.layers.start as usize * geometry.layer_bytes();
        Ok(Place { block, offset })
    }

    fn land(&mut self, geometry: &KvGeometry, header: &ExtentHeader) -> Result<(), Reject> {
        if self.epoch != header.epoch {
            return Err(Reject::DeadEpoch);
        }
        self.parts(geometry, header)
            .ok_or(Reject::OutsideGrant)?
            .fill(Part::Arrived);
        self.arrived += header.layers.len();
        Ok(())
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
        let grant = grant.as_mut().ok_or(Reject::DeadEpoch)?;
        let place = grant.claim(&self.geometry, from, header)?;
        let book = self.this.upgrade().ok_or(Reject::DeadEpoch)?;
        let header = header.clone();
        Ok(Box::new(BookClaim { book, header, place }))
    }

    fn claim_all(&self, from: &WriterConnection, headers: &[ExtentHeader]) -> Box<dyn Claims> {
        let mut grant = self.grant_now();
        let claim = |header| match grant.as_mut() {
            Some(grant) => grant.claim(&self.geometry, from, header),
            None => Err(Reject::DeadEpoch),
        };
        Box::new(BookClaims {
            book: self.this.clone(),
            places: headers.iter().map(claim).collect(),
            headers: headers.to_vec(),
        })
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
    place: Place,
}

impl Claim for BookClaim {
    fn block(&self) -> BlockId {
        self.place.block
    }

    fn offset(&self) -> usize {
        self.place.offset
    }

    fn len(&self) -> usize {
        self.header.len as usize
    }

    fn land(self: Box<Self>) -> Result<(), Reject> {
        let mut grant = self.book.grant_now();
        let grant = grant.as_mut().ok_or(Reject::DeadEpoch)?;
        grant.land(&self.book.geometry, &self.header)
    }
}

/// The claims of one frame.
struct BookClaims {
    book: Weak<Book>,
    headers: Vec<ExtentHeader>,
    places: Vec<Result<Place, Reject>>,
}

impl Claims for BookClaims {
    fn place(&self, index: usize) -> Result<Place, Reject> {
        self.places.get(index).copied().unwrap_or(Err(Reject::OutsideGrant))
    }

    fn land(self: Box<Self>, whole: &[bool]) -> Vec<Result<(), Reject>> {
        let Some(book) = self.book.upgrade() else {
            return Vec::new();
        };
        let mut grant = book.grant_now();
        let claimed = self.headers.iter().zip(&self.places).zip(whole);
        let landing = claimed.filter(|((_, place), whole)| place.is_ok() && **whole);
        landing
            .map(|((header, _), _)| match grant.as_mut() {
                Some(grant) => grant.land(&book.geometry, header),
                None => Err(Reject::DeadEpoch),
            })
            .collect()
    }
}
