//! Whole hand-overs of 1,000 extents of 2 KiB between two endpoints of this process: both machines, the driver, and what a
//! path does with very many small extents. Memory copies them one by one, tcp puts many into one call, shared memory many
//! into one notification. The source blocks are once in order, so that runs of them lie next to each other, and once not.

use baton_kv_transfer::{
    Arena, DestinationBlocks, Endpoint, EndpointOptions, ExpectSpec, Identity, IncomingEvent, NoRoom, OutgoingSpec,
    PathKind, QuarantinedBlocks, ReservedBlocks,
};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::{
    Attempt, BlockHash, BlockId, Instance, KvDtype, KvGeometry, ModelFingerprint, NodeId, NumericsId, Ticket,
};
use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::any::Any;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;

const BLOCKS: u32 = 1000;
const LIMIT: Duration = Duration::from_secs(60);
const GEOMETRY: KvGeometry = KvGeometry {
    layers: 4,
    kv_heads: 2,
    head_dim: 16,
    block_tokens: 4,
    dtype: KvDtype::F16,
};

/// Always the same blocks: one hand-over at a time.
struct Same;

struct Reserved(Vec<BlockId>);

impl DestinationBlocks for Same {
    fn reserve(&self, _hashes: &[BlockHash], total: usize) -> Result<Box<dyn ReservedBlocks>, NoRoom> {
        Ok(Box::new(Reserved((0..).take(total).map(BlockId).collect())))
    }
}

impl ReservedBlocks for Reserved {
    fn held(&self) -> &[BlockId] {
        &[]
    }

    fn fresh(&self) -> &[BlockId] {
        &self.0
    }

    fn commit(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }

    fn quarantine(self: Box<Self>) -> Box<dyn QuarantinedBlocks> {
        self
    }

    fn release(self: Box<Self>) {}
}

impl QuarantinedBlocks for Reserved {
    fn blocks(&self) -> &[BlockId] {
        &self.0
    }

    fn release(self: Box<Self>) {}
}

async fn start(path: PathKind, name: &str) -> Endpoint {
    let options = EndpointOptions {
        transports: vec![path],
        quarantine_share: 1.0,
        ..EndpointOptions::default()
    };
    let identity = Identity {
        node: NodeId::new(name),
        instance: Instance::random(),
        fingerprint: ModelFingerprint([1; 32]),
        geometry: GEOMETRY,
        numerics: NumericsId("bench".into()),
        build: "bench".into(),
    };
    let arena = Arena::allocate(GEOMETRY, BLOCKS, &mut |_, _| ()).expect("2 MiB can be mapped");
    let (clock, supervisor) = (Clock::new(), Supervisor::new());
    Endpoint::start(options, identity, arena.view(), Arc::new(Same), clock, supervisor)
        .await
        .expect("this path can be had in one process")
}

/// One hand-over; the source blocks in this order.
async fn hand_over(sender: &Endpoint, receiver: &Endpoint, sources: &[BlockId]) {
    let context_tokens = sources.len() * GEOMETRY.block_tokens as usize;
    let (ticket, attempt) = (Ticket::random(), Attempt::FIRST);
    let mut incoming = receiver
        .expect(ExpectSpec {
            ticket,
            attempt,
            hashes: Vec::new(),
            blocks: sources.len(),
            context_tokens,
            deadline: LIMIT,
        })
        .expect("there is room for one");
    let mut outgoing = sender.open(OutgoingSpec {
        peer: receiver.peer(),
        ticket,
        attempt,
        context_tokens,
        deadline: LIMIT,
    });
    outgoing.reserve().await.expect("it is granted");
    let claim: Arc<dyn Any + Send + Sync> = Arc::new(());
    for (ordinal, source) in (0..).zip(sources) {
        outgoing
            .push(ordinal, 0..GEOMETRY.layers, *source, Arc::clone(&claim))
            .expect("it is of the context");
    }
    outgoing.complete(Bytes::new()).await.expect("it is committed");
    loop {
        match incoming.next().await {
            IncomingEvent::Committed { .. } => return,
            IncomingEvent::AttemptFailed { error, .. } => panic!("{error}"),
            IncomingEvent::Granted { .. } | IncomingEvent::FirstBlock => {}
        }
    }
}

fn handovers(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime can be had");
    let mut group = criterion.benchmark_group("handover_1000_extents");
    group.throughput(Throughput::Elements(u64::from(BLOCKS)));
    group.sample_size(30);
    let in_order: Vec<BlockId> = (0..BLOCKS).map(BlockId).collect();
    // 7 and 1000 have no common divisor.
    let apart: Vec<BlockId> = (0..BLOCKS).map(|number| BlockId(number * 7 % BLOCKS)).collect();
    for path in [PathKind::Memory, PathKind::Tcp, PathKind::Shm] {
        let (sender, receiver) =
            runtime.block_on(async { (start(path, "sender").await, start(path, "receiver").await) });
        for (order, sources) in [("in_order", &in_order), ("apart", &apart)] {
            group.bench_function(BenchmarkId::new(path.name(), order), |bench| {
                bench.iter(|| runtime.block_on(hand_over(&sender, &receiver, sources)));
            });
        }
        runtime.block_on(async { tokio::join!(sender.shutdown(), receiver.shutdown()) });
    }
}

criterion_group!(benches, handovers);
criterion_main!(benches);
