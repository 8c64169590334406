//! What `kv-transfer/fuzz` feeds: the decoders of this format, and a living receiver behind a valid handshake.
//!
//! Inputs are small programs, so that a fuzzer reaches what lies behind the checksums: pieces of junk, right frames, frames
//! with any descriptors under a right head, corrupt payloads, frames that are cut.

use super::wire::{self, HELLO_BYTES, Hello, PREFIX_BYTES, Verdict};
use super::{TcpOptions, TcpTransport};
use crate::transport::raw::{CRC32C, peek, poke};
use crate::transport::{Claim, ExtentHeader, Landing, Local, Reject, Transport, WriterConnection};
use crate::{Arena, Identity};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::{ArenaView, BlockId, Epoch, Instance, KvDtype, KvGeometry, ModelFingerprint, NodeId, NumericsId};
use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

const GEOMETRY: KvGeometry = KvGeometry {
    layers: 2,
    kv_heads: 1,
    head_dim: 4,
    block_tokens: 16,
    dtype: KvDtype::F16,
};
const LAYER: usize = 256;
const BLOCKS: u32 = 16;
const WRITER: Instance = Instance(0xbad);
const PATIENCE: Duration = Duration::from_secs(20);
/// What stands in every block before an input.
const UNTOUCHED: u8 = 0xee;
/// Of this writer, and lives on.
const LIVE: Epoch = Epoch(1);
/// Of this writer; dies at its third claim, while that one lives.
const DYING: Epoch = Epoch(2);
/// Of another writer.
const FOREIGN: Epoch = Epoch(3);

/// Hello and frame heads: whatever decodes is what encoding it gives.
pub(crate) fn decoders(choice: u8, bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    if let Some(hello) = bytes.first_chunk_mut::<HELLO_BYTES>() {
        if choice & 1 == 1 {
            let (body, sum) = hello.split_at_mut(HELLO_BYTES - 4);
            sum.copy_from_slice(&crc32c(body).to_le_bytes());
        }
        if let Ok(said) = Hello::decode(hello) {
            assert_eq!(Hello::decode(&said.encode()), Ok(said));
        }
    }
    let Some(prefix) = bytes.first_chunk::<PREFIX_BYTES>() else {
        return;
    };
    let Ok(frame) = wire::decode_prefix(prefix) else { return };
    let len = match frame {
        wire::Frame::Extents { count, .. } => PREFIX_BYTES + (count - 1) * wire::DESCRIPTOR_BYTES,
        wire::Frame::Fence { .. } => PREFIX_BYTES,
    };
    let Some(head) = bytes.get_mut(..len) else { return };
    if choice & 2 == 2 {
        reseal(head);
    }
    let Ok(announced) = wire::decode_head(head, frame, &GEOMETRY) else {
        return;
    };
    let mut again = Vec::new();
    match frame {
        wire::Frame::Fence { epoch } => wire::encode_fence(epoch, &mut again),
        wire::Frame::Extents { epoch, .. } => {
            wire::encode_extents(epoch, announced.iter(), &mut again);
        }
    }
    // What a fence carries in place of a descriptor means nothing.
    if matches!(frame, wire::Frame::Extents { .. }) {
        assert_eq!(again, head, "a head that encodes to another");
    }
}

/// Inputs that reach each part of [`decoders`].
pub(crate) fn decoder_seeds() -> Vec<Vec<u8>> {
    let hello = Hello::new(&identity(WRITER), Instance(1), true, Verdict::Asking).encode();
    let mut fence = Vec::new();
    wire::encode_fence(LIVE, &mut fence);
    let head = |extents: &[(u32, Range<u32>)]| frame(LIVE, extents, 7).0;
    vec![
        hello.to_vec(),
        fence,
        head(&[(0, 0..2)]),
        head(&[(3, 1..2), (4, 0..1), (5, 0..2)]),
    ]
}

fn crc32c(bytes: &[u8]) -> u32 {
    // The algorithm's values have 32 bits.
    crc_fast::checksum(CRC32C, bytes) as u32
}

/// Makes the checksum of a head right.
fn reseal(head: &mut [u8]) {
    head[4..8].fill(0);
    let sum = crc32c(head).to_le_bytes();
    head[4..8].copy_from_slice(&sum);
}

fn identity(instance: Instance) -> Identity {
    Identity {
        node: NodeId::new("fuzzed"),
        instance,
        fingerprint: ModelFingerprint([3; 32]),
        geometry: GEOMETRY,
        numerics: NumericsId("fuzz".into()),
        build: "fuzz".into(),
    }
}

