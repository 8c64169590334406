//! The sender's links: one per receiver's process, shared by all hand-overs to it. A link is a control line, with paths that
//! are opened when a hand-over needs one. A path can break without the line; without the line there is no path.
//!
//! `Links` owns the links and the paths; a link owns the list of its hand-overs, to bring them what the receiver says.

use super::sending::Sending;
use crate::control::{HandshakeError, Line, LineOptions, Spoken, greet, run};
use crate::session::{Header, SenderEvent, ToReceiver, ToSender};
use crate::transport::{ConnectError, Path, Transport};
use crate::{EndpointOptions, Identity, PathKind, Peer, TransferError};
use baton_node_runtime::{CancellationToken, Clock, Supervisor};
use baton_types::{Attempt, Epoch, Instance, Ticket};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

/// Peers that are connected to at once.
const LINKS_MAX: usize = 1024;

/// What links are made with.
pub(super) struct LinkParts {
    pub options: EndpointOptions,
    pub identity: Identity,
    pub transports: Vec<Arc<dyn Transport>>,
    pub clock: Clock,
    pub supervisor: Supervisor,
    pub tracker: TaskTracker,
    pub stop: CancellationToken,
}

/// Not yet, or how it went.
pub(super) type LinkState = Option<Result<Arc<Link>, TransferError>>;

pub(super) struct Links {
    parts: LinkParts,
    book: Mutex<HashMap<Instance, watch::Receiver<LinkState>>>,
    paths: Mutex<HashMap<Instance, Arc<PeerPaths>>>,
}

/// The open paths to one process. Locked while one is opened, so that all who need it share it.
#[derive(Default)]
struct PeerPaths(tokio::sync::Mutex<BTreeMap<PathKind, Arc<dyn Path>>>);

/// A control line to one process.
pub(super) struct Link {
    instance: Instance,
    line: Line,
    handovers: Mutex<Handovers>,
}

#[derive(Default)]
struct Handovers {
    living: HashMap<(Ticket, Attempt), Arc<Sending>>,
    /// The latest epoch that was granted here: what is later was never written under.
    latest: Option<Epoch>,
    lost: Option<TransferError>,
}

fn gone(reason: impl Into<String>) -> TransferError {
    TransferError::PeerGone { reason: reason.into() }
}

impl Links {
    pub(super) fn new(parts: LinkParts) -> Self {
        Self {
            parts,
            book: Mutex::default(),
            paths: Mutex::default(),
        }
    }

    /// The best path to a peer that there is a link to, of a kind that is not excluded: an open one, or one that is opened.
    ///
    /// # Errors
    /// Where there is none, or none that can be had in time.
    pub(super) async fn path(&self, peer: &Peer, excluding: &[PathKind]) -> Result<Arc<dyn Path>, TransferError> {
        let candidates: Vec<_> = self.rank(peer);
        let candidates = candidates
            .into_iter()
            .filter(|(transport, _)| !excluding.contains(&transport.path()));
        let paths = {
            // A link that has ended takes its paths along: none is opened behind its back.
            let book = self.book();
            if !book.contains_key(&peer.instance) {
                return Err(gone("the link to it has ended"));
            }
            let mut paths = self.paths.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(paths.entry(peer.instance).or_default())
        };
        let timeout = self.parts.options.connect_timeout;
        let opening = async {
            let mut open = paths.0.lock().await;
            self.first_path(peer, candidates.collect(), &mut open).await
        };
        let slow = |_| TransferError::PathFailed {
            path: "data".to_owned(),
            reason: format!("no path within {timeout:?}"),
        };
        tokio::select! {
            biased;
            () = self.parts.stop.cancelled() => Err(TransferError::ShuttingDown),
            opened = self.parts.clock.timeout(timeout, opening) => opened.map_err(slow)?,
        }
    }

