//! The endpoint: one per process. It owns the transports, the listener, both drivers and the task that watches the time.

use super::accept::Acceptor;
use super::digest::{Comparison, Digester};
use super::landing::GrantBook;
use super::link::{LinkParts, Links};
use super::receiving::{Receiving, ReceivingParts};
use super::sending::{Sending, SendingParts};
use super::stats::Counters;
use super::transports::start_transports;
use super::{DestinationBlocks, ExpectSpec, Incoming, Outgoing, OutgoingSpec, TransferStats};
use crate::session::{Limits, SenderEvent};
use crate::transport::{Local, Transport};
use crate::{EndpointOptions, ExpectError, Identity, PathKind, Peer, StartError, TransferError};
use baton_node_runtime::{CancellationToken, Clock, Supervisor};
use baton_types::{ArenaView, Epoch, Instance};
use futures::future::join_all;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::task::TaskTracker;

/// An ask that waited this long is served before all that came later.
const AGEING: Duration = Duration::from_secs(5);

/// One process's end of all its hand-overs. Cheap to clone; when the last clone is dropped it ends as by
/// [`Endpoint::shutdown`], unawaited.
#[derive(Clone)]
pub struct Endpoint(Arc<Service>);

struct Service {
    options: EndpointOptions,
    identity: Identity,
    peer: Peer,
    receiving: Arc<Receiving>,
    links: Arc<Links>,
    counters: Arc<Counters>,
    digester: Digester,
    clock: Clock,
    supervisor: Supervisor,
    tracker: TaskTracker,
    end: CancellationToken,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.tracker.close();
        self.end.cancel();
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("peer", &self.0.peer)
            .finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Listens, starts its tasks. Control connections come to `options.listen`, tcp data to the port after it; where that
    /// port is 0, both are the system's choice.
    ///
    /// # Errors
    /// An option out of range, an address that cannot be had, an arena of another shape than the identity says.
    pub async fn start(
        options: EndpointOptions,
        identity: Identity,
        arena: ArenaView,
        blocks: Arc<dyn DestinationBlocks>,
        clock: Clock,
        supervisor: Supervisor,
    ) -> Result<Self, StartError> {
        let as_it_is = |transport| transport;
        Self::start_over(options, identity, arena, blocks, clock, supervisor, as_it_is).await
    }

