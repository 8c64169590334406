//! The paths to one peer over transports that do as they are told: what is opened, shared, given up, probed, and who writes
//! next. Time stands still unless a test moves it.

use super::link::LinkParts;
use super::peer_paths::{PathWish, PeerPaths, SharedPath};
use super::stats::Counters;
use crate::nodes::{GEOMETRY, SECOND, identity};
use crate::transport::{ConnectError, Extent, Path, PathError, Transport};
use crate::{EndpointOptions, PathKind, Peer, TransferError, TransferStats};
use PathKind::{Memory, Shm, Tcp};
use baton_node_runtime::{CancellationToken, Clock, Supervisor};
use baton_types::{BlockId, Epoch, Instance, NodeId};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

/// What writes meet, and what was done.
struct Wire {
    kind: PathKind,
    /// A write ends when it has one of these.
    turns: Semaphore,
    broken: Mutex<bool>,
    unreachable: Mutex<bool>,
    connects: Mutex<usize>,
    closed: Mutex<usize>,
    written: Mutex<Vec<u64>>,
}

#[derive(Clone)]
struct Obedient(Arc<Wire>);

impl Obedient {
    fn new(kind: PathKind) -> Self {
        Self(Arc::new(Wire {
            kind,
            turns: Semaphore::new(0),
            broken: Mutex::default(),
            unreachable: Mutex::default(),
            connects: Mutex::default(),
            closed: Mutex::default(),
            written: Mutex::default(),
        }))
    }

    fn connects(&self) -> usize {
        *self.0.connects.lock().unwrap()
    }

    fn written(&self) -> Vec<u64> {
        self.0.written.lock().unwrap().clone()
    }

    fn break_down(&self, broken: bool) {
        *self.0.broken.lock().unwrap() = broken;
        *self.0.unreachable.lock().unwrap() = broken;
    }
}

impl Transport for Obedient {
    fn path(&self) -> PathKind {
        self.0.kind
    }

    fn address(&self) -> String {
        format!("{}://here", self.0.kind)
    }

    fn reaches(&self, address: &str) -> bool {
        !address.ends_with("elsewhere")
    }

    fn connect(&self, _: &Peer, address: &str) -> BoxFuture<'_, Result<Arc<dyn Path>, ConnectError>> {
        *self.0.connects.lock().unwrap() += 1;
        let address = address.to_owned();
        async move {
            tokio::task::yield_now().await;
            if *self.0.unreachable.lock().unwrap() {
                let kind = ErrorKind::ConnectionRefused;
                return Err(ConnectError::Unreachable { address, kind });
            }
            let path: Arc<dyn Path> = Arc::new(self.clone());
            Ok(path)
        }
        .boxed()
    }

    fn disconnect_instance(&self, _: Instance) -> BoxFuture<'_, ()> {
        std::future::ready(()).boxed()
    }

    fn shutdown(&self) -> BoxFuture<'_, ()> {
        std::future::ready(()).boxed()
    }
}

impl Path for Obedient {
    fn kind(&self) -> PathKind {
        self.0.kind
    }

    fn connections(&self) -> u32 {
        1
    }

    fn write(&self, epoch: Epoch, _: Vec<Extent>) -> BoxFuture<'static, Result<(), PathError>> {
        let wire = Arc::clone(&self.0);
        async move {
            wire.turns.acquire().await.unwrap().forget();
            let kind = ErrorKind::ConnectionReset;
            if *wire.broken.lock().unwrap() {
                return Err(PathError::Lost { kind });
            }
            wire.written.lock().unwrap().push(epoch.0);
            Ok(())
        }
        .boxed()
    }

    fn fence(&self, _: Epoch) -> BoxFuture<'static, Result<(), PathError>> {
        std::future::ready(Ok(())).boxed()
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        *self.0.closed.lock().unwrap() += 1;
        std::future::ready(()).boxed()
    }
}

struct Bench {
    paths: Arc<PeerPaths>,
    counters: Arc<Counters>,
    clock: Clock,
}

fn bench_with(transports: &[&Obedient], addresses: &[&str], options: EndpointOptions) -> Bench {
    let (counters, clock) = (Arc::new(Counters::default()), Clock::new());
    let shared = |transport: &&Obedient| -> Arc<dyn Transport> { Arc::new((*transport).clone()) };
    let parts = Arc::new(LinkParts {
        options,
        identity: identity(GEOMETRY),
        transports: transports.iter().map(shared).collect(),
        counters: Arc::clone(&counters),
        clock,
        supervisor: Supervisor::new(),
        tracker: TaskTracker::new(),
        stop: CancellationToken::new(),
    });
    let peer = Peer {
        node: NodeId::new("peer"),
        instance: Instance(7),
        addresses: addresses.iter().map(|address| (*address).to_owned()).collect(),
    };
    let paths = PeerPaths::new(&peer, &parts);
    Bench { paths, counters, clock }
}

