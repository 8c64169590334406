//! Nodes for tests of whole hand-overs: an endpoint, an arena, and a small block pool that checks its own books.

#![allow(unsafe_code, dead_code, clippy::unwrap_used)]

pub mod proxy;

use baton_kv_transfer::{
    Arena, DestinationBlocks, Endpoint, EndpointOptions, ExpectSpec, Fallback, HandoverReport, Identity, Incoming,
    IncomingEvent, NoRoom, Outgoing, OutgoingSpec, PathKind, QuarantinedBlocks, ReservedBlocks, TransferError,
};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::{
    ArenaView, Attempt, BlockHash, BlockId, Instance, KvDtype, KvGeometry, ModelFingerprint, NodeId, NumericsId, Ticket,
};
use bytes::Bytes;
use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub const SECOND: Duration = Duration::from_secs(1);
pub const PATIENCE: Duration = Duration::from_secs(20);

pub const GEOMETRY: KvGeometry = KvGeometry {
    layers: 4,
    kv_heads: 2,
    head_dim: 16,
    block_tokens: 4,
    dtype: KvDtype::F16,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Free,
    Cached,
    Referenced,
    Reserved,
    Quarantined,
}

#[derive(Debug)]
struct Books {
    places: Vec<Place>,
    cache: HashMap<BlockHash, BlockId>,
    /// References to cached blocks.
    pins: BTreeMap<BlockId, usize>,
    /// Blocks that were ever quarantined.
    sick: BTreeSet<BlockId>,
}

/// A block pool of a few lines. Every block is in exactly one place; a wrong move panics.
#[derive(Debug)]
pub struct TestPool(Mutex<Books>);

impl TestPool {
    pub fn new(blocks: usize) -> Arc<Self> {
        let books = Books {
            places: vec![Place::Free; blocks],
            cache: HashMap::new(),
            pins: BTreeMap::new(),
            sick: BTreeSet::new(),
        };
        Arc::new(Self(Mutex::new(books)))
    }

    fn count(&self, place: Place) -> usize {
        self.0.lock().unwrap().places.iter().filter(|p| **p == place).count()
    }

    pub fn free(&self) -> usize {
        self.count(Place::Free)
    }

    pub fn reserved(&self) -> usize {
        self.count(Place::Reserved)
    }

    pub fn quarantined(&self) -> usize {
        self.count(Place::Quarantined)
    }

    pub fn was_quarantined(&self) -> usize {
        self.0.lock().unwrap().sick.len()
    }

    /// Makes a free block the cached one of this identity.
    pub fn cache(&self, hash: BlockHash) -> BlockId {
        let block = self.take(Place::Cached);
        self.0.lock().unwrap().cache.insert(hash, block);
        block
    }

    /// Takes blocks as a sequence of this node would.
    pub fn acquire(self: &Arc<Self>, count: usize) -> TestTable {
        let blocks = (0..count).map(|_| self.take(Place::Referenced)).collect();
        TestTable {
            pool: Arc::clone(self),
            held: Vec::new(),
            fresh: blocks,
        }
    }

    fn take(&self, place: Place) -> BlockId {
        let mut books = self.0.lock().unwrap();
        let block = books
            .places
            .iter()
            .position(|p| *p == Place::Free)
            .expect("a free block");
        books.places[block] = place;
        BlockId(block as u32)
    }

    fn shift(&self, blocks: &[BlockId], from: Place, to: Place) {
        let mut books = self.0.lock().unwrap();
        for block in blocks {
            assert_eq!(books.places[block.index()], from, "{block:?} on its way to {to:?}");
            books.places[block.index()] = to;
            if to == Place::Quarantined {
                books.sick.insert(*block);
            }
        }
    }

    fn unpin(&self, blocks: &[BlockId]) {
        let mut books = self.0.lock().unwrap();
        for block in blocks {
            let pins = books.pins.get_mut(block).expect("a pinned block");
            *pins -= 1;
            if *pins == 0 {
                books.pins.remove(block);
            }
        }
    }
}