/// Head, and payloads with trailer, of a frame of whole extents with right checksums.
fn frame(epoch: Epoch, extents: &[(u32, Range<u32>)], fill: u8) -> (Vec<u8>, Vec<u8>) {
    let mut payload = Vec::new();
    let (mut announced, mut sums) = (Vec::new(), Vec::new());
    for (ordinal, layers) in extents {
        let bytes = vec![fill; layers.len() * LAYER];
        let len = bytes.len() as u32;
        let header = ExtentHeader {
            epoch,
            ordinal: *ordinal,
            layers: layers.clone(),
            len,
        };
        announced.push(header);
        sums.extend(crc32c(&bytes).to_le_bytes());
        payload.extend(bytes);
    }
    let mut head = Vec::new();
    wire::encode_extents(epoch, announced.iter(), &mut head);
    payload.extend(sums);
    (head, payload)
}

#[derive(Debug, Default)]
struct Book {
    /// What the writer sent, to find payloads' checksums in.
    sent: Vec<u8>,
    claims: Vec<(WriterConnection, ExtentHeader)>,
    /// Ever, in this input.
    claimed: HashSet<(Epoch, u32, u32)>,
    landed: HashSet<(Epoch, u32, u32)>,
    dying_claims: usize,
}

struct Grants {
    book: Mutex<Book>,
    closed: watch::Sender<u64>,
    view: ArenaView,
    this: std::sync::Weak<Self>,
}

impl Grants {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lives(book: &Book, epoch: Epoch) -> bool {
        epoch == LIVE || epoch == DYING && book.dying_claims < 3
    }
}

fn block_of(epoch: Epoch, ordinal: u32) -> Option<BlockId> {
    let granted = if epoch == LIVE { 4..9 } else { 11..13 };
    let block = granted.start + ordinal.min(BLOCKS);
    granted.contains(&block).then_some(BlockId(block))
}

fn parts(header: &ExtentHeader) -> impl Iterator<Item = (Epoch, u32, u32)> + '_ {
    header.layers.clone().map(|layer| (header.epoch, header.ordinal, layer))
}

impl Landing for Grants {
    fn claim(&self, from: &WriterConnection, header: &ExtentHeader) -> Result<Box<dyn Claim>, Reject> {
        assert_eq!(from.instance, WRITER);
        assert!(header.layers.start < header.layers.end && header.layers.end <= GEOMETRY.layers);
        assert_eq!(header.len as usize, header.layers.len() * LAYER);
        let mut book = self.book();
        if header.epoch == FOREIGN {
            return Err(Reject::WrongWriter);
        }
        if !Self::lives(&book, header.epoch) {
            return Err(Reject::DeadEpoch);
        }
        let block = block_of(header.epoch, header.ordinal).ok_or(Reject::OutsideGrant)?;
        let arriving = |part| book.claims.iter().any(|(_, held)| parts(held).any(|held| held == part));
        if parts(header).any(|part| book.landed.contains(&part) || arriving(part)) {
            return Err(Reject::Duplicate);
        }
        book.dying_claims += usize::from(header.epoch == DYING);
        book.claimed.extend(parts(header));
        book.claims.push((*from, header.clone()));
        Ok(Box::new(Held {
            grants: self.this.upgrade().ok_or(Reject::DeadEpoch)?,
            from: *from,
            header: header.clone(),
            block,
        }))
    }

    fn fenced(&self, from: &WriterConnection, epoch: Epoch) {
        let held = |(holder, header): &(WriterConnection, ExtentHeader)| holder == from && header.epoch == epoch;
        assert!(!self.book().claims.iter().any(held), "fenced with a claim in hand");
    }

    fn corrupt(&self, from: &WriterConnection, header: &ExtentHeader) {
        let held = self.book().claims.contains(&(*from, header.clone()));
        assert!(held, "a corrupt extent without its claim");
    }

    fn closed(&self, from: &WriterConnection) {
        let held = self.book().claims.iter().any(|(holder, _)| holder == from);
        assert!(!held, "closed with a claim in hand");
        self.closed.send_modify(|closed| *closed += 1);
    }
}

struct Held {
    grants: Arc<Grants>,
    from: WriterConnection,
    header: ExtentHeader,
    block: BlockId,
}

impl Claim for Held {
    fn block(&self) -> BlockId {
        self.block
    }

    fn offset(&self) -> usize {
        self.header.layers.start as usize * LAYER
    }

    fn len(&self) -> usize {
        self.header.len as usize
    }

