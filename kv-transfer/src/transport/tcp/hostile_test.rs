//! Peers that err or mean harm: whatever they send, nothing is written outside a claim, nothing false lands, no task panics
//! or stays, and both ends name what they saw.

use super::wire::{self, HELLO_BYTES, Hello, Verdict};
use super::{TcpOptions, TcpTransport};
use crate::transport::raw::{CRC32C, peek};
use crate::transport::{
    Claim, ConnectError, Extent, ExtentHeader, Landing, Local, Path, PathError, Reject, Transport, WriterConnection,
};
use crate::{Arena, Identity, Peer};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::{ArenaView, BlockId, Epoch, Instance, KvDtype, KvGeometry, ModelFingerprint, NodeId, NumericsId};
use proptest::prelude::*;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
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
/// Ordinals 0..4 of epoch 1 are blocks 8..12.
const EPOCH: Epoch = Epoch(1);
const GRANT: Range<u32> = 8..12;
const WRITER: Instance = Instance(0xbad);

#[derive(Debug, Default, Clone)]
struct Seen {
    landed: Vec<(u32, Range<u32>)>,
    corrupt: Vec<u32>,
    fenced: usize,
    opened: usize,
    closed: usize,
    claims: usize,
}

struct Grants {
    seen: watch::Sender<Seen>,
    view: ArenaView,
}

struct GrantClaim {
    seen: watch::Sender<Seen>,
    view: ArenaView,
    header: ExtentHeader,
}

impl Landing for Grants {
    fn claim(&self, from: &WriterConnection, header: &ExtentHeader) -> Result<Box<dyn Claim>, Reject> {
        assert_eq!(from.instance, WRITER);
        if header.epoch != EPOCH {
            return Err(Reject::DeadEpoch);
        }
        if header.ordinal >= GRANT.end - GRANT.start {
            return Err(Reject::OutsideGrant);
        }
        self.seen.send_modify(|seen| {
            seen.claims += 1;
            seen.opened += 1;
        });
        Ok(Box::new(GrantClaim {
            seen: self.seen.clone(),
            view: self.view.clone(),
            header: header.clone(),
        }))
    }

    fn fenced(&self, _from: &WriterConnection, _epoch: Epoch) {
        self.seen.send_modify(|seen| seen.fenced += 1);
    }

    fn corrupt(&self, _from: &WriterConnection, header: &ExtentHeader) {
        self.seen.send_modify(|seen| seen.corrupt.push(header.ordinal));
    }

    fn closed(&self, _from: &WriterConnection) {
        self.seen.send_modify(|seen| {
            assert_eq!(seen.claims, 0, "closed with a claim in hand");
            seen.closed += 1;
        });
    }
}

impl Claim for GrantClaim {
    fn block(&self) -> BlockId {
        BlockId(GRANT.start + self.header.ordinal)
    }

    fn offset(&self) -> usize {
        self.header.layers.start as usize * LAYER
    }

    fn len(&self) -> usize {
        self.header.len as usize
    }

    fn land(self: Box<Self>) -> Result<(), Reject> {
        // Every right frame of these tests carries one value, and not zero: what lands is what was sent.
        let payload = &peek(&self.view, self.block())[self.offset()..][..self.len()];
        assert!(
            payload[0] != 0 && payload.iter().all(|byte| *byte == payload[0]),
            "false bytes landed"
        );
        self.seen
            .send_modify(|seen| seen.landed.push((self.header.ordinal, self.header.layers.clone())));
        Ok(())
    }
}

impl Drop for GrantClaim {
    fn drop(&mut self) {
        self.seen.send_modify(|seen| seen.claims -= 1);
    }
}

struct Victim {
    transport: TcpTransport,
    identity: Identity,
    view: ArenaView,
    seen: watch::Receiver<Seen>,
    supervisor: Supervisor,
}

impl Victim {
    async fn start(progress_timeout: Duration) -> Self {
        let identity = Identity {
            node: NodeId::new("victim"),
            instance: Instance::random(),
            fingerprint: ModelFingerprint([3; 32]),
            geometry: GEOMETRY,
            numerics: NumericsId("test".into()),
            build: "test".into(),
        };
        let view = Arena::allocate(GEOMETRY, BLOCKS, &mut |_, _| ()).unwrap().view();
        let (sender, seen) = watch::channel(Seen::default());
        let supervisor = Supervisor::new();
        let local = Local {
            identity: identity.clone(),
            arena: view.clone(),
            landing: Arc::new(Grants {
                seen: sender,
                view: view.clone(),
            }),
            clock: Clock::new(),
            supervisor: supervisor.clone(),
        };
        let options = TcpOptions {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: None,
            connections_per_peer: 1,
            crc: true,
            connect_timeout: progress_timeout,
            progress_timeout,
            bytes_in_flight_max: 1 << 20,
        };
        let transport = TcpTransport::bind(options, local).await.unwrap();
        Self {
            transport,
            identity,
            view,
            seen,
            supervisor,
        }
    }

