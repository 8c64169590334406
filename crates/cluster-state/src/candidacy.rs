//! Which coordinator's controller leads: at most one at a time, as long as it renews its lease.
//!
//! A task of each candidate looks at the leader's key, each third of a lease while it leads and each second otherwise, and
//! takes the key where there is none. A candidate that the store does not answer counts itself out before its lease can have
//! ended there, by its own clock from before the last renewal. Whoever leads and means to act publishes first, by a txn
//! that fails where the lead has passed on.

use crate::keys::plan::{self, AdviceRecord};
use crate::lease::Lease;
use crate::{Store, StoreError};
use baton_node_runtime::{Moment, TaskHandle};
use baton_types::Instance;
use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};
use std::time::Duration;
use tokio::sync::{oneshot, watch};

/// Between looks of one that does not lead: so much longer than a lease may a cluster be without a leader.
const LOOK: Duration = Duration::from_secs(1);

/// Where a candidate stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The store has not said, or not for so long that a lead may have ended.
    Unknown,
    /// Another one leads.
    Follows(Instance),
    /// This one leads, in a term that no other lead has.
    Leads {
        /// The revision at which it began.
        term: i64,
    },
}

/// A stand for the lead. Dropped, it leaves a lead to its lease; [`Candidacy::resign`] ends it at once.
pub struct Candidacy {
    store: Store,
    seen: watch::Receiver<(Standing, Moment)>,
    stop: oneshot::Sender<()>,
    task: TaskHandle,
}

impl Store {
    /// Stands for the lead until it is dropped or resigned.
    pub fn stand(&self, instance: Instance) -> Candidacy {
        let (seen, seen_rx) = watch::channel((Standing::Unknown, self.clock().now()));
        let (stop, stopped) = oneshot::channel();
        let keeper = Keeper {
            store: self.clone(),
            lease: Lease::new(self.clone()),
            instance,
            seen,
        };
        let task = self.supervisor().spawn("control-candidacy", keeper.run(stopped));
        Candidacy {
            store: self.clone(),
            seen: seen_rx,
            stop,
            task,
        }
    }

    /// What the controller that leads, or led last, came to.
    ///
    /// # Errors
    /// Where the store fails, or holds something else.
    pub async fn advice(&self) -> Result<Option<AdviceRecord>, StoreError> {
        let cluster = &self.options().cluster;
        let key = plan::advice_key(cluster);
        let found = self
            .call(|mut client| async move { client.get(key, None).await })
            .await?;
        let advice = found.kvs().first().map(|kv| plan::decode_advice(cluster, kv.value()));
        Ok(advice.transpose()?)
    }
}

impl Candidacy {
    /// Where it stands now.
    pub fn standing(&self) -> Standing {
        let (standing, until) = *self.seen.borrow();
        if self.store.clock().now() < until {
            standing
        } else {
            Standing::Unknown
        }
    }

    /// Waits until it stands elsewhere than when this was called last. May be dropped without losing that.
    pub async fn changed(&mut self) {
        if self.seen.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Publishes what the leader came to; false where it does not lead in this term any more.
    ///
    /// # Errors
    /// Where the store fails: it may have been published, or not.
    pub async fn publish(&self, term: i64, advice: &AdviceRecord) -> Result<bool, StoreError> {
        let cluster = &self.store.options().cluster;
        let leader = Compare::create_revision(plan::leader_key(cluster), CompareOp::Equal, term);
        let put = TxnOp::put(plan::advice_key(cluster), plan::encode_advice(advice), None);
        let txn = Txn::new().when([leader]).and_then([put]);
        let answer = self
            .store
            .call(|mut client| async move { client.txn(txn).await })
            .await?;
        Ok(answer.succeeded())
    }

    /// Gives up a lead at once, so that another one need not wait for the lease to end.
    pub async fn resign(self) {
        // The task may be gone already, which is what is wanted.
        let _ = self.stop.send(());
        self.task.join().await;
    }
}

struct Keeper {
    store: Store,
    lease: Lease,
    instance: Instance,
    seen: watch::Sender<(Standing, Moment)>,
}

impl Keeper {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        let clock = self.store.clock();
        let lease_ttl = self.store.options().lease_ttl;
        loop {
            let asked = clock.now();
            let pause = match self.look().await {
                Ok(standing) => {
                    let until = asked + lease_ttl;
                    let before = self.seen.borrow().0;
                    self.seen.send_if_modified(|seen| {
                        *seen = (standing, until);
                        before != standing
                    });
                    if before != standing {
                        tracing::info!(?standing, "controller candidacy");
                    }
                    match standing {
                        Standing::Leads { .. } => lease_ttl / 3,
                        Standing::Follows(_) | Standing::Unknown => LOOK.min(lease_ttl / 3),
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "no word on who leads");
                    LOOK.min(lease_ttl / 3)
                }
            };
            tokio::select! {
                // Without a word the lead is left to its lease.
                ended = &mut stopped => {
                    if ended.is_ok() {
                        self.lease.revoke().await;
                    }
                    return;
                }
                () = clock.sleep(pause) => {}
            }
        }
    }

    /// Reads who leads, and takes the lead where nobody does.
    async fn look(&mut self) -> Result<Standing, StoreError> {
        let lease = match self.lease.id() {
            Some(_) => Some(self.lease.live().await?),
            None => None,
        };
        let cluster = self.store.options().cluster.clone();
        let key = plan::leader_key(&cluster);
        let read = key.clone();
        let found = self
            .store
            .call(|mut client| async move { client.get(read, None).await })
            .await?;
        if let Some(kv) = found.kvs().first() {
            let leader = plan::decode_leader(&cluster, kv.value())?;
            if leader != self.instance {
                self.lease.revoke().await;
                return Ok(Standing::Follows(leader));
            }
            // Its own key under a lease that has ended goes with that.
            return Ok(if Some(kv.lease()) == lease {
                Standing::Leads {
                    term: kv.create_revision(),
                }
            } else {
                Standing::Unknown
            });
        }
        let lease = self.lease.live().await?;
        let put = PutOptions::new().with_lease(lease);
        let txn = Txn::new()
            .when([Compare::create_revision(key.as_str(), CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key.as_str(), plan::encode_leader(self.instance), Some(put))]);
        let answer = self
            .store
            .call(|mut client| async move { client.txn(txn).await })
            .await?;
        // Where another one was quicker, the next look tells who.
        let term = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok(if answer.succeeded() {
            Standing::Leads { term }
        } else {
            Standing::Unknown
        })
    }
}