    fn land(self: Box<Self>) -> Result<(), Reject> {
        let payload = &peek(&self.grants.view, self.block)[self.offset()..][..self.len()];
        let sum = crc32c(payload).to_le_bytes();
        let mut book = self.grants.book();
        assert!(
            book.sent.windows(4).any(|sent| sent == sum),
            "bytes landed whose checksum nobody sent"
        );
        if !Grants::lives(&book, self.header.epoch) {
            return Err(Reject::DeadEpoch);
        }
        for part in parts(&self.header) {
            assert!(book.landed.insert(part), "{part:?} landed twice");
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut book = self.grants.book();
        let mine = (self.from, self.header.clone());
        let at = book.claims.iter().position(|claim| *claim == mine);
        book.claims
            .swap_remove(at.expect("a claim is on the book until it drops"));
    }
}

/// A receiver with grants, and a writer that sends it what the fuzzer says.
pub struct TcpVictim {
    runtime: tokio::runtime::Runtime,
    transport: TcpTransport,
    instance: Instance,
    grants: Arc<Grants>,
    closed: watch::Receiver<u64>,
    supervisor: Supervisor,
}

impl TcpVictim {
    /// Listens on loopback.
    ///
    /// # Panics
    /// Where the system has no loopback port or memory for it.
    pub fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime can be had");
        let view = Arena::allocate(GEOMETRY, BLOCKS, &mut |_, _| ())
            .expect("8 KiB can be mapped")
            .view();
        let (sender, closed) = watch::channel(0);
        let grants = Arc::new_cyclic(|this| Grants {
            book: Mutex::default(),
            closed: sender,
            view: view.clone(),
            this: this.clone(),
        });
        let (instance, supervisor) = (Instance::random(), Supervisor::new());
        let local = Local {
            identity: identity(instance),
            arena: view,
            landing: Arc::clone(&grants) as Arc<dyn Landing>,
            clock: Clock::new(),
            supervisor: supervisor.clone(),
        };
        let options = TcpOptions {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: None,
            connections_per_peer: 1,
            crc: true,
            connect_timeout: PATIENCE,
            progress_timeout: PATIENCE,
            bytes_in_flight_max: 1 << 20,
        };
        let transport = runtime
            .block_on(TcpTransport::bind(options, local))
            .expect("a port of loopback can be had");
        Self {
            runtime,
            transport,
            instance,
            grants,
            closed,
            supervisor,
        }
    }

    /// Connects, shakes hands, sends what `program` says, closes, and checks what became of it.
    ///
    /// # Panics
    /// Where the receiver broke a promise: that is what is looked for.
    pub fn feed(&mut self, program: &[u8]) {
        let Some((split, program)) = program.split_first() else {
            return;
        };
        let sent = compile(program);
        let untouched = vec![UNTOUCHED; GEOMETRY.block_bytes()];
        (0..BLOCKS).for_each(|block| poke(&self.grants.view, BlockId(block), &untouched));
        *self.grants.book() = Book {
            sent: sent.clone(),
            ..Book::default()
        };
        let Self {
            runtime,
            transport,
            instance,
            closed,
            ..
        } = self;
        runtime.block_on(async {
            let before = *closed.borrow();
            let mut stream = enter(&transport.address(), *instance).await;
            let chunk = 1 + usize::from(*split) * 16;
            for (number, piece) in sent.chunks(chunk.max(sent.len() / 16)).enumerate() {
                // The receiver may close before it has taken everything.
                if stream.write_all(piece).await.is_err() {
                    break;
                }
                if number < 8 {
                    tokio::task::yield_now().await;
                }
            }
            // Closed with acknowledgements unread, it would be reset, and what the victim has not read yet lost.
            let _ = stream.shutdown().await;
            while stream.read(&mut [0; 4096]).await.is_ok_and(|got| got > 0) {}
            let end = tokio::time::timeout(PATIENCE, closed.wait_for(|closed| *closed > before)).await;
            assert!(end.is_ok_and(|end| end.is_ok()), "the connection never ended");
        });
        self.check();
    }

    fn check(&self) {
        let book = self.grants.book();
        assert_eq!(book.claims, [], "claims that nobody returned");
        assert_eq!(self.supervisor.fatal(), None);
        let owners = [LIVE, DYING]
            .into_iter()
            .flat_map(|epoch| (0..BLOCKS).filter_map(move |o| Some((block_of(epoch, o)?, epoch, o))));
        let owners: std::collections::HashMap<_, _> = owners
            .map(|(block, epoch, ordinal)| (block, (epoch, ordinal)))
            .collect();
        for block in (0..BLOCKS).map(BlockId) {
            let bytes = peek(&self.grants.view, block);
            for (layer, bytes) in (0..).zip(bytes.chunks(LAYER)) {
                let claimed = owners
                    .get(&block)
                    .is_some_and(|(epoch, ordinal)| book.claimed.contains(&(*epoch, *ordinal, layer)));
                assert!(
                    claimed || bytes.iter().all(|byte| *byte == UNTOUCHED),
                    "layer {layer} of {block:?} was written without a claim"
                );
            }
        }
    }
}