    async fn patient() -> Self {
        Self::start(Duration::from_secs(60)).await
    }

    fn hello(&self) -> Hello {
        let from = Identity {
            instance: WRITER,
            ..self.identity.clone()
        };
        Hello::new(&from, self.identity.instance, true, Verdict::Asking)
    }

    async fn dial(&self) -> TcpStream {
        TcpStream::connect(self.transport.address().strip_prefix("tcp://").unwrap())
            .await
            .unwrap()
    }

    /// A connection that has shaken hands.
    async fn enter(&self) -> TcpStream {
        let mut stream = self.dial().await;
        stream.write_all(&self.hello().encode()).await.unwrap();
        let mut answer = [0; HELLO_BYTES];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(Hello::decode(&answer).unwrap().verdict, Verdict::Accepted);
        stream
    }

    async fn wait(&mut self, enough: impl FnMut(&Seen) -> bool) -> Seen {
        tokio::time::timeout(Duration::from_secs(60), self.seen.wait_for(enough))
            .await
            .unwrap()
            .unwrap()
            .clone()
    }

    /// Sends bytes behind a handshake, closes, and gives what was seen once the victim closed too.
    async fn fed(&mut self, bytes: &[u8]) -> Seen {
        let closed = self.seen.borrow().closed;
        let mut stream = self.enter().await;
        // The victim may close before it has taken everything.
        let _ = stream.write_all(bytes).await;
        // Closed with acknowledgements unread, it would be reset, and what the victim has not read yet lost.
        let _ = stream.shutdown().await;
        while stream.read(&mut [0; 4096]).await.is_ok_and(|got| got > 0) {}
        self.wait(|seen| seen.closed > closed).await
    }

    fn block(&self, block: u32) -> Vec<u8> {
        peek(&self.view, BlockId(block))
    }

    fn assert_nothing_outside_the_grant(&self) {
        for block in (0..BLOCKS).filter(|block| !GRANT.contains(block)) {
            assert!(
                self.block(block).iter().all(|byte| *byte == 0),
                "block {block} was written"
            );
        }
        assert_eq!(self.supervisor.fatal(), None);
    }

    async fn end(self) {
        self.assert_nothing_outside_the_grant();
        self.transport.shutdown().await;
        assert_eq!(self.supervisor.join(Duration::from_secs(60)).await, Ok(()));
    }
}

/// A frame of whole extents with right checksums.
fn frame(epoch: Epoch, extents: &[(u32, Range<u32>)], fill: u8) -> Vec<u8> {
    let mut payload = Vec::new();
    let (mut announced, mut crcs) = (Vec::new(), Vec::new());
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
        crcs.extend((crc_fast::checksum(CRC32C, &bytes) as u32).to_le_bytes());
        payload.extend(bytes);
    }
    let mut frame = Vec::new();
    wire::encode_extents(epoch, announced.iter(), &mut frame);
    frame.extend(payload);
    frame.extend(crcs);
    frame
}

#[tokio::test]
async fn a_well_formed_frame_lands() {
    let mut victim = Victim::patient().await;
    let mut bytes = frame(EPOCH, &[(0, 0..2), (9, 0..1), (3, 1..2)], 5);
    wire::encode_fence(EPOCH, &mut bytes);
    bytes.extend(frame(Epoch(2), &[(0, 0..2)], 6));
    bytes.extend(frame(EPOCH, &[(1, 0..1)], 7));
    let seen = victim.fed(&bytes).await;
    assert_eq!(seen.landed, [(0, 0..2), (3, 1..2), (1, 0..1)]);
    assert_eq!((seen.fenced, seen.corrupt.len()), (1, 0));
    assert!(victim.block(8).iter().all(|byte| *byte == 5));
    assert!(victim.block(9)[..LAYER].iter().all(|byte| *byte == 7));
    victim.end().await;
}

