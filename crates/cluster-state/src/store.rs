//! The connection to a store: every call goes through [`Store::call`], which bounds it in time, tells errors apart and
//! builds the connection anew after a failure, so that no state of a broken one outlives an outage.

use crate::embedded::EMBEDDED_CLUSTER_ID;
use crate::keys::embedded_owner;
use crate::keys::store_id::{self, StoreId};
use crate::{ClaimError, StoreError, StoreOptions};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::Instance;
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Error, Identity, ResponseHeader, TlsOptions, Txn, TxnOp,
    TxnOpResponse,
};
use std::future::Future;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tonic::Code;

/// A call that takes longer counts as unanswered.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// A store that gives no answer is tried for so many times as long as one that nobody is at: an etcd that starts beside us, on a
/// busy disk, takes its time.
const PATIENCE: u32 = 5;
/// Between attempts to connect at start.
const CONNECT_PAUSE: Duration = Duration::from_millis(200);
/// etcd takes pings closer than 5 s for an attack.
const PING_INTERVAL: Duration = Duration::from_secs(6);
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// A connection to the store. Clones share it.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    options: StoreOptions,
    connect: ConnectOptions,
    clock: Clock,
    supervisor: Supervisor,
    client: Mutex<Option<Client>>,
    store_id: Mutex<StoreId>,
    reachable: AtomicBool,
}

/// Which data a store holds, and how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DataState {
    pub(crate) store_id: StoreId,
    pub(crate) revision: i64,
    embedded: bool,
}

impl Store {
    /// Connects, trying for `connect_timeout`, and longer where the store is there and slow. Later outages are retried for ever
    /// by whatever uses the store.
    ///
    /// # Errors
    /// Where nobody answers in time, access is refused, or options do not fit together.
    pub async fn connect(options: StoreOptions, clock: Clock, supervisor: Supervisor) -> Result<Self, StoreError> {
        if options.cluster.is_empty() || options.cluster.contains('/') {
            return Err(StoreError::InvalidOption {
                option: "--cluster",
                problem: "must not be empty or hold a `/`",
            });
        }
        let connect = connect_options(&options)?;
        let begun = clock.now();
        let (unreachable, silent) = (options.connect_timeout, options.connect_timeout * PATIENCE);
        let store = Self(Arc::new(Inner {
            options,
            connect,
            clock,
            supervisor,
            client: Mutex::new(None),
            store_id: Mutex::new(StoreId(0)),
            reachable: AtomicBool::new(false),
        }));
        let state = loop {
            match store.data_state().await {
                Ok(state) => break state,
                Err(error) => {
                    let waited = clock.elapsed(begun);
                    let bound = match &error {
                        StoreError::Silent { .. } => silent,
                        _ => unreachable,
                    };
                    if !error.is_retryable() || waited + CONNECT_PAUSE >= bound {
                        return Err(error);
                    }
                    if waited >= CALL_TIMEOUT {
                        tracing::warn!(%error, ?waited, tried_for = ?bound, "waiting for the store");
                    }
                    clock.sleep(CONNECT_PAUSE).await;
                }
            }
        };
        tracing::info!(address = %store.options().address, store_id = %state.store_id, "store connected");
        Ok(store)
    }

    /// Names the data as it was last seen. Another id than before means that the data was wiped or replaced.
    pub fn store_id(&self) -> StoreId {
        *lock(&self.0.store_id)
    }

    /// Whether the last call was answered.
    pub fn reachable(&self) -> bool {
        self.0.reachable.load(Ordering::Relaxed)
    }

    /// A coordinator calls this before it uses the store: an embedded one serves exactly one coordinator. On a shared etcd
    /// nothing is written.
    ///
    /// # Errors
    /// Where the store is embedded in another coordinator, or fails.
    pub async fn claim_coordinator(&self, instance: Instance) -> Result<(), ClaimError> {
        if !self.data_state().await?.embedded {
            return Ok(());
        }
        let key = embedded_owner::KEY;
        let txn = Txn::new()
            .when([Compare::create_revision(key, CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key, embedded_owner::encode(instance), None)])
            .or_else([TxnOp::get(key, None)]);
        let answer = self.call(|mut client| async move { client.txn(txn).await }).await?;
        let Some(value) = first_value(&answer.op_responses()) else {
            return Ok(());
        };
        let owner = embedded_owner::decode(&value).map_err(StoreError::from)?;
        if owner == instance {
            return Ok(());
        }
        Err(ClaimError::EmbeddedElsewhere {
            address: self.options().address.to_string(),
            owner,
        })
    }

    pub(crate) fn options(&self) -> &StoreOptions {
        &self.0.options
    }

    pub(crate) fn clock(&self) -> Clock {
        self.0.clock
    }

    pub(crate) fn supervisor(&self) -> &Supervisor {
        &self.0.supervisor
    }

    /// Reads which data this is; names data that has no name yet.
    pub(crate) async fn data_state(&self) -> Result<DataState, StoreError> {
        let key = store_id::key(&self.options().cluster);
        let fresh = StoreId::random();
        let txn = Txn::new()
            .when([Compare::create_revision(key.as_str(), CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key.as_str(), store_id::encode(fresh), None)])
            .or_else([TxnOp::get(key.as_str(), None)]);
        let answer = self.call(|mut client| async move { client.txn(txn).await }).await?;
        let store_id = match first_value(&answer.op_responses()) {
            Some(value) => store_id::decode(&key, &value)?,
            None => fresh,
        };
        let header = answer.header();
        let before = std::mem::replace(&mut *lock(&self.0.store_id), store_id);
        if before != store_id && before != StoreId(0) {
            tracing::warn!(%before, %store_id, "store holds other data than before");
        }
        Ok(DataState {
            store_id,
            revision: header.map_or(0, ResponseHeader::revision),
            embedded: header.is_some_and(|header| header.cluster_id() == EMBEDDED_CLUSTER_ID),
        })
    }

