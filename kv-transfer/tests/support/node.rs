//! One node: arena, book, transport. And the transports that the suite runs over.

#![allow(unsafe_code)]

use super::Book;
use baton_kv_transfer::transport::{
    Extent, Landing, Local, MemoryNetwork, MemoryOptions, MemoryTransport, Path, SourceClaim, TcpOptions, TcpTransport,
    Transport,
};
use baton_kv_transfer::{Arena, Identity, Peer};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::{ArenaView, BlockId, Instance, KvDtype, KvGeometry, ModelFingerprint, NodeId, NumericsId};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// A geometry whose layers have that many bytes: a multiple of 64.
pub fn geometry(layers: u32, layer_bytes: u32) -> KvGeometry {
    let head_dim = layer_bytes / 64;
    let geometry = KvGeometry {
        layers,
        kv_heads: 1,
        head_dim,
        block_tokens: 16,
        dtype: KvDtype::F16,
    };
    assert_eq!(geometry.layer_bytes(), layer_bytes as usize);
    geometry
}

/// A transport under test.
pub trait Kind: Send + Sync {
    fn start(&self, options: &NodeOptions, local: Local) -> BoxFuture<'_, Arc<dyn Transport>>;

    /// Connections that its paths have, where `asked` were asked for.
    fn connections(&self, asked: usize) -> usize {
        asked
    }

    /// The writer puts bytes where it likes within the arena: the receiver counts them or not, but cannot discard them.
    fn one_sided(&self) -> bool {
        false
    }

    /// What a write has queued is carried even if the write is dropped.
    fn queues(&self) -> bool {
        true
    }

    /// Bytes are emulated: what only repeats is done less often.
    fn slow(&self) -> bool {
        false
    }
}

/// The memory transport.
#[derive(Default)]
pub struct Memory(MemoryNetwork);

impl Kind for Memory {
    fn start(&self, options: &NodeOptions, local: Local) -> BoxFuture<'_, Arc<dyn Transport>> {
        let options = MemoryOptions {
            name: local.identity.instance.to_string(),
            connections_per_peer: options.connections,
            bytes_in_flight_max: options.bytes_in_flight_max,
        };
        let transport = MemoryTransport::start(&self.0, options, local).unwrap();
        async move { Arc::new(transport) as Arc<dyn Transport> }.boxed()
    }
}

/// The tcp transport over loopback.
#[derive(Default)]
pub struct Tcp;

impl Kind for Tcp {
    fn start(&self, options: &NodeOptions, local: Local) -> BoxFuture<'_, Arc<dyn Transport>> {
        let options = TcpOptions {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: None,
            connections_per_peer: options.connections,
            crc: options.crc,
            connect_timeout: Duration::from_secs(30),
            progress_timeout: Duration::from_secs(30),
            bytes_in_flight_max: options.bytes_in_flight_max,
        };
        async move { Arc::new(TcpTransport::bind(options, local).await.unwrap()) as Arc<dyn Transport> }.boxed()
    }
}

/// How a node is made.
#[derive(Clone)]
pub struct NodeOptions {
    pub geometry: KvGeometry,
    pub blocks: u32,
    pub connections: usize,
    pub bytes_in_flight_max: usize,
    pub crc: bool,
    pub fingerprint: ModelFingerprint,
    /// It is the receiver: some transports have one device for each end.
    #[cfg_attr(not(feature = "rdma"), allow(dead_code))]
    pub receives: bool,
}

impl NodeOptions {
    pub fn new(geometry: KvGeometry, blocks: u32) -> Self {
        Self {
            geometry,
            blocks,
            connections: 2,
            bytes_in_flight_max: 8 << 20,
            crc: true,
            fingerprint: ModelFingerprint([7; 32]),
            receives: false,
        }
    }

    /// The same for the other end.
    pub fn of_receiver(&self) -> Self {
        Self {
            receives: true,
            ..self.clone()
        }
    }
}

/// A node without a role.
pub struct Node {
    pub identity: Identity,
    pub transport: Arc<dyn Transport>,
    pub view: ArenaView,
    pub book: Arc<Book>,
    pub supervisor: Supervisor,
}

impl Node {
    pub async fn start(kind: &dyn Kind, options: &NodeOptions) -> Self {
        Self::start_as(kind, options, Instance::random()).await
    }