#[tokio::test]
async fn a_corrupt_payload_is_reported_and_ends_the_connection() {
    let mut victim = Victim::patient().await;
    let mut bytes = frame(EPOCH, &[(3, 0..2)], 5);
    bytes.extend(frame(EPOCH, &[(0, 0..2), (1, 0..2)], 5));
    let last_of_payload = bytes.len() - 1 - 2 * wire::CRC_BYTES;
    bytes[last_of_payload] ^= 1;
    bytes.extend(frame(EPOCH, &[(2, 0..2)], 5));
    let seen = victim.fed(&bytes).await;
    assert_eq!(seen.landed, [(3, 0..2)]);
    assert_eq!(seen.corrupt, [1]);
    victim.end().await;
}

#[tokio::test]
async fn what_is_torn_lands_nowhere() {
    let mut victim = Victim::patient().await;
    let bytes = frame(EPOCH, &[(0, 0..2), (1, 0..2)], 5);
    for cut in [1, 20, wire::PREFIX_BYTES, bytes.len() - 1] {
        let seen = victim.fed(&bytes[..cut]).await;
        assert_eq!((seen.landed.len(), seen.claims), (0, 0), "cut at {cut}");
    }
    victim.end().await;
}

#[tokio::test]
async fn silence_within_a_frame_ends_the_connection() {
    let mut victim = Victim::start(Duration::from_millis(50)).await;
    let mut stream = victim.enter().await;
    stream.write_all(&frame(EPOCH, &[(0, 0..2)], 5)[..100]).await.unwrap();
    let seen = victim.wait(|seen| seen.closed == 1).await;
    assert_eq!((seen.opened, seen.landed.len()), (1, 0));
    // Silence instead of a handshake, too.
    let mut silent = victim.dial().await;
    assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
    victim.end().await;
}

#[tokio::test]
async fn strangers_are_not_let_in() {
    let victim = Victim::patient().await;
    let mut stranger = victim.dial().await;
    stranger.write_all(&[b'G'; HELLO_BYTES]).await.unwrap();
    // Without a word: with what it sent unread, that is a reset.
    assert!(matches!(stranger.read(&mut [0]).await, Ok(0) | Err(_)));

    let answered = async |hello: [u8; HELLO_BYTES]| {
        let mut stream = victim.dial().await;
        stream.write_all(&hello).await.unwrap();
        let mut answer = [0; HELLO_BYTES];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "the connection stays open");
        Hello::decode(&answer).unwrap()
    };
    let mut later = victim.hello().encode();
    later[8] += 1;
    let others = [
        later,
        Hello {
            to: Instance(1),
            ..victim.hello()
        }
        .encode(),
        Hello {
            fingerprint: ModelFingerprint([9; 32]),
            ..victim.hello()
        }
        .encode(),
        Hello {
            geometry: KvGeometry { layers: 3, ..GEOMETRY },
            ..victim.hello()
        }
        .encode(),
    ];
    for hello in others {
        let answer = answered(hello).await;
        assert_eq!(answer.verdict, Verdict::Refused);
        assert_eq!(answer.from, victim.identity.instance);
    }
    assert_eq!(victim.seen.borrow().closed, 0);
    victim.end().await;
}

/// A peer at whose address something answers that does as it likes.
async fn fake(answer: impl AsyncFnOnce(TcpStream, Hello) + 'static) -> (Peer, String, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    let peer = Peer {
        node: NodeId::new("fake"),
        instance: Instance(77),
        addresses: vec![address.clone()],
    };
    let task = tokio::task::spawn_local(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asking = [0; HELLO_BYTES];
        stream.read_exact(&mut asking).await.unwrap();
        answer(stream, Hello::decode(&asking).unwrap()).await;
    });
    (peer, address, task)
}

async fn connect(victim: &Victim, peer: &Peer, address: &str) -> Result<Arc<dyn Path>, ConnectError> {
    victim.transport.connect(peer, address).await
}

fn accepting(asking: &Hello) -> Hello {
    Hello {
        from: asking.to,
        to: asking.from,
        verdict: Verdict::Accepted,
        ..asking.clone()
    }
}

