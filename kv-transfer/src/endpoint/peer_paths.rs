//! The open paths to one peer: opens what `paths` chooses, closes what failed, probes it, and measures what is written. Shared
//! by all hand-overs to that peer; lives as long as the control line to it.

use super::OutgoingSpec;
use super::busy::Busy;
use super::gate::Gate;
use super::link::{LinkParts, connect_error, gone};
use super::paths::{Choice, Paths, Report, Sample};
use crate::transport::{Extent, Path, PathError, Transport};
use crate::{PathKind, Peer, TransferError};
use baton_node_runtime::Moment;
use baton_types::{Epoch, KvGeometry};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

pub(super) struct PeerPaths {
    peer: Peer,
    parts: Arc<LinkParts>,
    started: Moment,
    ways: BTreeMap<PathKind, (Arc<dyn Transport>, String)>,
    state: Mutex<State>,
    /// An opening has ended.
    opened: Notify,
    /// A way went down, and so will be due.
    down: Notify,
}

struct State {
    machine: Paths,
    open: BTreeMap<PathKind, Arc<OpenPath>>,
    /// Why each could not be opened last.
    errors: BTreeMap<PathKind, TransferError>,
    closed: bool,
}

/// A path that is open, shared by all hand-overs.
struct OpenPath {
    path: Arc<dyn Path>,
    /// Which opening of its kind.
    opening: u64,
    gate: Arc<Gate>,
}

/// What a hand-over wants of a path.
#[derive(Debug, Clone, Copy)]
pub(super) struct PathWish {
    /// About so many will be written.
    pub bytes: u64,
    /// When it must have ended: the earlier, the sooner its writes have their turn.
    pub deadline: Moment,
}

impl PathWish {
    pub(super) fn new(spec: &OutgoingSpec, geometry: &KvGeometry, now: Moment) -> Self {
        Self {
            bytes: (geometry.blocks_for(spec.context_tokens) * geometry.block_bytes()) as u64,
            deadline: now + spec.deadline,
        }
    }
}

/// One hand-over's hold on a path that it shares with others. Its writes wait for their turn at the gate; one that fails
/// because the path broke takes the path down for all, and so does closing it.
pub(super) struct SharedPath {
    open: Arc<OpenPath>,
    of: Arc<PeerPaths>,
    deadline: Moment,
    busy: Arc<Busy>,
}

