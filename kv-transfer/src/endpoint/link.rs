//! The sender's links: one per receiver's process, shared by all hand-overs to it. A link is a control line, with paths that
//! are opened when a hand-over needs one. A path can break without the line; without the line there is no path.
//!
//! `Links` owns the links; a link owns its paths (`peer_paths`), and the list of its hand-overs, to bring them what the receiver says.

use super::peer_paths::{PathWish, PeerPaths, SharedPath, has_way, no_path};
use super::sending::Sending;
use super::stats::Counters;
use crate::control::{HandshakeError, Line, LineOptions, Spoken, greet, run};
use crate::session::{Header, SenderEvent, ToReceiver, ToSender};
use crate::transport::{ConnectError, Transport};
use crate::{EndpointOptions, Identity, PathKind, Peer, TransferError};
use baton_node_runtime::{CancellationToken, Clock, Supervisor};
use baton_types::{Attempt, Epoch, Instance, Ticket};
use std::collections::HashMap;
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
    pub counters: Arc<Counters>,
    pub clock: Clock,
    pub supervisor: Supervisor,
    pub tracker: TaskTracker,
    pub stop: CancellationToken,
}

/// Not yet, or how it went.
pub(super) type LinkState = Option<Result<Arc<Link>, TransferError>>;

pub(super) struct Links {
    parts: Arc<LinkParts>,
    book: Mutex<HashMap<Instance, watch::Receiver<LinkState>>>,
}

/// A control line to one process, and the paths to it.
pub(super) struct Link {
    instance: Instance,
    line: Line,
    paths: Arc<PeerPaths>,
    handovers: Mutex<Handovers>,
}

#[derive(Default)]
struct Handovers {
    living: HashMap<(Ticket, Attempt), Arc<Sending>>,
    /// The latest epoch that was granted here: what is later was never written under.
    latest: Option<Epoch>,
    lost: Option<TransferError>,
}

pub(super) fn gone(reason: impl Into<String>) -> TransferError {
    TransferError::PeerGone { reason: reason.into() }
}

impl Links {
    pub(super) fn new(parts: LinkParts) -> Self {
        Self {
            parts: Arc::new(parts),
            book: Mutex::default(),
        }
    }

    /// The best path to a peer that there is a link to, for about so many bytes, of a kind that is not excluded: an open one,
    /// or one that is opened. Its writes take their turn by that deadline.
    ///
    /// # Errors
    /// Where there is none, or none that can be had; each is tried for `connect_timeout`.
    pub(super) async fn path(
        &self,
        peer: &Peer,
        wish: PathWish,
        excluding: &[PathKind],
    ) -> Result<Arc<SharedPath>, TransferError> {
        let paths = {
            // A link that has ended takes its paths along: none is opened behind its back.
            let book = self.book();
            let link = book.get(&peer.instance).and_then(|link| link.borrow().clone());
            match link {
                Some(Ok(link)) => Arc::clone(&link.paths),
                Some(Err(_)) | None => return Err(gone("the link to it has ended")),
            }
        };
        tokio::select! {
            biased;
            () = self.parts.stop.cancelled() => Err(TransferError::ShuttingDown),
            path = paths.path(wish, excluding) => path,
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
            paths: PeerPaths::new(&peer, &self.parts),
            handovers: Mutex::default(),
        });
        state.send_replace(Some(Ok(Arc::clone(&link))));
        let reason = tokio::select! {
            biased;
            () = self.parts.stop.cancelled() => None,
            reason = run(stream, running, self.parts.clock, |spoken| link.hear(spoken)) => Some(reason),
            reason = link.paths.probe() => match reason {},
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
        link.paths.close().await;
    }

    async fn connect(&self, peer: &Peer) -> Result<TcpStream, TransferError> {
        let LinkParts {
            options,
            identity,
            clock,
            ..
        } = &*self.parts;
        let address = peer
            .address("control")
            .filter(|_| has_way(peer, &self.parts))
            .ok_or_else(|| no_path(peer, &self.parts))?;
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
}

pub(super) fn connect_error(kind: PathKind, error: ConnectError) -> TransferError {
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
