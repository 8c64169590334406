//! A node's place in the cluster: a task that keeps the node's record in the store under a living lease, whatever happens
//! to the store. It owns the lease. An outage never ends it, nor does a wiped store or a lost lease: the next pass that is
//! answered puts right whatever is missing.

use crate::backoff::Backoff;
use crate::publication::{Outcome, Publication, Vigil};
use crate::{NodeRecord, RegisterError, Store};
use baton_node_runtime::TaskHandle;
use std::time::Duration;
use tokio::sync::{oneshot, watch};

/// Between looks at the lease of another process that has our name.
const VIGIL_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause between attempts while the store does not answer.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// How long [`Registration::update`] waits for the store.
const UPDATE_TIMEOUT: Duration = Duration::from_secs(3);

/// A node's place in the cluster. Dropped, it leaves the record to its lease; [`Registration::deregister`] takes it out at
/// once.
pub struct Registration {
    store: Store,
    wanted: watch::Sender<Wanted>,
    published: watch::Receiver<Option<u64>>,
    lease: watch::Receiver<Option<i64>>,
    stop: oneshot::Sender<()>,
    task: TaskHandle,
}

/// The record as it should stand, with a number that grows with each change.
#[derive(Debug, Clone)]
struct Wanted {
    record: NodeRecord,
    version: u64,
}

impl Store {
    /// Registers a node and keeps it registered. Waits for the lease of a dead process of the same name to end, and while
    /// the store does not answer, for ever.
    ///
    /// # Errors
    /// Where a living process has the name, the name cannot stand in a key, or the store refuses.
    pub async fn register(&self, record: NodeRecord) -> Result<Registration, RegisterError> {
        if record.node_id.as_str().is_empty() || record.node_id.as_str().contains('/') {
            return Err(RegisterError::InvalidName {
                node_id: record.node_id,
            });
        }
        let mut publication = Publication::new(self.clone());
        if let Err(error) = self.publish_first(&mut publication, &record).await {
            publication.revoke().await;
            return Err(error);
        }
        tracing::info!(node_id = %record.node_id, instance = %record.instance, role = %record.role, "node registered");
        let wanted = watch::Sender::new(Wanted { record, version: 0 });
        let (published, published_rx) = watch::channel(Some(0));
        let (lease, lease_rx) = watch::channel(publication.lease());
        let (stop, stopped) = oneshot::channel();
        let keeper = Keeper {
            store: self.clone(),
            publication,
            wanted: wanted.subscribe(),
            published,
            lease,
        };
        let task = self.supervisor().spawn("node-registration", keeper.run(stopped));
        Ok(Registration {
            store: self.clone(),
            wanted,
            published: published_rx,
            lease: lease_rx,
            stop,
            task,
        })
    }

    async fn publish_first(&self, publication: &mut Publication, record: &NodeRecord) -> Result<(), RegisterError> {
        let clock = self.clock();
        let mut backoff = Backoff::new(BACKOFF_MAX);
        let mut vigil: Option<Vigil> = None;
        loop {
            let pause = match publication.pass(record).await {
                Ok(Outcome::Published) => return Ok(()),
                Ok(Outcome::Occupied(occupant)) => {
                    if vigil.is_none() {
                        let (node_id, by) = (&record.node_id, occupant.record.instance);
                        tracing::info!(%node_id, %by, "name is held by another process, waiting for its lease to end");
                    }
                    let vigil = vigil.get_or_insert_default();
                    let lease = publication.remainder(occupant.lease).await;
                    let lives = matches!(lease, Ok(Some(lease)) if vigil.lives(lease, clock.now()));
                    if occupant.lease == 0 || lives {
                        return Err(occupant.refusal());
                    }
                    VIGIL_PAUSE
                }
                Err(error) if error.is_retryable() => {
                    // While the store was away, nobody could renew anything.
                    vigil = None;
                    let pause = backoff.pause();
                    tracing::warn!(%error, ?pause, "node cannot register yet");
                    pause
                }
                Err(error) => return Err(error.into()),
            };
            clock.sleep(pause).await;
        }
    }
}

impl Registration {
    /// The record as it should stand.
    pub fn record(&self) -> NodeRecord {
        self.wanted.borrow().record.clone()
    }

    /// Whether the record stood as it should when the store was last asked.
    pub fn is_published(&self) -> bool {
        *self.published.borrow() == Some(self.wanted.borrow().version)
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// The lease that the record was last seen under. Closed once the node is registered no more.
    pub(crate) fn lease(&self) -> watch::Receiver<Option<i64>> {
        self.lease.clone()
    }

    /// Changes the record, name and instance excepted. True once it stands in the store; false where the store does not
    /// answer for 3 s: the change is then published as soon as it does.
    pub async fn update(&self, change: impl FnOnce(&mut NodeRecord)) -> bool {
        let mut version = 0;
        self.wanted.send_modify(|wanted| {
            let (node_id, instance) = (wanted.record.node_id.clone(), wanted.record.instance);
            change(&mut wanted.record);
            (wanted.record.node_id, wanted.record.instance) = (node_id, instance);
            wanted.version += 1;
            version = wanted.version;
        });
        let mut published = self.published.clone();
        let stands = published.wait_for(|published| published.is_some_and(|published| published >= version));
        matches!(self.store.clock().timeout(UPDATE_TIMEOUT, stands).await, Ok(Ok(_)))
    }

    /// Takes the node out of the cluster by revoking its lease. Where the store does not answer, the lease runs out.
    pub async fn deregister(self) {
        // The task may be gone already, which is what is wanted.
        let _ = self.stop.send(());
        self.task.join().await;
    }
}

struct Keeper {
    store: Store,
    publication: Publication,
    wanted: watch::Receiver<Wanted>,
    published: watch::Sender<Option<u64>>,
    lease: watch::Sender<Option<i64>>,
}

impl Keeper {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        let clock = self.store.clock();
        let beat = self.store.options().lease_ttl / 3;
        let mut backoff = Backoff::new(BACKOFF_MAX.min(beat));
        let mut pause = beat;
        loop {
            tokio::select! {
                ended = &mut stopped => {
                    if ended.is_ok() {
                        self.publication.revoke().await;
                    }
                    return;
                }
                changed = self.wanted.changed() => if changed.is_err() {
                    return;
                },
                () = clock.sleep(pause) => {}
            }
            pause = if self.pass().await {
                backoff.reset();
                beat
            } else {
                backoff.pause()
            };
        }
    }

    /// Brings the record into the store; whether it stands there.
    async fn pass(&mut self) -> bool {
        let Wanted { record, version } = self.wanted.borrow_and_update().clone();
        let problem = match self.publication.pass(&record).await {
            Ok(Outcome::Published) => {
                let lease = self.publication.lease();
                self.lease
                    .send_if_modified(|known| std::mem::replace(known, lease) != lease);
                if self.published.send_replace(Some(version)).is_none() {
                    tracing::info!(node_id = %record.node_id, "node registered again");
                }
                return true;
            }
            Ok(Outcome::Occupied(occupant)) => occupant.refusal(),
            Err(error) => RegisterError::from(error),
        };
        if self.published.send_replace(None).is_some() {
            let node_id = &record.node_id;
            match &problem {
                RegisterError::Store(error) if error.is_retryable() => {
                    tracing::warn!(%node_id, error = %problem, "registration cannot be renewed, trying on");
                }
                RegisterError::Store(_) | RegisterError::NameTaken { .. } | RegisterError::InvalidName { .. } => {
                    tracing::error!(%node_id, error = %problem, "registration was lost, trying on");
                }
            }
        }
        false
    }
}