/// A connection that has shaken hands.
async fn enter(address: &str, to: Instance) -> TcpStream {
    let address = address.strip_prefix("tcp://").expect("it is a tcp address");
    let mut stream = TcpStream::connect(address).await.expect("the victim listens");
    let hello = Hello::new(&identity(WRITER), to, true, Verdict::Asking);
    stream
        .write_all(&hello.encode())
        .await
        .expect("the victim reads a hello");
    let mut answer = [0; HELLO_BYTES];
    stream.read_exact(&mut answer).await.expect("the victim answers");
    let answer = Hello::decode(&answer).expect("its answer is a hello");
    assert_eq!(answer.verdict, Verdict::Accepted);
    stream
}

/// The bytes of a program.
fn compile(program: &[u8]) -> Vec<u8> {
    let mut program = Program(program);
    let mut out = Vec::new();
    while let Some(piece) = program.byte() {
        match piece % 8 {
            0 => {
                let len = program.next();
                out.extend_from_slice(program.take(len.into()));
            }
            1 | 2 => {
                let (head, payload) = program.frame();
                out.extend(head);
                out.extend(payload);
            }
            3 => {
                // A payload with one bit wrong.
                let (head, mut payload) = program.frame();
                let at = usize::from(program.next()) * 16 % payload.len();
                payload[at] ^= 1;
                out.extend(head);
                out.extend(payload);
            }
            4 => wire::encode_fence(Epoch(u64::from(program.next() % 5)), &mut out),
            5 => {
                // Any descriptors, under a right head; and any payload.
                let start = out.len();
                out.extend(program.frame().0);
                for _ in 0..program.next() % 4 {
                    let at = start + 4 + usize::from(program.next()) % (out.len() - start - 4);
                    out[at] = program.next();
                }
                reseal(&mut out[start..]);
                let len = usize::from(program.next()) * 4;
                out.extend_from_slice(program.take(len));
            }
            6 => {
                // Cut off: what follows is out of step.
                let (head, payload) = program.frame();
                let whole = [head, payload].concat();
                let keep = usize::from(program.next()) * 8 % whole.len();
                out.extend_from_slice(&whole[..keep]);
            }
            _ => {
                // A bit of what was sent so far changes.
                if !out.is_empty() {
                    let at = (usize::from(program.next()) << 8 | usize::from(program.next())) % out.len();
                    out[at] ^= 1 << (program.next() % 8);
                }
            }
        }
    }
    out
}

struct Program<'a>(&'a [u8]);

impl<'a> Program<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn next(&mut self) -> u8 {
        self.byte().unwrap_or(0)
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn frame(&mut self) -> (Vec<u8>, Vec<u8>) {
        let epoch = Epoch(u64::from(self.next() % 5));
        let extents: Vec<_> = (0..1 + self.next() % 12)
            .map(|_| {
                let extent = self.next();
                let layers = [0..1, 1..2, 0..2][usize::from(extent >> 4) % 3].clone();
                (u32::from(extent % 16), layers)
            })
            .collect();
        frame(epoch, &extents, self.next())
    }
}

/// Programs that reach each part of the receiver.
pub(crate) fn receiver_seeds() -> Vec<Vec<u8>> {
    let (whole, first) = (0x20, 0x00);
    vec![
        // Two extents land, then the marker, then a dead epoch.
        vec![255, 1, 1, 1, whole, whole + 3, 5, 4, 1, 1, 4, 0, whole, 6],
        // Duplicates, another writer's epoch, outside of the grant.
        vec![3, 1, 1, 2, first, first, whole, 9, 1, 3, 0, first, 9, 1, 1, 0, 0x2f, 9],
        // The dying epoch, with claims that live past its death.
        vec![40, 1, 2, 3, first, first + 1, 0x10, 0x11, 8, 1, 2, 0, whole, 8],
        vec![9, 3, 1, 1, whole, whole + 1, 4, 3],
        vec![0, 6, 1, 2, whole, whole + 1, whole + 2, 7, 20],
        vec![200, 5, 1, 0, whole, 1, 2, 30, 255, 10, 1, 2, 3, 4, 5],
        vec![200, 1, 1, 0, whole, 1, 7, 0, 50, 3, 0, 6, 1, 2, 3, 4, 5, 6],
        [vec![10, 1, 1, 11], vec![first; 12], vec![3, 4, 1]].concat(),
    ]
}