    pub async fn start_as(kind: &dyn Kind, options: &NodeOptions, instance: Instance) -> Self {
        let identity = Identity {
            node: NodeId::new("node"),
            instance,
            fingerprint: options.fingerprint,
            geometry: options.geometry,
            numerics: NumericsId("test".into()),
            build: "test".into(),
        };
        let view = Arena::allocate(options.geometry, options.blocks, &mut |_, _| ())
            .unwrap()
            .view();
        let book = Book::new(options.geometry);
        let supervisor = Supervisor::new();
        let local = Local {
            identity: identity.clone(),
            arena: view.clone(),
            landing: Arc::clone(&book) as Arc<dyn Landing>,
            clock: Clock::new(),
            supervisor: supervisor.clone(),
        };
        let transport = kind.start(options, local).await;
        Self {
            identity,
            transport,
            view,
            book,
            supervisor,
        }
    }

    pub fn instance(&self) -> Instance {
        self.identity.instance
    }

    pub fn peer(&self) -> Peer {
        let addresses = vec![self.transport.address()];
        Peer {
            node: self.identity.node.clone(),
            instance: self.identity.instance,
            addresses,
        }
    }

    pub async fn connect(&self, to: &Self) -> Arc<dyn Path> {
        self.transport
            .connect(&to.peer(), &to.transport.address())
            .await
            .unwrap()
    }

    /// Fills every layer of every block with bytes that tell where they are from.
    pub fn fill(&self) {
        for block in 0..self.view.blocks() as u32 {
            for layer in 0..self.view.geometry().layers {
                let bytes = self.pattern(block, layer);
                let offset = layer as usize * bytes.len();
                // SAFETY: nobody else uses the arena yet.
                unsafe { self.view.write(BlockId(block), offset, &bytes).unwrap() };
            }
        }
    }

    fn pattern(&self, block: u32, layer: u32) -> Vec<u8> {
        let seed = u64::from(block) << 32 | u64::from(layer) << 8 | 1;
        let words = self.view.geometry().layer_bytes() / 8;
        (0..words as u64)
            .flat_map(|i| (seed.wrapping_add(i).wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes())
            .collect()
    }

    /// One layer of one block, as it stands now.
    pub fn layer(&self, block: BlockId, layer: u32) -> Vec<u8> {
        let mut bytes = vec![0; self.view.geometry().layer_bytes()];
        // SAFETY: callers look at blocks that no claim holds.
        unsafe { self.view.read(block, layer as usize * bytes.len(), &mut bytes).unwrap() };
        bytes
    }

    /// Compares the whole arena with what must have come from `source`: block `to` holds layers of block `from` there, and
    /// whatever is not named holds zeros.
    pub fn assert_holds(&self, source: &Self, expected: &[(BlockId, BlockId, Range<u32>)]) {
        let mut filled = HashSet::new();
        for (to, from, layers) in expected {
            for layer in layers.clone() {
                assert!(
                    self.layer(*to, layer) == source.layer(*from, layer),
                    "layer {layer} of {from:?} in {to:?}"
                );
                filled.insert((to.0, layer));
            }
        }
        for block in 0..self.view.blocks() as u32 {
            for layer in (0..self.view.geometry().layers).filter(|layer| !filled.contains(&(block, *layer))) {
                let untouched = self.layer(BlockId(block), layer).iter().all(|byte| *byte == 0);
                assert!(untouched, "layer {layer} of block {block} was written");
            }
        }
    }

    /// An extent of this node, on its way to a block of the receiver.
    pub fn extent(
        &self,
        ordinal: u32,
        layers: Range<u32>,
        source: BlockId,
        destination: BlockId,
        claim: &SourceClaim,
    ) -> Extent {
        Extent {
            ordinal,
            layers,
            source,
            destination,
            claim: Arc::clone(claim),
        }
    }

    /// Ends the transport and sees that nothing of it is left.
    pub async fn end(self) {
        self.transport.shutdown().await;
        assert_eq!(self.book.claims(), 0);
        self.book.assert_sound();
        if let Err(left) = self.supervisor.join(Duration::from_secs(30)).await {
            panic!("tasks left: {left:?}");
        }
        assert_eq!(self.supervisor.fatal(), None);
    }
}