    /// A path broke under a hand-over: nobody is given it any more. Resolves when it is closed, its tasks joined.
    pub(super) async fn path_failed(&self, peer: &Peer, path: &Arc<dyn Path>) {
        let paths = self
            .paths
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&peer.instance)
            .cloned();
        if let Some(paths) = paths {
            let mut open = paths.0.lock().await;
            if open.get(&path.kind()).is_some_and(|current| Arc::ptr_eq(current, path)) {
                open.remove(&path.kind());
            }
        }
        path.close().await;
    }

    /// The link to a process has ended: so do the paths to it.
    async fn close_paths(&self, instance: Instance) {
        let paths = self
            .paths
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&instance);
        if let Some(paths) = paths {
            for path in std::mem::take(&mut *paths.0.lock().await).into_values() {
                path.close().await;
            }
        }
    }

    fn book(&self) -> MutexGuard<'_, HashMap<Instance, watch::Receiver<LinkState>>> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The link to a peer, or the one that is being made.
    pub(super) fn to(self: &Arc<Self>, peer: &Peer) -> Result<watch::Receiver<LinkState>, TransferError> {
        let mut book = self.book();
        if self.parts.stop.is_cancelled() {
            return Err(TransferError::ShuttingDown);
        }
        if let Some(link) = book.get(&peer.instance) {
            return Ok(link.clone());
        }
        if book.len() >= LINKS_MAX {
            return Err(TransferError::TooMany {
                what: "peers",
                limit: LINKS_MAX,
            });
        }
        let (state, link) = watch::channel(None);
        book.insert(peer.instance, link.clone());
        let making = Arc::clone(self).make(peer.clone(), state);
        self.parts
            .supervisor
            .spawn("transfer-link", self.parts.tracker.track_future(making));
        Ok(link)
    }

    /// Ends every hand-over that is being made.
    pub(super) fn close(&self) {
        let links: Vec<LinkState> = self.book().values().map(|link| link.borrow().clone()).collect();
        for link in links.into_iter().flatten().flatten() {
            link.lose(&TransferError::ShuttingDown);
        }
    }

    async fn make(self: Arc<Self>, peer: Peer, state: watch::Sender<LinkState>) {
        let connected = tokio::select! {
            biased;
            () = self.parts.stop.cancelled() => Err(TransferError::ShuttingDown),
            connected = self.connect(&peer) => connected,
        };
        let stream = match connected {
            Ok(connected) => connected,
            Err(error) => {
                tracing::warn!(peer = %peer.node, %error, "cannot link to peer");
                self.book().remove(&peer.instance);
                state.send_replace(Some(Err(error)));
                return;
            }
        };
        let (me, keep_alive) = (self.parts.identity.instance, self.parts.options.keep_alive);
        let (line, running) = Line::new(LineOptions {
            me,
            peer: peer.instance,
            keep_alive,
        });
        tracing::info!(peer = %peer.node, "linked to peer");
        let link = Arc::new(Link {
            instance: peer.instance,
            line,
            handovers: Mutex::default(),
        });
        state.send_replace(Some(Ok(Arc::clone(&link))));
        let reason = tokio::select! {
            biased;
            () = self.parts.stop.cancelled() => None,
            reason = run(stream, running, self.parts.clock, |spoken| link.hear(spoken)) => Some(reason),
        };
        link.line.close();
        self.book().remove(&link.instance);
        let error = match reason {
            None => TransferError::ShuttingDown,
            Some(reason) => {
                tracing::info!(peer = %peer.node, reason, "link to peer ended");
                gone(reason)
            }
        };
        link.lose(&error);
        self.close_paths(link.instance).await;
    }

    async fn connect(&self, peer: &Peer) -> Result<TcpStream, TransferError> {
        let LinkParts {
            options,
            identity,
            clock,
            ..
        } = &self.parts;
        let offered = || TransferError::NoPath {
            offered: peer.addresses.join(", "),
        };
        let address = peer
            .address("control")
            .filter(|_| !self.rank(peer).is_empty())
            .ok_or_else(offered)?;
        let timeout = options.connect_timeout;
        let greeting = async {
            let mut stream = TcpStream::connect(address)
                .await
                .map_err(|error| gone(error.to_string()))?;
            stream.set_nodelay(true).map_err(|error| gone(error.to_string()))?;
            let greeted = greet(&mut stream, identity, peer.instance).await;
            greeted.map(|_| stream).map_err(|error| match error {
                HandshakeError::Refused(refused) => refused,
                HandshakeError::WrongInstance { .. } | HandshakeError::Broken(_) => gone(error.to_string()),
            })
        };
        let slow = |_| gone(format!("it did not shake hands within {timeout:?}"));
        clock.timeout(timeout, greeting).await.map_err(slow)?
    }

    /// The ways to a peer, best first: in the order in which it names them.
    fn rank<'a>(&'a self, peer: &'a Peer) -> Vec<(&'a Arc<dyn Transport>, &'a str)> {
        let ours = |address: &'a String| {
            let scheme = address.split("://").next()?;
            let transport = self
                .parts
                .transports
                .iter()
                .find(|transport| transport.path().name() == scheme)?;
            Some((transport, address.as_str()))
        };
        peer.addresses.iter().filter_map(ours).collect()
    }

    async fn first_path(
        &self,
        peer: &Peer,
        candidates: Vec<(&Arc<dyn Transport>, &str)>,
        open: &mut BTreeMap<PathKind, Arc<dyn Path>>,
    ) -> Result<Arc<dyn Path>, TransferError> {
        let mut first_error = None;
        for (transport, address) in candidates {
            if let Some(path) = open.get(&transport.path()) {
                return Ok(Arc::clone(path));
            }
            match transport.connect(peer, address).await {
                Ok(path) => {
                    tracing::info!(peer = %peer.node, path = %path.kind(), "path opened");
                    open.insert(path.kind(), Arc::clone(&path));
                    return Ok(path);
                }
                Err(error) => {
                    let kind = transport.path();
                    tracing::info!(peer = %peer.node, path = %kind, %error, "path cannot be had");
                    first_error.get_or_insert_with(|| connect_error(kind, error));
                }
            }
        }
        Err(first_error.unwrap_or_else(|| TransferError::NoPath {
            offered: peer.addresses.join(", "),
        }))
    }
}