const ALL: [&str; 3] = ["control://here:1", "tcp://here", "shm://here"];

fn bench(transports: &[&Obedient]) -> Bench {
    bench_with(transports, &ALL, EndpointOptions::default())
}

impl Bench {
    async fn path(&self, excluding: &[PathKind]) -> Result<Arc<SharedPath>, TransferError> {
        self.path_by(60, excluding).await
    }

    async fn path_by(&self, seconds: u32, excluding: &[PathKind]) -> Result<Arc<SharedPath>, TransferError> {
        let deadline = self.clock.now() + seconds * SECOND;
        self.paths.path(PathWish { bytes: 4096, deadline }, excluding).await
    }

    fn stats(&self) -> TransferStats {
        self.counters.snapshot()
    }

    fn standing(&self, kind: PathKind) -> (usize, usize) {
        let stats = self.stats().paths.get(&kind).copied().unwrap_or_default();
        (stats.open, stats.down)
    }
}

/// Whole blocks.
fn extents(blocks: usize) -> Vec<Extent> {
    let extent = |ordinal| Extent {
        ordinal,
        layers: 0..GEOMETRY.layers,
        source: BlockId(ordinal),
        destination: BlockId(ordinal),
        claim: Arc::new(()),
    };
    (0..blocks as u32).map(extent).collect()
}

#[tokio::test(start_paused = true)]
async fn a_path_is_opened_when_it_is_wanted_and_shared() {
    let (shm, tcp) = (Obedient::new(Shm), Obedient::new(Tcp));
    let bench = bench(&[&tcp, &shm]);
    assert_eq!((shm.connects(), tcp.connects()), (0, 0));
    let (first, second) = tokio::join!(bench.path(&[]), bench.path(&[]));
    assert_eq!((first.unwrap().kind(), second.unwrap().kind()), (Shm, Shm));
    assert_eq!((shm.connects(), tcp.connects()), (1, 0));
    assert_eq!(bench.path(&[Shm]).await.unwrap().kind(), Tcp);
    assert_eq!((bench.standing(Shm), bench.standing(Tcp)), ((1, 0), (1, 0)));
    bench.paths.close().await;
    assert_eq!((bench.standing(Shm), bench.standing(Tcp)), ((0, 0), (0, 0)));
    assert_eq!(*shm.0.closed.lock().unwrap(), 1);
    assert!(matches!(bench.path(&[]).await, Err(TransferError::PeerGone { .. })));
}

#[tokio::test(start_paused = true)]
async fn who_stops_waiting_does_not_stop_the_opening() {
    let tcp = Obedient::new(Tcp);
    let bench = bench(&[&tcp]);
    assert!(bench.path(&[]).now_or_never().is_none());
    assert_eq!(bench.path(&[]).await.unwrap().kind(), Tcp);
    assert_eq!(tcp.connects(), 1);
}

#[tokio::test(start_paused = true)]
async fn one_that_cannot_be_opened_is_passed_over_and_down() {
    let (shm, tcp) = (Obedient::new(Shm), Obedient::new(Tcp));
    shm.break_down(true);
    let bench = bench(&[&shm, &tcp]);
    assert_eq!(bench.path(&[]).await.unwrap().kind(), Tcp);
    assert_eq!((bench.standing(Shm), bench.standing(Tcp)), ((0, 1), (1, 0)));
    assert_eq!(bench.path(&[]).await.unwrap().kind(), Tcp);
    assert_eq!(shm.connects(), 1, "not again so soon");
    let error = bench.path(&[Tcp]).await.map(|path| path.kind()).unwrap_err();
    assert!(
        matches!(&error, TransferError::PathFailed { path, .. } if path == "shm"),
        "{error}"
    );
    assert_eq!(shm.connects(), 2, "nothing else was left");
    assert_eq!(
        bench
            .path(&[Tcp, Shm])
            .await
            .map(|path| path.kind())
            .unwrap_err()
            .to_string(),
        "no shm or tcp path to the peer, which offers tcp://here, shm://here"
    );
}