#[tokio::test]
async fn a_false_receiver_is_named_for_what_it_is() {
    tokio::task::LocalSet::new()
        .run_until(async {
            let victim = Victim::start(Duration::from_secs(2)).await;
            let refused = async |answer: Vec<u8>| {
                let (peer, address, task) =
                    fake(async move |mut stream: TcpStream, _| stream.write_all(&answer).await.unwrap()).await;
                let error = connect(&victim, &peer, &address).await.map(|_| ()).unwrap_err();
                task.await.unwrap();
                error
            };
            let mut later = victim.hello().encode();
            later[8] = 7;
            let error = refused(later.to_vec()).await;
            assert!(
                matches!(&error, ConnectError::Refused { field: "wire_major", theirs, .. } if theirs == "7"),
                "{error}"
            );
            let error = refused(vec![b'H'; HELLO_BYTES]).await;
            assert!(matches!(error, ConnectError::Handshake { .. }), "{error}");
            let error = refused(vec![1, 2, 3]).await;
            assert!(
                matches!(
                    error,
                    ConnectError::Unreachable {
                        kind: ErrorKind::UnexpectedEof,
                        ..
                    }
                ),
                "{error}"
            );
            let full = Hello {
                from: Instance(77),
                verdict: Verdict::Full,
                ..victim.hello()
            };
            let error = refused(full.encode().to_vec()).await;
            assert!(
                matches!(&error, ConnectError::Handshake { reason, .. } if reason.contains("too many")),
                "{error}"
            );

            let (peer, address, task) = fake(async |_stream, _| std::future::pending().await).await;
            let error = connect(&victim, &peer, &address).await.map(|_| ()).unwrap_err();
            assert!(matches!(error, ConnectError::Timeout { .. }), "{error}");
            task.abort();
            victim.end().await;
        })
        .await;
}

fn whole_blocks(count: u32, claim: &crate::transport::SourceClaim) -> Vec<Extent> {
    (0..count)
        .map(|ordinal| Extent {
            ordinal,
            layers: 0..2,
            source: BlockId(0),
            destination: BlockId(ordinal),
            claim: Arc::clone(claim),
        })
        .collect()
}

/// Bytes of a frame of one whole block, checksums on.
const FRAME: usize = wire::PREFIX_BYTES + 2 * LAYER + wire::CRC_BYTES;

#[tokio::test]
async fn a_receiver_that_takes_or_acknowledges_nothing_ends_the_path() {
    tokio::task::LocalSet::new()
        .run_until(async {
            let victim = Victim::start(Duration::from_millis(300)).await;
            let claim: crate::transport::SourceClaim = Arc::new(());
            for takes in [false, true] {
                let (peer, address, task) = fake(async move |mut stream: TcpStream, asking: Hello| {
                    stream.write_all(&accepting(&asking).encode()).await.unwrap();
                    while takes && stream.read(&mut [0; 4096]).await.is_ok_and(|got| got > 0) {}
                    std::future::pending::<()>().await;
                })
                .await;
                let path = connect(&victim, &peer, &address).await.unwrap();
                // 32 MiB: more than the sockets hold.
                let error = path.write(EPOCH, whole_blocks(64 << 10, &claim)).await.unwrap_err();
                let timed_out = PathError::Lost {
                    kind: ErrorKind::TimedOut,
                };
                assert!(
                    matches!(error, PathError::Stalled { .. }) || !takes && error == timed_out,
                    "takes {takes}: {error}"
                );
                assert!(error.is_retryable());
                path.close().await;
                assert_eq!(Arc::strong_count(&claim), 1);
                task.abort();
            }
            victim.end().await;
        })
        .await;
}

#[tokio::test]
async fn a_write_ends_when_it_is_acknowledged_and_its_claims_before() {
    tokio::task::LocalSet::new()
        .run_until(async {
            let victim = Victim::patient().await;
            let claim: crate::transport::SourceClaim = Arc::new(());
            let (say, said) = tokio::sync::oneshot::channel::<()>();
            let (peer, address, task) = fake(async |mut stream: TcpStream, asking: Hello| {
                stream.write_all(&accepting(&asking).encode()).await.unwrap();
                stream.read_exact(&mut [0; 3 * FRAME]).await.unwrap();
                said.await.unwrap();
                // In two pieces, and one for all three.
                let ack = wire::encode_ack(3);
                stream.write_all(&ack[..5]).await.unwrap();
                stream.flush().await.unwrap();
                stream.write_all(&ack[5..]).await.unwrap();
                assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
            })
            .await;
            let path = connect(&victim, &peer, &address).await.unwrap();
            let mut writes = futures::future::join_all((0..3).map(|_| path.write(EPOCH, whole_blocks(1, &claim))));
            assert!(futures::poll!(&mut writes).is_pending());
            while Arc::strong_count(&claim) > 1 {
                tokio::task::yield_now().await;
            }
            assert!(futures::poll!(&mut writes).is_pending());
            say.send(()).unwrap();
            assert_eq!(writes.await, [Ok(()), Ok(()), Ok(())]);
            path.close().await;
            task.await.unwrap();
            victim.end().await;
        })
        .await;
}