/// What a committed hand-over gives.
#[derive(Debug)]
pub struct TestTable {
    pool: Arc<TestPool>,
    held: Vec<BlockId>,
    fresh: Vec<BlockId>,
}

impl TestTable {
    pub fn blocks(&self) -> Vec<BlockId> {
        self.held.iter().chain(&self.fresh).copied().collect()
    }
}

impl Drop for TestTable {
    fn drop(&mut self) {
        self.pool.unpin(&self.held);
        self.pool.shift(&self.fresh, Place::Referenced, Place::Free);
    }
}

/// The pool as hand-overs see it.
pub struct TestBlocks(pub Arc<TestPool>);

impl DestinationBlocks for TestBlocks {
    fn reserve(&self, hashes: &[BlockHash], total: usize) -> Result<Box<dyn ReservedBlocks>, NoRoom> {
        let mut books = self.0.0.lock().unwrap();
        let held: Vec<BlockId> = hashes.iter().map_while(|hash| books.cache.get(hash).copied()).collect();
        let free: Vec<BlockId> = (0u32..)
            .zip(&books.places)
            .filter(|(_, place)| **place == Place::Free)
            .map(|(block, _)| BlockId(block))
            .take(total - held.len())
            .collect();
        if held.len() + free.len() < total {
            return Err(NoRoom {
                wanted: total,
                room: held.len() + free.len(),
            });
        }
        for block in &held {
            *books.pins.entry(*block).or_default() += 1;
        }
        for block in &free {
            books.places[block.index()] = Place::Reserved;
        }
        Ok(Box::new(TestReserved(TestTable {
            pool: Arc::clone(&self.0),
            held,
            fresh: free,
        })))
    }
}

struct TestReserved(TestTable);

impl TestReserved {
    fn dissolve(mut self) -> (Arc<TestPool>, Vec<BlockId>) {
        let fresh = std::mem::take(&mut self.0.fresh);
        (Arc::clone(&self.0.pool), fresh)
    }
}

impl ReservedBlocks for TestReserved {
    fn held(&self) -> &[BlockId] {
        &self.0.held
    }

    fn fresh(&self) -> &[BlockId] {
        &self.0.fresh
    }

    fn commit(self: Box<Self>) -> Box<dyn Any + Send> {
        self.0.pool.shift(&self.0.fresh, Place::Reserved, Place::Referenced);
        Box::new(self.0)
    }

    fn quarantine(self: Box<Self>) -> Box<dyn QuarantinedBlocks> {
        let (pool, blocks) = self.dissolve();
        pool.shift(&blocks, Place::Reserved, Place::Quarantined);
        Box::new(TestQuarantined { pool, blocks })
    }

    fn release(self: Box<Self>) {
        let (pool, blocks) = self.dissolve();
        pool.shift(&blocks, Place::Reserved, Place::Free);
    }
}

struct TestQuarantined {
    pool: Arc<TestPool>,
    blocks: Vec<BlockId>,
}

impl QuarantinedBlocks for TestQuarantined {
    fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    fn release(self: Box<Self>) {
        self.pool.shift(&self.blocks, Place::Quarantined, Place::Free);
    }
}

pub fn identity(geometry: KvGeometry) -> Identity {
    let instance = Instance::random();
    Identity {
        node: NodeId::new(format!("node-{instance}")),
        instance,
        fingerprint: ModelFingerprint([7; 32]),
        geometry,
        numerics: NumericsId("test".into()),
        build: "test".into(),
    }
}

/// Quick to give up, so that tests of giving up are quick.
pub fn options(path: PathKind) -> EndpointOptions {
    EndpointOptions {
        transports: vec![path],
        digest: true,
        reservation_lease: Duration::from_millis(400),
        fence_timeout: Duration::from_millis(300),
        progress_timeout: 5 * SECOND,
        connect_timeout: 2 * SECOND,
        keep_alive: SECOND,
        ..EndpointOptions::default()
    }
}

