//! The receiver's end of control connections: listens, shakes hands, and brings what senders say to the receiving driver.

use super::receiving::Receiving;
use crate::control::{Line, LineOptions, Spoken, answer, run};
use crate::{EndpointOptions, Identity};
use baton_node_runtime::{CancellationToken, Clock, Supervisor};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

/// Control connections at once. More wait in the system's backlog.
const CONNECTIONS_MAX: usize = 2048;
/// Rest after the system refused to accept, most likely for want of descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// What accepting needs.
pub(super) struct Acceptor {
    pub options: EndpointOptions,
    pub identity: Identity,
    pub receiving: Arc<Receiving>,
    pub clock: Clock,
    pub supervisor: Supervisor,
    pub tracker: TaskTracker,
    pub stop: CancellationToken,
}

impl Acceptor {
    pub(super) async fn run(self: Arc<Self>, listener: TcpListener) {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {}
            () = self.accept(&listener) => {}
        }
    }

    async fn accept(self: &Arc<Self>, listener: &TcpListener) {
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            // Taken before accepting, so that what is too much waits in the system's backlog.
            let Ok(permit) = Arc::clone(&connections).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, from)) => {
                    let serving = Arc::clone(self).serve(stream, from, permit);
                    self.supervisor
                        .spawn("transfer-control", self.tracker.track_future(serving));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a control connection");
                    self.clock.sleep(ACCEPT_REST).await;
                }
            }
        }
    }

    async fn serve(self: Arc<Self>, mut stream: TcpStream, from: SocketAddr, _permit: OwnedSemaphorePermit) {
        let timeout = self.options.connect_timeout;
        let shaking = async {
            // Small messages must not wait for each other; without the option they are late, not lost.
            let _ = stream.set_nodelay(true);
            answer(&mut stream, &self.identity, |instance| {
                self.receiving.clear_way_for(instance, timeout / 2)
            })
            .await
        };
        let shaken = tokio::select! {
            biased;
            () = self.stop.cancelled() => return,
            shaken = self.clock.timeout(timeout, shaking) => shaken,
        };
        let remote = match shaken {
            Ok(Ok(remote)) => remote,
            Ok(Err(error)) => return tracing::warn!(%from, %error, "control connection refused"),
            Err(_) => return tracing::warn!(%from, ?timeout, "control connection did not shake hands"),
        };
        let (me, keep_alive) = (self.identity.instance, self.options.keep_alive);
        let (line, running) = Line::new(LineOptions {
            me,
            peer: remote.instance,
            keep_alive,
        });
        let Some(number) = self.receiving.line_opened(remote.instance, line.clone()) else {
            return;
        };
        tracing::info!(peer = %remote.node, instance = %remote.instance, %from, "sender connected");
        let heard = |spoken| match spoken {
            Spoken::ToReceiver(header, message) => self.receiving.hear(remote.instance, number, header, message),
            Spoken::ToSender(..) => {
                tracing::warn!(peer = %remote.node, "a sender spoke as a receiver");
                line.close();
            }
        };
        let reason = tokio::select! {
            biased;
            // What becomes of this sender's hand-overs is for the endpoint's end to say.
            () = self.stop.cancelled() => return line.close(),
            reason = run(stream, running, self.clock, heard) => reason,
        };
        tracing::info!(peer = %remote.node, reason, "sender disconnected");
        self.receiving.line_lost(remote.instance, number);
    }
}