    /// As `start`, over transports that were changed: tests break them.
    pub(super) async fn start_over(
        options: EndpointOptions,
        identity: Identity,
        arena: ArenaView,
        blocks: Arc<dyn DestinationBlocks>,
        clock: Clock,
        supervisor: Supervisor,
        change: impl Fn(Arc<dyn Transport>) -> Arc<dyn Transport>,
    ) -> Result<Self, StartError> {
        options.validate()?;
        identity.geometry.check_same(arena.geometry())?;
        let counters = Arc::new(Counters::default());
        let receiving = Arc::new(Receiving::new(ReceivingParts {
            limits: limits(&options, &arena),
            arena_blocks: arena.blocks(),
            geometry: *arena.geometry(),
            blocks,
            counters: Arc::clone(&counters),
            clock,
        }));
        let listen = |source| StartError::Listen {
            address: options.listen,
            source,
        };
        let listener = TcpListener::bind(options.listen).await.map_err(listen)?;
        let bound = listener.local_addr().map_err(listen)?;
        let local = |path| Local {
            identity: identity.clone(),
            arena: arena.clone(),
            landing: Arc::new(GrantBook {
                receiving: Arc::clone(&receiving),
                path,
            }),
            clock,
            supervisor: supervisor.clone(),
        };
        let transports = start_transports(&options, local).await?;
        let transports: Vec<Arc<dyn Transport>> = transports.into_iter().map(change).collect();
        let mut addresses = vec![control_address(&options, bound)];
        addresses.extend(transports.iter().map(|transport| transport.address()));
        let peer = Peer {
            node: identity.node.clone(),
            instance: identity.instance,
            addresses,
        };
        let (tracker, end, stop) = (TaskTracker::new(), CancellationToken::new(), CancellationToken::new());
        let links = Arc::new(Links::new(LinkParts {
            options: options.clone(),
            identity: identity.clone(),
            transports: transports.clone(),
            counters: Arc::clone(&counters),
            clock,
            supervisor: supervisor.clone(),
            tracker: tracker.clone(),
            stop: stop.clone(),
        }));
        let acceptor = Arc::new(Acceptor {
            options: options.clone(),
            identity: identity.clone(),
            receiving: Arc::clone(&receiving),
            clock,
            supervisor: supervisor.clone(),
            tracker: tracker.clone(),
            stop: stop.clone(),
        });
        supervisor.spawn("transfer-accept", tracker.track_future(acceptor.run(listener)));
        let digester = Digester {
            arena,
            supervisor: supervisor.clone(),
        };
        let keeper = Keeper {
            receiving: Arc::clone(&receiving),
            digester: digester.clone(),
            links: Arc::clone(&links),
            transports,
            fence_timeout: options.fence_timeout,
            clock,
            supervisor: supervisor.clone(),
            tracker: tracker.clone(),
            end: end.clone(),
            stop,
        };
        supervisor.spawn("transfer-keeper", tracker.track_future(keeper.run()));
        tracing::info!(addresses = ?peer.addresses, "ready for hand-overs");
        let service = Service {
            options,
            identity,
            peer,
            receiving,
            links,
            counters,
            digester,
            clock,
            supervisor,
            tracker,
            end,
        };
        Ok(Self(Arc::new(service)))
    }

    /// How peers reach this endpoint.
    pub fn peer(&self) -> Peer {
        self.0.peer.clone()
    }

    /// Expects a hand-over. Nothing is set aside before its sender asks. Fewer blocks than the context needs are raised to
    /// that.
    ///
    /// # Errors
    /// A ticket in use, a hand-over larger than the arena, too many of them, no time left, or the end of this endpoint.
    pub fn expect(&self, spec: ExpectSpec) -> Result<Incoming, ExpectError> {
        self.0.receiving.expect(spec)
    }

    /// Begins a hand-over to a peer: connects in the background, where there is no link yet. Failures appear in the handle's
    /// calls.
    pub fn open(&self, spec: OutgoingSpec) -> Outgoing {
        let service = &self.0;
        let sending = Arc::new(Sending::new(SendingParts {
            spec,
            geometry: service.identity.geometry,
            fence_timeout: service.options.fence_timeout,
            answer_timeout: service.options.progress_timeout,
            digester: service.options.digest.then(|| service.digester.clone()),
            clock: service.clock,
            counters: Arc::clone(&service.counters),
        }));
        let limit = service.options.handovers_max;
        let before = service.counters.sending_begins();
        let count = Counted(Arc::clone(&service.counters));
        let refused = match before {
            n if n >= limit => Some(TransferError::TooMany {
                what: "hand-overs",
                limit,
            }),
            _ if service.end.is_cancelled() => Some(TransferError::ShuttingDown),
            _ => None,
        };
        match refused {
            Some(error) => sending.handle(SenderEvent::ConnectFailed { error }),
            None => {
                let (running, links) = (Arc::clone(&sending), Arc::clone(&service.links));
                let run = async move {
                    let _count = count;
                    running.run(links).await;
                };
                service
                    .supervisor
                    .spawn("transfer-send", service.tracker.track_future(run));
            }
        }
        Outgoing::new(sending)
    }

    /// What the hand-overs of this process share, for tests that break it under them.
    #[cfg(test)]
    pub(super) fn links(&self) -> &Links {
        &self.0.links
    }

    /// Blocks became free: serve the asks that wait. May be called from within the block pool.
    pub fn room_changed(&self) {
        self.0.receiving.room_changed();
    }