impl PeerPaths {
    pub(super) fn new(peer: &Peer, parts: &Arc<LinkParts>) -> Arc<Self> {
        let ways = ways(peer, parts);
        let machine = Paths::new(ways.keys().copied());
        Arc::new(Self {
            peer: peer.clone(),
            parts: Arc::clone(parts),
            started: parts.clock.now(),
            ways,
            state: Mutex::new(State {
                machine,
                open: BTreeMap::new(),
                errors: BTreeMap::new(),
                closed: false,
            }),
            opened: Notify::new(),
            down: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.parts.clock.elapsed(self.started)
    }

    /// Changes how the ways stand, and tells those who watch.
    fn change<T>(&self, change: impl FnOnce(&mut State, Duration) -> T) -> T {
        let now = self.now();
        let mut state = self.lock();
        let before: Vec<Report> = state.machine.report().collect();
        let result = change(&mut state, now);
        for (before, after) in before.iter().zip(state.machine.report()) {
            self.parts.counters.path_stands(*before, after);
        }
        result
    }

    /// The best path for about so many bytes, of a kind that is not excluded: an open one, or one that is opened.
    ///
    /// # Errors
    /// Where there is none, or none that can be had. Each opening is bounded by `connect_timeout`.
    pub(super) async fn path(
        self: &Arc<Self>,
        wish: PathWish,
        excluding: &[PathKind],
    ) -> Result<Arc<SharedPath>, TransferError> {
        let mut excluding = excluding.to_vec();
        let mut first_error = None;
        loop {
            let (choice, path) = self.change(|state, now| {
                if state.closed {
                    return (Choice::Nothing, Err(gone("the link to it has ended")));
                }
                let choice = state.machine.choose(now, wish.bytes, &excluding);
                let open = match choice {
                    Choice::Use(kind) => state.open.get(&kind).cloned(),
                    Choice::Open(_) | Choice::Wait(_) | Choice::Nothing => None,
                };
                (choice, open.ok_or_else(|| self.no_path()))
            });
            let kind = match choice {
                Choice::Use(_) => {
                    let shared = |open| SharedPath {
                        open,
                        of: Arc::clone(self),
                        deadline: wish.deadline,
                        busy: Arc::default(),
                    };
                    return path.map(shared).map(Arc::new);
                }
                Choice::Nothing => return Err(first_error.or(path.err()).unwrap_or_else(|| self.no_path())),
                Choice::Open(kind) => {
                    // In a task of its own: whoever wants the path may stop waiting, others wait for it too.
                    self.spawn_open(kind);
                    kind
                }
                Choice::Wait(kind) => kind,
            };
            self.wait_for(kind).await;
            let state = self.lock();
            if !state.open.contains_key(&kind) {
                excluding.push(kind);
                first_error = first_error.or_else(|| state.errors.get(&kind).cloned());
            }
        }
    }

    async fn wait_for(&self, kind: PathKind) {
        loop {
            let opened = self.opened.notified();
            tokio::pin!(opened);
            opened.as_mut().enable();
            {
                let state = self.lock();
                if state.closed || !state.machine.is_opening(kind) {
                    return;
                }
            }
            opened.await;
        }
    }

    fn no_path(&self) -> TransferError {
        no_path(&self.peer, &self.parts)
    }

    fn spawn_open(self: &Arc<Self>, kind: PathKind) {
        let opening = Arc::clone(self).open(kind);
        self.parts
            .supervisor
            .spawn("transfer-path", self.parts.tracker.track_future(opening));
    }

    async fn open(self: Arc<Self>, kind: PathKind) {
        let Some((transport, address)) = self.ways.get(&kind) else {
            return;
        };
        let timeout = self.parts.options.connect_timeout;
        let connecting = self
            .parts
            .clock
            .timeout(timeout, transport.connect(&self.peer, address));
        let connected = tokio::select! {
            biased;
            () = self.parts.stop.cancelled() => Err(TransferError::ShuttingDown),
            connected = connecting => match connected {
                Ok(connected) => connected.map_err(|error| connect_error(kind, error)),
                Err(_) => Err(TransferError::PathFailed {
                    path: kind.to_string(),
                    reason: format!("it was not there within {timeout:?}"),
                }),
            },
        };
        let unwanted = match connected {
            Ok(path) => self.keep(kind, path),
            Err(error) => {
                self.cannot_open(kind, error);
                None
            }
        };
        self.opened.notify_waiters();
        if let Some(path) = unwanted {
            path.close().await;
        }
    }

    fn cannot_open(&self, kind: PathKind, error: TransferError) {
        let again = self.change(|state, now| {
            state.errors.insert(kind, error.clone());
            (!state.closed).then(|| state.machine.open_failed(now, kind).saturating_sub(now))
        });
        if let Some(again) = again {
            tracing::info!(peer = %self.peer.node, path = %kind, %error, again_in = ?again, "path cannot be had");
            self.down.notify_one();
        }
    }

    /// Gives the path back where nobody will use it any more.
    fn keep(&self, kind: PathKind, path: Arc<dyn Path>) -> Option<Arc<dyn Path>> {
        let unwanted = self.change(|state, _| {
            if state.closed {
                return Some(path);
            }
            let open = OpenPath {
                path,
                opening: state.machine.opened(kind),
                gate: Gate::new(self.parts.options.bytes_in_flight_max, self.parts.clock),
            };
            state.open.insert(kind, Arc::new(open));
            None
        });
        if unwanted.is_none() {
            tracing::info!(peer = %self.peer.node, path = %kind, "path opened");
        }
        unwanted
    }

    /// Probes what is due, for as long as the control line lives.
    pub(super) async fn probe(self: &Arc<Self>) -> Infallible {
        loop {
            let (due, next) = self.change(|state, now| (state.machine.due(now), state.machine.next_due()));
            for kind in due {
                tracing::debug!(peer = %self.peer.node, path = %kind, "probing a path that is down");
                self.spawn_open(kind);
            }
            tokio::select! {
                () = self.down.notified() => {}
                () = self.parts.clock.sleep_until(self.started + next) => {}
            }
        }
    }

    /// The control line has ended: so do the paths. Resolves when they are closed.
    pub(super) async fn close(&self) {
        let open = self.change(|state, _| {
            state.closed = true;
            state.machine.forget();
            std::mem::take(&mut state.open)
        });
        self.opened.notify_waiters();
        for open in open.into_values() {
            open.path.close().await;
        }
    }
}

/// The kinds that can lead to that peer at all, with the address to take.
fn ways(peer: &Peer, parts: &LinkParts) -> BTreeMap<PathKind, (Arc<dyn Transport>, String)> {
    let mut ways = BTreeMap::new();
    let required = parts.options.require_path;
    for transport in &parts.transports {
        let kind = transport.path();
        if required.is_some_and(|required| required != kind) {
            continue;
        }
        let ours = |address: &&String| {
            let scheme = address.split_once("://").map(|(scheme, _)| scheme);
            scheme == Some(kind.name()) && transport.reaches(address)
        };
        if let Some(address) = peer.addresses.iter().find(ours) {
            ways.entry(kind)
                .or_insert_with(|| (Arc::clone(transport), address.clone()));
        }
    }
    ways
}

/// Why no path leads to a peer, or none that may be taken.
pub(super) fn no_path(peer: &Peer, parts: &LinkParts) -> TransferError {
    let wanted = match parts.options.require_path {
        Some(path) => path.name().to_owned(),
        None => {
            let kinds = parts.transports.iter().map(|transport| transport.path().name());
            kinds.collect::<Vec<_>>().join(" or ")
        }
    };
    let data = |address: &&String| !address.starts_with("control://");
    let offered: Vec<&str> = peer.addresses.iter().filter(data).map(String::as_str).collect();
    TransferError::NoPath {
        wanted,
        offered: offered.join(", "),
    }
}

/// Whether any path can lead to a peer.
pub(super) fn has_way(peer: &Peer, parts: &LinkParts) -> bool {
    !ways(peer, parts).is_empty()
}

impl SharedPath {
    /// How long the path was at work for this hand-over.
    pub(super) fn busy(&self) -> Duration {
        self.busy.total(self.of.parts.clock.now())
    }
}

impl OpenPath {
    /// A write was applied: the next choice knows.
    fn learn(&self, of: &PeerPaths, sample: Sample) {
        let (kind, now) = (self.path.kind(), of.now());
        let mut state = of.lock();
        state.machine.applied(now, kind, self.opening, sample);
        let measured = state.machine.measured(kind);
        drop(state);
        if let Some(bytes_per_second) = measured {
            of.parts.counters.path_measured(kind, bytes_per_second);
        }
    }

    /// It is down for all hand-overs from now on.
    fn broke(&self, of: &PeerPaths, reason: &str) {
        let kind = self.path.kind();
        let again = of.change(|state, now| {
            let until = state.machine.broke(now, kind, self.opening)?;
            state.open.remove(&kind);
            Some(until.saturating_sub(now))
        });
        if let Some(again) = again {
            tracing::warn!(peer = %of.peer.node, path = %kind, reason, again_in = ?again, "path failed: it is down");
            of.down.notify_one();
        }
    }
}

impl Path for SharedPath {
    fn kind(&self) -> PathKind {
        self.open.path.kind()
    }

    fn connections(&self) -> u32 {
        self.open.path.connections()
    }

    fn write(&self, epoch: Epoch, extents: Vec<Extent>) -> BoxFuture<'static, Result<(), PathError>> {
        let (open, of, deadline) = (Arc::clone(&self.open), Arc::clone(&self.of), self.deadline);
        let busy = Arc::clone(&self.busy);
        let layer_bytes = of.parts.identity.geometry.layer_bytes() as u64;
        let bytes = extents
            .iter()
            .map(|extent| layer_bytes * extent.layers.len() as u64)
            .sum();
        async move {
            let room = open.gate.room(deadline, bytes).await;
            let began = of.parts.clock.now();
            busy.begins(began);
            let written = open.path.write(epoch, extents).await;
            let sample = written.is_ok().then(|| room.applied());
            busy.ends(began, sample.map(|sample| sample.took), of.parts.clock.now());
            match (&written, sample) {
                (Ok(()), Some(sample)) => open.learn(&of, sample),
                (Err(error), _) if error.is_retryable() => open.broke(&of, &error.to_string()),
                (Ok(()) | Err(_), _) => {}
            }
            written
        }
        .boxed()
    }

    fn fence(&self, epoch: Epoch) -> BoxFuture<'static, Result<(), PathError>> {
        self.open.path.fence(epoch)
    }

    /// Closes it for all.
    fn close(&self) -> BoxFuture<'static, ()> {
        let (open, of) = (Arc::clone(&self.open), Arc::clone(&self.of));
        async move {
            open.broke(&of, "a hand-over could not go on over it");
            open.path.close().await;
        }
        .boxed()
    }
}