#[tokio::test(start_paused = true)]
async fn a_path_that_breaks_is_down_for_all_is_probed_and_comes_back() {
    let (shm, tcp) = (Obedient::new(Shm), Obedient::new(Tcp));
    let bench = bench(&[&shm, &tcp]);
    let paths = Arc::clone(&bench.paths);
    let probing = tokio::spawn(async move { paths.probe().await });
    let (one, other) = (bench.path(&[]).await.unwrap(), bench.path(&[]).await.unwrap());
    shm.break_down(true);
    shm.0.turns.add_permits(2);
    assert!(one.write(Epoch(1), extents(1)).await.is_err());
    assert_eq!(bench.standing(Shm), (0, 1));
    assert_eq!(
        bench.path(&[]).await.unwrap().kind(),
        Tcp,
        "new hand-overs go another way"
    );
    assert!(other.write(Epoch(2), extents(1)).await.is_err());
    assert_eq!(shm.connects(), 1);
    bench.clock.sleep(SECOND * 6 / 5).await;
    assert_eq!((shm.connects(), bench.standing(Shm)), (2, (0, 1)), "probed in vain");
    shm.break_down(false);
    bench.clock.sleep(SECOND * 2).await;
    assert_eq!((shm.connects(), bench.standing(Shm)), (3, (1, 0)));
    let again = bench.path(&[]).await.unwrap();
    assert_eq!(again.kind(), Shm);
    one.close().await;
    assert_eq!(bench.standing(Shm), (1, 0), "the one that broke is not this one");
    again.close().await;
    assert_eq!(bench.standing(Shm), (0, 1));
    probing.abort();
}

#[tokio::test(start_paused = true)]
async fn what_leads_elsewhere_or_is_not_required_is_no_path() {
    let (shm, tcp, memory) = (Obedient::new(Shm), Obedient::new(Tcp), Obedient::new(Memory));
    let addresses = ["control://here:1", "shm://elsewhere", "tcp://here", "rdma://here"];
    let bench = bench_with(&[&shm, &tcp], &addresses, EndpointOptions::default());
    assert_eq!(bench.path(&[]).await.unwrap().kind(), Tcp);
    assert_eq!((shm.connects(), bench.standing(Shm)), (0, (0, 0)));
    let only = |path| EndpointOptions {
        require_path: Some(path),
        ..EndpointOptions::default()
    };
    let required = bench_with(&[&shm, &tcp], &ALL, only(Tcp));
    assert_eq!(required.path(&[]).await.unwrap().kind(), Tcp);
    let required = bench_with(&[&memory, &tcp], &ALL, only(Memory));
    let error = required.path(&[]).await.map(|path| path.kind()).unwrap_err();
    let offered = "tcp://here, shm://here".to_owned();
    assert_eq!(
        error,
        TransferError::NoPath {
            wanted: "memory".to_owned(),
            offered
        }
    );
    assert_eq!(
        error.to_string(),
        "no memory path to the peer, which offers tcp://here, shm://here"
    );
}

/// Three bulk hand-overs are in the middle of their batches; a small urgent one comes and is written next.
#[tokio::test(start_paused = true)]
async fn an_urgent_handover_overtakes_bulk_ones() {
    let tcp = Obedient::new(Tcp);
    let options = EndpointOptions {
        bytes_in_flight_max: 8 * GEOMETRY.block_bytes(),
        ..EndpointOptions::default()
    };
    let bench = bench_with(&[&tcp], &ALL, options);
    let bulk: Vec<_> = futures::future::join_all((1..=3).map(|_| bench.path_by(600, &[]))).await;
    let mut writing = futures::stream::FuturesUnordered::new();
    for (number, path) in bulk.into_iter().enumerate() {
        let path = path.unwrap();
        writing.push(async move {
            for _ in 0..4 {
                path.write(Epoch(number as u64 + 1), extents(8)).await.unwrap();
            }
        });
    }
    let urgent = bench.path_by(1, &[]).await.unwrap();
    let step = |writing: &mut futures::stream::FuturesUnordered<_>| {
        let _ = futures::StreamExt::next(writing).now_or_never();
    };
    step(&mut writing);
    tcp.0.turns.add_permits(1);
    step(&mut writing);
    assert_eq!(
        tcp.written(),
        [1],
        "the first batch is through, others wait at the gate"
    );
    let mut small = urgent.write(Epoch(99), extents(2));
    assert!(small.as_mut().now_or_never().is_none());
    tcp.0.turns.add_permits(2);
    step(&mut writing);
    small.await.unwrap();
    assert_eq!(
        tcp.written(),
        [1, 2, 99],
        "one batch was under way, two hand-overs waited longer"
    );
    tcp.0.turns.add_permits(100);
    while futures::StreamExt::next(&mut writing).await.is_some() {}
    assert_eq!(tcp.written().len(), 13);
    assert!(urgent.busy() <= SECOND);
}
