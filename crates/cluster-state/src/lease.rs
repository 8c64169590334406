//! One lease of this process's: granted where there is none or the store has forgotten it, renewed by each look at it.

use crate::{Store, StoreError};
use etcd_client::Error;

/// A lease, or the wish for one.
pub(crate) struct Lease {
    store: Store,
    id: Option<i64>,
}

impl Lease {
    pub(crate) fn new(store: Store) -> Self {
        Self { store, id: None }
    }

    /// Its number, once it was granted.
    pub(crate) fn id(&self) -> Option<i64> {
        self.id
    }

    /// Renews it; grants another one where it has ended. Gives its number.
    pub(crate) async fn live(&mut self) -> Result<i64, StoreError> {
        if let Some(lease) = self.id {
            if self.keep_alive(lease).await? {
                return Ok(lease);
            }
            tracing::warn!("lease was lost");
            metrics::counter!("baton_store_leases_lost_total").increment(1);
            self.id = None;
            // Gives wiped data its name, so that watches see that they must begin afresh.
            self.store.data_state().await?;
        }
        let seconds = i64::try_from(self.store.options().lease_ttl.as_secs())
            .unwrap_or(i64::MAX)
            .max(1);
        let granted = self
            .store
            .call(|client| async move { client.lease_client().grant(seconds, None).await })
            .await?;
        self.id = Some(granted.id());
        Ok(granted.id())
    }

    /// Ends it, and with it what stands under it. Where the store does not answer, it runs out by itself.
    pub(crate) async fn revoke(&mut self) {
        let Some(lease) = self.id.take() else { return };
        let revoked = self
            .store
            .call(|client| async move { client.lease_client().revoke(lease).await })
            .await;
        if let Err(error) = revoked {
            tracing::debug!(%error, "lease is left to run out");
        }
    }

    /// Whether the store still knows the lease.
    async fn keep_alive(&self, lease: i64) -> Result<bool, StoreError> {
        let alive = |client: etcd_client::Client| async move {
            match client.lease_client().keep_alive(lease).await {
                Ok(_) => Ok(true),
                // The store answered with TTL 0.
                Err(Error::LeaseKeepAliveError(_)) => Ok(false),
                Err(error) => Err(error),
            }
        };
        self.store.call(alive).await
    }
}