/// One process's worth of hand-over.
pub struct Node {
    pub endpoint: Endpoint,
    pub pool: Arc<TestPool>,
    pub view: ArenaView,
    pub supervisor: Supervisor,
    pub blocks: usize,
}

impl Node {
    pub async fn start(path: PathKind, blocks: usize) -> Self {
        Self::with(options(path), identity(GEOMETRY), blocks).await
    }

    pub async fn with(options: EndpointOptions, identity: Identity, blocks: usize) -> Self {
        let arena = Arena::allocate(identity.geometry, blocks as u32, &mut |_, _| ()).unwrap();
        let (view, pool, supervisor) = (arena.view(), TestPool::new(blocks), Supervisor::new());
        let destination = Arc::new(TestBlocks(Arc::clone(&pool)));
        let started = Endpoint::start(
            options,
            identity,
            view.clone(),
            destination,
            Clock::new(),
            supervisor.clone(),
        )
        .await;
        Self {
            endpoint: started.unwrap(),
            pool,
            view,
            supervisor,
            blocks,
        }
    }

    pub fn expect(&self, ticket: Ticket, tokens: usize) -> Incoming {
        self.expect_with(ticket, tokens, Vec::new(), PATIENCE)
    }

    pub fn expect_with(&self, ticket: Ticket, tokens: usize, hashes: Vec<BlockHash>, deadline: Duration) -> Incoming {
        let blocks = self.view.geometry().blocks_for(tokens) + 1;
        let spec = ExpectSpec {
            ticket,
            attempt: Attempt::FIRST,
            hashes,
            blocks,
            context_tokens: tokens,
            deadline,
        };
        self.endpoint.expect(spec).unwrap()
    }

    pub fn open(&self, to: &Node, ticket: Ticket, tokens: usize) -> Outgoing {
        self.open_attempt(to, ticket, Attempt::FIRST, tokens)
    }

    pub fn open_attempt(&self, to: &Node, ticket: Ticket, attempt: Attempt, tokens: usize) -> Outgoing {
        let peer = to.endpoint.peer();
        self.endpoint.open(OutgoingSpec {
            peer,
            ticket,
            attempt,
            context_tokens: tokens,
            deadline: PATIENCE,
        })
    }

    /// Fills a source block with what only this seed gives.
    pub fn fill(&self, block: BlockId, seed: u64) {
        let bytes = pattern(seed, self.view.geometry().block_bytes());
        // SAFETY: the block was acquired from the pool by this test, so nobody else uses it.
        unsafe { self.view.write(block, 0, &bytes).unwrap() };
    }

    pub fn holds(&self, block: BlockId, seed: u64) -> bool {
        let mut bytes = vec![0; self.view.geometry().block_bytes()];
        // SAFETY: the block belongs to a committed table or was acquired by this test.
        unsafe { self.view.read(block, 0, &mut bytes).unwrap() };
        bytes == pattern(seed, bytes.len())
    }