    /// Makes one call, in bounded time, on a connection that is made where there is none.
    pub(crate) async fn call<T, F>(&self, call: impl FnOnce(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let whole = async { call(self.client().await?).await };
        let answer = match self
            .0
            .clock
            .timeout(CALL_TIMEOUT.min(self.options().connect_timeout), whole)
            .await
        {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.explain(&error)),
            Err(_) => Err(StoreError::Silent {
                address: self.options().address.to_string(),
            }),
        };
        let unreachable = answer.as_ref().is_err_and(StoreError::is_retryable);
        if unreachable {
            self.disconnect();
        } else if !self.0.reachable.swap(true, Ordering::Relaxed) {
            metrics::gauge!("baton_store_reachable").set(1.0);
        }
        answer
    }

    /// Forgets the connection, so that the next call makes one: a stream on it broke, or a call failed.
    pub(crate) fn disconnect(&self) {
        lock(&self.0.client).take();
        metrics::counter!("baton_store_failures_total").increment(1);
        if self.0.reachable.swap(false, Ordering::Relaxed) {
            metrics::gauge!("baton_store_reachable").set(0.0);
        }
    }

    /// Tells what a client's error means for whoever asked.
    pub(crate) fn explain(&self, error: &Error) -> StoreError {
        let address = self.options().address.to_string();
        let reason = whole_reason(error);
        let Error::GRpcStatus(status) = error else {
            return match error {
                Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_) => {
                    StoreError::Refused { address, reason }
                }
                _ => self.unreachable(reason),
            };
        };
        match status.code() {
            Code::Unauthenticated | Code::PermissionDenied => StoreError::Denied { address, reason },
            // etcd answers a wrong password and a missing user with these words.
            Code::InvalidArgument
                if reason.contains("authentication failed") || reason.contains("user name is empty") =>
            {
                StoreError::Denied { address, reason }
            }
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented => StoreError::Refused { address, reason },
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            | Code::Aborted
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss => self.unreachable(reason),
        }
    }

    pub(crate) fn unreachable(&self, reason: String) -> StoreError {
        StoreError::Unreachable {
            address: self.options().address.to_string(),
            reason,
        }
    }

    async fn client(&self) -> Result<Client, Error> {
        let present = lock(&self.0.client).clone();
        if let Some(client) = present {
            return Ok(client);
        }
        let client = Client::connect(self.options().address.endpoints(), Some(self.0.connect.clone())).await?;
        lock(&self.0.client).replace(client.clone());
        Ok(client)
    }
}

/// The value of the first pair that a txn's first range found.
fn first_value(responses: &[TxnOpResponse]) -> Option<Vec<u8>> {
    match responses.first()? {
        TxnOpResponse::Get(found) => found.kvs().first().map(|kv| kv.value().to_vec()),
        TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
    }
}

fn connect_options(options: &StoreOptions) -> Result<ConnectOptions, StoreError> {
    let mut connect = ConnectOptions::new()
        .with_connect_timeout(CALL_TIMEOUT.min(options.connect_timeout))
        .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
        // A member that was cut off from the others must not keep a watch waiting.
        .with_require_leader(true);
    if let Some(user) = &options.user {
        connect = connect.with_user(&user.user, &user.password);
    }
    let read = |option: &'static str, path: &Path| {
        std::fs::read(path).map_err(|error| StoreError::TlsFile {
            option,
            path: path.to_owned(),
            reason: error.to_string(),
        })
    };
    match (&options.ca, &options.cert, &options.key) {
        (None, None, None) => Ok(connect),
        (None, _, _) => Err(StoreError::InvalidOption {
            option: "--etcd-ca",
            problem: "is needed for TLS",
        }),
        (Some(ca), cert, key) => {
            let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read("--etcd-ca", ca)?));
            match (cert, key) {
                (None, None) => {}
                (Some(cert), Some(key)) => {
                    let (cert, key) = (read("--etcd-cert", cert)?, read("--etcd-key", key)?);
                    tls = tls.identity(Identity::from_pem(cert, key));
                }
                (None, Some(_)) | (Some(_), None) => {
                    return Err(StoreError::InvalidOption {
                        option: "--etcd-cert",
                        problem: "and --etcd-key go together",
                    });
                }
            }
            Ok(connect.with_tls(tls))
        }
    }
}

/// The error with its causes: the outermost alone says "transport error" where the innermost says "connection refused".
fn whole_reason(error: &Error) -> String {
    let (mut reason, mut cause) = match error {
        Error::GRpcStatus(status) => (status.message().to_owned(), std::error::Error::source(status)),
        Error::TransportError(error) => (error.to_string(), std::error::Error::source(error)),
        other => (other.to_string(), None),
    };
    while let Some(inner) = cause {
        let text = inner.to_string();
        if !reason.contains(&text) {
            reason = if reason.is_empty() {
                text
            } else {
                format!("{reason}: {text}")
            };
        }
        cause = inner.source();
    }
    reason
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
