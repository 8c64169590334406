//! Bringing a node's record into the store under its lease: one pass that does whatever is missing.
//!
//! The lease is granted where there is none or the store has forgotten it; the record is written where it is absent or
//! stale, by a txn that fails where somebody else wrote meanwhile; another instance's record is never overwritten.

use crate::keys::nodes;
use crate::lease::Lease;
use crate::{NodeRecord, RegisterError, Store, StoreError};
use baton_node_runtime::Moment;
use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};
use std::time::Duration;

/// How often a pass reads again because somebody wrote between its read and its write.
const CONFLICTS_MAX: usize = 5;
/// How much longer than its lease a dead process's record is waited for.
const VIGIL_GRACE: Duration = Duration::from_secs(2);

/// A node's lease, and how to bring its record to stand under it.
pub(crate) struct Publication {
    store: Store,
    lease: Lease,
}

/// The record of another process stands under the name.
#[derive(Debug)]
pub(crate) struct Occupant {
    pub(crate) record: NodeRecord,
    pub(crate) lease: i64,
}

/// What a pass came to.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The record stands.
    Published,
    /// Another process has the name.
    Occupied(Box<Occupant>),
}

impl Publication {
    pub(crate) fn new(store: Store) -> Self {
        Self {
            lease: Lease::new(store.clone()),
            store,
        }
    }

    /// Renews the lease and writes the record where it does not stand as it should.
    pub(crate) async fn pass(&mut self, record: &NodeRecord) -> Result<Outcome, StoreError> {
        let lease = self.lease.live().await?;
        for _ in 0..CONFLICTS_MAX {
            if let Some(outcome) = self.write(record, lease).await? {
                return Ok(outcome);
            }
        }
        Err(self
            .store
            .unreachable("the record changed with each attempt to write it".to_owned()))
    }

    /// The lease that the record stands under.
    pub(crate) fn lease(&self) -> Option<i64> {
        self.lease.id()
    }

    /// Ends the lease, and with it the record. Where the store does not answer, the lease runs out by itself.
    pub(crate) async fn revoke(&mut self) {
        self.lease.revoke().await;
    }

    /// What is left of another process's lease; `None` where it has ended.
    pub(crate) async fn remainder(&self, lease: i64) -> Result<Option<Remainder>, StoreError> {
        let ask = |client: etcd_client::Client| async move { client.lease_client().time_to_live(lease, None).await };
        let answer = self.store.call(ask).await?;
        let granted = Duration::from_secs(answer.granted_ttl().unsigned_abs());
        Ok((answer.ttl() >= 0).then_some(Remainder {
            left_seconds: answer.ttl(),
            granted,
        }))
    }

    /// One read, and one write where one is needed. `None` where somebody else wrote in between.
    async fn write(&self, record: &NodeRecord, lease: i64) -> Result<Option<Outcome>, StoreError> {
        let cluster = &self.store.options().cluster;
        let key = nodes::key(cluster, &record.node_id);
        let read = key.clone();
        let found = self
            .store
            .call(|mut client| async move { client.get(read, None).await })
            .await?;
        let value = nodes::encode(record);
        let seen = match found.kvs().first() {
            None => 0,
            Some(kv) if kv.value() == value && kv.lease() == lease => return Ok(Some(Outcome::Published)),
            Some(kv) => {
                match nodes::decode(cluster, kv.key(), kv.value()) {
                    Ok(theirs) if theirs.instance != record.instance => {
                        let occupant = Occupant {
                            record: theirs,
                            lease: kv.lease(),
                        };
                        return Ok(Some(Outcome::Occupied(Box::new(occupant))));
                    }
                    Ok(_) => {}
                    Err(error) => tracing::warn!(%error, "record is replaced"),
                }
                kv.mod_revision()
            }
        };
        let txn = Txn::new()
            .when([Compare::mod_revision(key.as_str(), CompareOp::Equal, seen)])
            .and_then([TxnOp::put(
                key.as_str(),
                value,
                Some(PutOptions::new().with_lease(lease)),
            )]);
        let answer = self
            .store
            .call(|mut client| async move { client.txn(txn).await })
            .await?;
        Ok(answer.succeeded().then_some(Outcome::Published))
    }
}

/// A lease as the store describes it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Remainder {
    pub(crate) left_seconds: i64,
    pub(crate) granted: Duration,
}

/// Decides whether the process whose record stands under a name lives: its lease is renewed, or does not end in time.
///
/// A process that was killed leaves its record until its lease ends; its successor waits for that instead of giving up. A
/// store renews every lease once when it restarts or changes its leader, so one renewal proves nothing.
#[derive(Debug, Default)]
pub(crate) struct Vigil {
    left_seconds: Option<i64>,
    renewals: u32,
    ends: Option<Moment>,
}

impl Vigil {
    /// Takes in what is left of the lease; true once the other is known to live.
    pub(crate) fn lives(&mut self, lease: Remainder, now: Moment) -> bool {
        let renewed = self.left_seconds.is_some_and(|before| lease.left_seconds > before);
        self.left_seconds = Some(lease.left_seconds);
        self.renewals += u32::from(renewed);
        let ends = self
            .ends
            .filter(|_| !renewed)
            .unwrap_or(now + lease.granted + VIGIL_GRACE);
        self.ends = Some(ends);
        self.renewals >= 2 || now > ends
    }
}

impl Occupant {
    pub(crate) fn refusal(&self) -> RegisterError {
        RegisterError::NameTaken {
            node_id: self.record.node_id.clone(),
            by: self.record.instance,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_node_runtime::Clock;

    fn verdict(left: &[i64]) -> bool {
        let start = Clock::new().now();
        let mut vigil = Vigil::default();
        left.iter().zip(0..).any(|(left, second)| {
            let lease = Remainder {
                left_seconds: *left,
                granted: Duration::from_secs(10),
            };
            vigil.lives(lease, start + Duration::from_secs(second))
        })
    }

    #[tokio::test]
    async fn only_repeated_renewals_prove_life() {
        assert!(!verdict(&[9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0]));
        assert!(verdict(&[9, 8, 7, 9, 8, 7, 9]));
        // The store restarted once.
        assert!(!verdict(&[9, 8, 7, 6, 5, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0]));
        // Renewed too often to be seen, or never ending.
        assert!(verdict(&[9; 14]));
    }
}