    /// Everything is given back.
    pub async fn is_clean(&self) {
        let clean = || self.pool.free() + self.pool.count(Place::Cached) == self.blocks;
        until(&format!("all blocks are free again: {:?}", self.pool), clean).await;
        let idle = || {
            let stats = self.endpoint.stats();
            (
                stats.handovers_in,
                stats.handovers_out,
                stats.queued_asks,
                stats.reserved_blocks,
                stats.quarantined_blocks,
            ) == (0, 0, 0, 0, 0)
        };
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !idle() {
            assert!(
                tokio::time::Instant::now() < deadline,
                "never idle: {:?}",
                self.endpoint.stats()
            );
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Ends the node, and finds nothing left of it.
    pub async fn end(self) {
        self.is_clean().await;
        self.endpoint.shutdown().await;
        assert_eq!(self.supervisor.join(PATIENCE).await, Ok(()));
        assert_eq!(self.supervisor.fatal(), None);
    }
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len.div_ceil(8))
        .flat_map(|_| next().to_le_bytes())
        .take(len)
        .collect()
}

/// Waits for a condition, with a deadline.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "waited too long until {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Source blocks of one context, each filled with its own seed.
pub struct Source {
    pub blocks: Vec<BlockId>,
    pub claim: Arc<TestTable>,
    pub seed: u64,
}

pub fn source(node: &Node, tokens: usize, seed: u64) -> Source {
    let table = node.pool.acquire(node.view.geometry().blocks_for(tokens));
    let blocks = table.blocks();
    for (ordinal, block) in (0u64..).zip(&blocks) {
        node.fill(*block, seed + ordinal);
    }
    Source {
        blocks,
        claim: Arc::new(table),
        seed,
    }
}

impl Source {
    pub fn push(&self, outgoing: &Outgoing, ordinal: u32) -> Result<(), TransferError> {
        let claim = Arc::clone(&self.claim) as Arc<dyn Any + Send + Sync>;
        outgoing.push(ordinal, 0..GEOMETRY.layers, self.blocks[ordinal as usize], claim)
    }

    pub fn push_all(&self, outgoing: &Outgoing) -> Result<(), TransferError> {
        (0..self.blocks.len() as u32).try_for_each(|ordinal| self.push(outgoing, ordinal))
    }
}

/// What a hand-over gave at the receiver.
pub struct Received {
    pub table: Box<TestTable>,
    pub held: usize,
    pub payload: Bytes,
    pub bytes: u64,
    pub attempt: Attempt,
    pub fallbacks: Vec<Fallback>,
}

impl Received {
    /// The context's blocks hold what the source held.
    pub fn check(&self, node: &Node, tokens: usize, seed: u64) {
        let blocks = self.table.blocks();
        for (ordinal, block) in (0u64..).zip(&blocks[..node.view.geometry().blocks_for(tokens)]) {
            assert!(
                node.holds(*block, seed + ordinal),
                "block {ordinal} holds something else"
            );
        }
    }
}

/// Events until the commit. Panics on a failed attempt.
pub async fn committed(incoming: &mut Incoming) -> Received {
    match ended(incoming).await {
        Ok(received) => received,
        Err((attempt, error)) => panic!("{attempt:?} failed: {error}"),
    }
}

/// Events until the commit or the end of an attempt.
pub async fn ended(incoming: &mut Incoming) -> Result<Received, (Attempt, TransferError)> {
    loop {
        let event = tokio::time::timeout(PATIENCE, incoming.next())
            .await
            .expect("an event in time");
        match event {
            IncomingEvent::Granted { .. } | IncomingEvent::FirstBlock => {}
            IncomingEvent::AttemptFailed { attempt, error } => return Err((attempt, error)),
            IncomingEvent::Committed {
                attempt,
                blocks,
                held_blocks,
                payload,
                bytes,
                fallbacks,
                ..
            } => {
                let table = blocks.downcast::<TestTable>().expect("what the pool gave");
                return Ok(Received {
                    table,
                    held: held_blocks,
                    payload,
                    bytes,
                    attempt,
                    fallbacks,
                });
            }
        }
    }
}

pub async fn failure(incoming: &mut Incoming) -> TransferError {
    match ended(incoming).await {
        Ok(_) => panic!("it was committed"),
        Err((_, error)) => error,
    }
}

/// The sender's part of a normal hand-over.
pub async fn send(mut outgoing: Outgoing, source: &Source) -> Result<HandoverReport, TransferError> {
    let granted = outgoing.reserve().await?;
    for ordinal in granted.wanted {
        source.push(&outgoing, ordinal)?;
    }
    outgoing.complete(Bytes::from_static(b"token")).await
}
