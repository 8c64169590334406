//! The embedded store as a service: who may touch its state, and the task that ends leases.
//!
//! The state stands behind one mutex that is held for one request at a time and never across an await. Whoever changes it
//! tells the new revision to the watches.

use super::history::Retention;
use super::kv_service::KvService;
use super::lease_service::LeaseService;
use super::state::State;
use super::watch_service::WatchService;
use baton_node_runtime::{CancellationToken, Clock, Moment, Supervisor};
use etcd_client::proto::{PbKvServer, PbLeaseServer, PbResponseHeader, PbWatchServer};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tonic::transport::server::TcpIncoming;

/// Stands in every reply of an embedded store as the etcd cluster's id, so that a coordinator knows what it talks to.
/// The bytes of "baton-em".
pub const EMBEDDED_CLUSTER_ID: u64 = u64::from_be_bytes(*b"baton-em");

/// A client that answers no ping for this long is gone, and its streams with it.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// A store inside this process. Serves until the supervisor shuts down.
pub struct EmbeddedStore {
    address: SocketAddr,
}

impl EmbeddedStore {
    /// Serves on `listener` until the supervisor shuts down.
    ///
    /// # Errors
    /// Where the listener has no address.
    pub async fn serve(listener: TcpListener, clock: Clock, supervisor: Supervisor) -> std::io::Result<Self> {
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::new(clock, supervisor));
        let expiring = Arc::clone(&shared);
        shared
            .supervisor
            .spawn("embedded-store-leases", async move { expiring.expire_leases().await });
        let serving = Arc::clone(&shared);
        shared.supervisor.spawn("embedded-store", async move {
            let shutdown = serving.shutdown.clone();
            let server = tonic::transport::Server::builder()
                .http2_keepalive_interval(Some(PING_INTERVAL))
                .http2_keepalive_timeout(Some(PING_TIMEOUT))
                .add_service(PbKvServer::new(KvService(Arc::clone(&serving))))
                .add_service(PbLeaseServer::new(LeaseService(Arc::clone(&serving))))
                .add_service(PbWatchServer::new(WatchService(Arc::clone(&serving))));
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            if let Err(error) = server
                .serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned())
                .await
            {
                serving
                    .supervisor
                    .fail(format!("the embedded store on {address} failed: {error}"));
            }
        });
        tracing::info!(%address, "embedded store listens");
        Ok(Self { address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// What the services share.
pub(super) struct Shared {
    pub(super) clock: Clock,
    pub(super) supervisor: Supervisor,
    pub(super) shutdown: CancellationToken,
    pub(super) revision: watch::Sender<i64>,
    state: Mutex<State>,
    leases_changed: Notify,
}

impl Shared {
    fn new(clock: Clock, supervisor: Supervisor) -> Self {
        let state = State::new(Retention::default());
        Self {
            clock,
            shutdown: supervisor.shutdown_token(),
            supervisor,
            revision: watch::Sender::new(state.history().revision()),
            state: Mutex::new(state),
            leases_changed: Notify::new(),
        }
    }

    /// Runs one request. Leases that have run out end before it; watches learn of what it changed. Gives the header for
    /// its reply.
    pub(super) fn with<T>(&self, request: impl FnOnce(&mut State, Moment) -> T) -> (T, PbResponseHeader) {
        let now = self.clock.now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.expire(now);
        let answer = request(&mut state, now);
        let revision = state.history().revision();
        self.revision
            .send_if_modified(|known| std::mem::replace(known, revision) != revision);
        (answer, header(revision))
    }

    /// A lease that ends sooner than the others may have come.
    pub(super) fn wake_lease_task(&self) {
        self.leases_changed.notify_one();
    }

    async fn expire_leases(&self) {
        loop {
            let (next, _) = self.with(|state, _| state.next_expiry());
            let due = async {
                match next {
                    Some(moment) => self.clock.sleep_until(moment).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                () = self.leases_changed.notified() => {}
                () = due => {}
            }
        }
    }
}

pub(super) fn header(revision: i64) -> PbResponseHeader {
    PbResponseHeader {
        cluster_id: EMBEDDED_CLUSTER_ID,
        member_id: 1,
        revision,
        raft_term: 1,
    }
}