    /// What it does now and has done.
    pub fn stats(&self) -> TransferStats {
        self.0.counters.snapshot()
    }

    /// Ends every hand-over with an explicit failure, closes every connection and joins every task. Blocks in quarantine are
    /// released: nothing can write them any more.
    pub async fn shutdown(&self) {
        self.0.tracker.close();
        self.0.end.cancel();
        self.0.tracker.wait().await;
    }
}

fn limits(options: &EndpointOptions, arena: &ArenaView) -> Limits {
    // A share of at most 1 of a count of blocks fits the count's type; the fraction is dropped.
    let peer_blocks = (arena.blocks() as f64 * f64::from(options.quarantine_share)) as usize;
    Limits {
        layers: arena.geometry().layers,
        block_tokens: arena.geometry().block_tokens,
        paths: options.transports.clone(),
        peer_blocks,
        lease: options.reservation_lease,
        fence_timeout: options.fence_timeout,
        ageing: AGEING,
        handovers: options.handovers_max,
        remembered: options.handovers_max,
    }
}

fn control_address(options: &EndpointOptions, bound: SocketAddr) -> String {
    match &options.advertise {
        Some(host) if host.contains(':') && !host.starts_with('[') => format!("control://[{host}]:{}", bound.port()),
        Some(host) => format!("control://{host}:{}", bound.port()),
        None => format!("control://{bound}"),
    }
}

/// One hand-over being made, for as long as its task lives.
struct Counted(Arc<Counters>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.sending_ends();
    }
}

/// The task that watches the receiver's time, destroys connections for it, and ends everything at last.
struct Keeper {
    receiving: Arc<Receiving>,
    digester: Digester,
    links: Arc<Links>,
    transports: Vec<Arc<dyn Transport>>,
    /// How long destroying connections may take before it is said aloud.
    fence_timeout: Duration,
    clock: Clock,
    supervisor: Supervisor,
    tracker: TaskTracker,
    /// The endpoint is to end.
    end: CancellationToken,
    /// Ends the connections, once the hand-overs have ended.
    stop: CancellationToken,
}

impl Keeper {
    async fn run(self) {
        loop {
            let (errands, next) = self.receiving.due();
            for (instance, path, through) in errands.disconnects {
                self.disconnect(instance, path, through);
            }
            for comparison in errands.comparisons {
                self.compare(comparison);
            }
            tokio::select! {
                biased;
                () = self.end.cancelled() => break,
                () = self.receiving.woken() => {}
                () = self.clock.sleep_until(next) => {}
            }
        }
        // The machines hear of the end before they would see it as a failure of connections.
        self.links.close();
        self.receiving.close();
        self.stop.cancel();
        join_all(self.transports.iter().map(|transport| transport.shutdown())).await;
        self.receiving.nothing_writes();
    }

    /// One kind of path at a time: the proof of one never waits for another's.
    fn disconnect(&self, instance: Instance, path: PathKind, through: Epoch) {
        let receiving = Arc::clone(&self.receiving);
        let transport = self
            .transports
            .iter()
            .find(|transport| transport.path() == path)
            .cloned();
        let (clock, patience) = (self.clock, self.fence_timeout);
        let disconnecting = async move {
            if let Some(transport) = transport {
                let mut proof = transport.disconnect_instance(instance);
                if clock.timeout(patience, &mut proof).await.is_err() {
                    receiving.await_silent(instance, path, proof).await;
                }
            }
            receiving.disconnect_done(instance, path, through);
        };
        self.supervisor
            .spawn("transfer-disconnect", self.tracker.track_future(disconnecting));
    }

    fn compare(&self, comparison: Comparison) {
        let (digester, receiving) = (self.digester.clone(), Arc::clone(&self.receiving));
        let comparing = async move {
            let epoch = comparison.epoch;
            let matches = digester.compare(comparison).await;
            receiving.verified(epoch, matches);
        };
        self.supervisor
            .spawn("transfer-compare", self.tracker.track_future(comparing));
    }
}