fn connect_error(kind: PathKind, error: ConnectError) -> TransferError {
    match error {
        ConnectError::Refused { field, ours, theirs } => TransferError::Refused {
            field: field.to_owned(),
            ours,
            theirs,
        },
        ConnectError::WrongInstance { .. } => gone(error.to_string()),
        ConnectError::ShuttingDown => TransferError::ShuttingDown,
        ConnectError::BadAddress { .. }
        | ConnectError::Unreachable { .. }
        | ConnectError::Timeout { .. }
        | ConnectError::Handshake { .. } => TransferError::PathFailed {
            path: kind.to_string(),
            reason: error.to_string(),
        },
    }
}

impl Link {
    pub(super) fn tell(&self, header: &Header, message: &ToReceiver) {
        self.line.tell_receiver(header, message);
    }

    /// Ends the link and everything on it.
    pub(super) fn break_off(&self) {
        self.line.close();
    }

    fn handovers(&self) -> MutexGuard<'_, Handovers> {
        self.handovers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings what the receiver says to this hand-over from now on.
    pub(super) fn register(&self, sending: &Arc<Sending>) -> Result<(), TransferError> {
        let mut handovers = self.handovers();
        if let Some(lost) = &handovers.lost {
            return Err(lost.clone());
        }
        if handovers.living.contains_key(&sending.key()) {
            let reason = "this attempt is being made already".to_owned();
            return Err(TransferError::Protocol { reason });
        }
        handovers.living.insert(sending.key(), Arc::clone(sending));
        Ok(())
    }

    pub(super) fn deregister(&self, sending: &Arc<Sending>) {
        let mut handovers = self.handovers();
        if handovers
            .living
            .get(&sending.key())
            .is_some_and(|living| Arc::ptr_eq(living, sending))
        {
            handovers.living.remove(&sending.key());
        }
    }

    fn lose(&self, error: &TransferError) {
        let living = {
            let mut handovers = self.handovers();
            handovers.lost = Some(error.clone());
            std::mem::take(&mut handovers.living)
        };
        for sending in living.into_values() {
            sending.handle(SenderEvent::LinkLost { error: error.clone() });
        }
    }

    fn hear(&self, spoken: Spoken) {
        let (header, message) = match spoken {
            Spoken::ToSender(header, message) => (header, message),
            Spoken::ToReceiver(..) => {
                tracing::warn!("a receiver spoke as a sender");
                return self.break_off();
            }
        };
        let key = (header.ticket, header.attempt);
        let (sending, unheard_of) = {
            let mut handovers = self.handovers();
            let later = header.epoch > handovers.latest;
            if matches!(message, ToSender::Grant { .. }) && later {
                handovers.latest = header.epoch;
            }
            (handovers.living.get(&key).cloned(), later)
        };
        match (sending, &message) {
            (Some(sending), _) => sending.handle(SenderEvent::Message {
                epoch: header.epoch,
                message,
            }),
            // For a hand-over that was given up before its grant came: nothing was ever written under it.
            (None, ToSender::Grant { .. }) if unheard_of => self.tell(&header, &ToReceiver::Fenced { connections: 0 }),
            (
                None,
                ToSender::Grant { .. } | ToSender::Refused { .. } | ToSender::Committed | ToSender::Fence { .. },
            ) => {}
        }
    }
}