#[tokio::test]
async fn a_false_acknowledgement_ends_the_path() {
    tokio::task::LocalSet::new()
        .run_until(async {
            let victim = Victim::patient().await;
            let claim: crate::transport::SourceClaim = Arc::new(());
            let torn = {
                let mut ack = wire::encode_ack(1);
                ack[0] ^= 2;
                ack.to_vec()
            };
            let twice = [wire::encode_ack(1), wire::encode_ack(1)].concat();
            let talk = b"what is this?".to_vec();
            let false_ones = [
                torn,
                twice,
                talk,
                wire::encode_ack(0).to_vec(),
                wire::encode_ack(9).to_vec(),
            ];
            for said in false_ones {
                let (peer, address, task) = fake(async move |mut stream: TcpStream, asking: Hello| {
                    stream.write_all(&accepting(&asking).encode()).await.unwrap();
                    stream.read_exact(&mut [0; FRAME]).await.unwrap();
                    stream.write_all(&said).await.unwrap();
                    while stream.read(&mut [0; 4096]).await.is_ok_and(|got| got > 0) {}
                })
                .await;
                let path = connect(&victim, &peer, &address).await.unwrap();
                let error = loop {
                    if let Err(error) = path.write(EPOCH, whole_blocks(1, &claim)).await {
                        break error;
                    }
                };
                let lost = PathError::Lost {
                    kind: ErrorKind::InvalidData,
                };
                assert_eq!(error, lost);
                assert_eq!(path.write(EPOCH, whole_blocks(1, &claim)).await, Err(lost));
                path.close().await;
                assert_eq!(Arc::strong_count(&claim), 1);
                task.await.unwrap();
            }
            victim.end().await;
        })
        .await;
}

#[tokio::test]
async fn a_receiver_that_leaves_is_noticed_at_rest() {
    tokio::task::LocalSet::new()
        .run_until(async {
            let victim = Victim::patient().await;
            let (peer, address, task) = fake(async |mut stream: TcpStream, asking: Hello| {
                stream.write_all(&accepting(&asking).encode()).await.unwrap();
            })
            .await;
            let path = connect(&victim, &peer, &address).await.unwrap();
            task.await.unwrap();
            // Its thread ends without a write.
            let left = || victim.supervisor.task_names().contains(&"transfer-tcp-send");
            while left() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let lost = PathError::Lost {
                kind: ErrorKind::UnexpectedEof,
            };
            assert_eq!(path.fence(EPOCH).await, Err(lost));
            victim.end().await;
        })
        .await;
}

/// What a peer could send: junk, right frames, and frames with bytes changed or cut out.
fn stream_of_bytes() -> impl Strategy<Value = Vec<u8>> {
    let junk = proptest::collection::vec(any::<u8>(), 0..600);
    let extent = (0..6u32, 0..2u32, any::<bool>())
        .prop_map(|(ordinal, first, both)| (ordinal, if both { 0..2 } else { first..first + 1 }));
    let right = (0..3u64, proptest::collection::vec(extent, 1..8))
        .prop_map(|(epoch, extents)| frame(Epoch(epoch), &extents, 0xaa));
    let fence = (0..3u64).prop_map(|epoch| {
        let mut bytes = Vec::new();
        wire::encode_fence(Epoch(epoch), &mut bytes);
        bytes
    });
    let piece = prop_oneof![1 => junk, 6 => right, 1 => fence];
    let change = (any::<prop::sample::Index>(), any::<u8>(), 0..40usize);
    (
        proptest::collection::vec(piece, 1..6),
        proptest::collection::vec(change, 0..3),
    )
        .prop_map(|(pieces, changes)| {
            let mut bytes = pieces.concat();
            for (at, value, cut) in changes {
                if bytes.is_empty() {
                    break;
                }
                let at = at.index(bytes.len());
                if cut % 2 == 0 {
                    bytes[at] = value;
                } else {
                    bytes.drain(at..(at + cut).min(bytes.len()));
                }
            }
            bytes
        })
}

#[test]
fn no_bytes_do_harm() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let victim = Mutex::new(runtime.block_on(Victim::patient()));
    proptest!(ProptestConfig::with_cases(400), |(bytes in stream_of_bytes())| {
        let mut victim = victim.lock().unwrap();
        runtime.block_on(victim.fed(&bytes));
        victim.assert_nothing_outside_the_grant();
    });
    let victim = victim.into_inner().unwrap();
    let seen = victim.seen.borrow().clone();
    assert!(
        !seen.landed.is_empty() && !seen.corrupt.is_empty() && seen.fenced > 0,
        "the bytes were all junk: {seen:?}"
    );
    runtime.block_on(victim.end());
}
