//! A path that breaks in the middle of a hand-over: it goes on over the next one and is committed whole; the broken path is
//! down for others, is probed, and comes back. Real transports; the break is made between endpoint and transport.

use super::{DestinationBlocks, Endpoint};
use crate::nodes::{GEOMETRY, Node, TestBlocks, TestPool, committed, identity, options, send, source, until};
use crate::transport::{ConnectError, Extent, Path, PathError, Transport};
use crate::{Arena, EndpointOptions, PathKind, Peer};
use PathKind::{Memory, Shm, Tcp};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::{Epoch, Instance, Ticket};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The first of these writes gets half through; from then on nothing does, until it is mended.
struct Break {
    kind: PathKind,
    at_write: usize,
    writes: AtomicUsize,
    mended: AtomicBool,
}

impl Break {
    fn is_down(&self) -> bool {
        self.writes.load(Ordering::SeqCst) >= self.at_write && !self.mended.load(Ordering::SeqCst)
    }
}

struct Fragile<T> {
    inner: T,
    how: Arc<Break>,
}

impl Transport for Fragile<Arc<dyn Transport>> {
    fn path(&self) -> PathKind {
        self.inner.path()
    }

    fn address(&self) -> String {
        self.inner.address()
    }

    fn reaches(&self, address: &str) -> bool {
        self.inner.reaches(address)
    }

    fn connect(&self, peer: &Peer, address: &str) -> BoxFuture<'_, Result<Arc<dyn Path>, ConnectError>> {
        let (peer, address, how) = (peer.clone(), address.to_owned(), Arc::clone(&self.how));
        async move {
            if how.is_down() {
                let kind = ErrorKind::HostUnreachable;
                return Err(ConnectError::Unreachable { address, kind });
            }
            let inner = self.inner.connect(&peer, &address).await?;
            let path: Arc<dyn Path> = Arc::new(Fragile { inner, how });
            Ok(path)
        }
        .boxed()
    }

    fn disconnect_instance(&self, instance: Instance) -> BoxFuture<'_, ()> {
        self.inner.disconnect_instance(instance)
    }

    fn shutdown(&self) -> BoxFuture<'_, ()> {
        self.inner.shutdown()
    }
}

impl Path for Fragile<Arc<dyn Path>> {
    fn kind(&self) -> PathKind {
        self.inner.kind()
    }

    fn connections(&self) -> u32 {
        self.inner.connections()
    }

    fn write(&self, epoch: Epoch, mut extents: Vec<Extent>) -> BoxFuture<'static, Result<(), PathError>> {
        let (inner, how) = (Arc::clone(&self.inner), Arc::clone(&self.how));
        async move {
            how.writes.fetch_add(1, Ordering::SeqCst);
            if !how.is_down() {
                return inner.write(epoch, extents).await;
            }
            extents.truncate(extents.len() / 2);
            inner.write(epoch, extents).await?;
            inner.close().await;
            let kind = ErrorKind::HostUnreachable;
            Err(PathError::Lost { kind })
        }
        .boxed()
    }

    fn fence(&self, epoch: Epoch) -> BoxFuture<'static, Result<(), PathError>> {
        self.inner.fence(epoch)
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.inner.close()
    }
}

fn paths(kinds: &[PathKind]) -> EndpointOptions {
    EndpointOptions {
        transports: kinds.to_vec(),
        ..options(Tcp)
    }
}

/// A node whose transport of one kind breaks so.
async fn fragile_node(kinds: &[PathKind], how: &Arc<Break>, blocks: usize) -> Node {
    let identity = identity(GEOMETRY);
    let arena = Arena::allocate(identity.geometry, blocks as u32, &mut |_, _| ()).unwrap();
    let (view, pool, supervisor) = (arena.view(), TestPool::new(blocks), Supervisor::new());
    let destination: Arc<dyn DestinationBlocks> = Arc::new(TestBlocks(Arc::clone(&pool)));
    let change = |inner: Arc<dyn Transport>| -> Arc<dyn Transport> {
        match inner.path() == how.kind {
            true => Arc::new(Fragile {
                inner,
                how: Arc::clone(how),
            }),
            false => inner,
        }
    };
    let endpoint = Endpoint::start_over(
        paths(kinds),
        identity,
        view.clone(),
        destination,
        Clock::new(),
        supervisor.clone(),
        change,
    );
    Node {
        endpoint: endpoint.await.unwrap(),
        pool,
        view,
        supervisor,
        blocks,
    }
}

const TOKENS: usize = 4 * 400;

async fn goes_on(first: PathKind, second: PathKind) {
    let how = Arc::new(Break {
        kind: first,
        at_write: 2,
        writes: AtomicUsize::new(0),
        mended: AtomicBool::new(false),
    });
    let kinds = [first, second];
    let (p, d) = (
        fragile_node(&kinds, &how, 1000).await,
        Node::with(paths(&kinds), identity(GEOMETRY), 1000).await,
    );
    let kv = source(&p, TOKENS, 50);
    let handover = async |name: u128| {
        let ticket = Ticket(name);
        let mut incoming = d.expect(ticket, TOKENS);
        let (sent, received) = tokio::join!(send(p.open(&d, ticket, TOKENS), &kv), committed(&mut incoming));
        received.check(&d, TOKENS, 50);
        (sent.unwrap(), received.fallbacks.clone())
    };
    let (report, at_receiver) = handover(1).await;
    assert_eq!(report.path, second);
    assert_eq!(report.fallbacks.len(), 1);
    assert_eq!((report.fallbacks[0].from, report.fallbacks[0].to), (first, second));
    // The sender sees its write fail, or hears from the receiver before that its connections closed.
    let reason = &report.fallbacks[0].reason;
    assert!(reason.contains("lost") || reason.contains("closed"), "{reason}");
    assert_eq!(at_receiver.len(), 1, "{at_receiver:?}");
    let of = |kind| p.endpoint.stats().paths.get(&kind).copied().unwrap_or_default();
    assert_eq!((of(first).down, of(first).open, of(first).fallbacks), (1, 0, 1));
    assert_eq!((of(second).down, of(second).open, of(second).sent), (0, 1, 1));

    let (report, _) = handover(2).await;
    assert_eq!(
        (report.path, report.fallbacks),
        (second, vec![]),
        "it is down for others too"
    );
    how.mended.store(true, Ordering::SeqCst);
    until("it is probed and open again", || of(first).open == 1).await;
    let (report, _) = handover(3).await;
    assert_eq!((report.path, report.fallbacks), (first, vec![]));
    drop(kv);
    p.end().await;
    d.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_memory_gives_way_to_tcp() {
    goes_on(Shm, Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_gives_way_to_tcp() {
    goes_on(Memory, Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_gives_way_to_shared_memory() {
    goes_on(Memory, Shm).await;
}
