//! Writes a node's block locations under its lease: at most one write each 100 ms, and no more than the node's share of what
//! the whole cluster may write, however fast its blocks change.
//!
//! A write that was not answered is repeated as it is, which changes nothing where it had come through. All is written
//! again where nothing of it can stand: under a new lease, in other data, or in a store that went back in time.

use super::log::{LocationLog, Write};
use crate::backoff::Backoff;
use crate::feed::prefix_end;
use crate::keys::blocks::{self, SegmentName};
use crate::keys::nodes;
use crate::{Registration, Store, StoreError};
use baton_node_runtime::Moment;
use baton_types::{BlockChanges, Instance, NodeId};
use etcd_client::{DeleteOptions, GetOptions, PutOptions, ResponseHeader, Txn, TxnOp};
use std::time::Duration;
use tokio::sync::watch;

/// How often the node looks for changes; no write follows another sooner.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The longest pause between attempts while the store does not answer.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// How often the nodes are counted, where something is written.
const COUNT_EVERY: Duration = Duration::from_secs(3);

/// What all nodes together may write of their locations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocationBudget {
    /// Txns per second; not 0.
    pub writes_per_s: u32,
    /// Bytes of values per second; not 0.
    pub bytes_per_s: u64,
}

impl Default for LocationBudget {
    fn default() -> Self {
        Self {
            writes_per_s: 1000,
            bytes_per_s: 2 << 20,
        }
    }
}

impl LocationBudget {
    /// How long one of `nodes` waits after a write of so many bytes.
    fn pause(&self, nodes: u64, bytes: usize) -> Duration {
        let (writes, rate) = (f64::from(self.writes_per_s.max(1)), self.bytes_per_s.max(1) as f64);
        let share = (1.0 / writes).max(bytes as f64 / rate) * nodes.max(1) as f64;
        Duration::try_from_secs_f64(share)
            .unwrap_or(Duration::MAX)
            .max(LOOK_EVERY)
    }
}

impl Registration {
    /// Publishes from now on which blocks the node holds, for as long as it is registered. `take_changes` gives what changed
    /// since the last call, from an empty cache on; it is called every 100 ms and must not block for long.
    pub fn publish_blocks(
        &self,
        budget: LocationBudget,
        take_changes: impl FnMut() -> BlockChanges + Send + Sync + 'static,
    ) {
        let record = self.record();
        let publisher = Publisher {
            store: self.store().clone(),
            node_id: record.node_id,
            instance: record.instance,
            lease: self.lease(),
            budget,
            log: LocationLog::new(),
            unanswered: None,
            revision: 0,
            nodes: 1,
            count_due: self.store().clock().now(),
        };
        self.store()
            .supervisor()
            .spawn("block-locations", publisher.run(take_changes));
    }
}

struct Publisher {
    store: Store,
    node_id: NodeId,
    instance: Instance,
    /// The node's lease; `None` while it has none. Closed once the node is registered no more.
    lease: watch::Receiver<Option<i64>>,
    budget: LocationBudget,
    log: LocationLog,
    unanswered: Option<Write>,
    /// Of the last write.
    revision: i64,
    /// How many there were when they were last counted.
    nodes: u64,
    count_due: Moment,
}

impl Publisher {
    async fn run(mut self, mut take_changes: impl FnMut() -> BlockChanges + Send) {
        let clock = self.store.clock();
        let shutdown = self.store.supervisor().shutdown_token();
        let mut backoff = Backoff::new(BACKOFF_MAX);
        let mut lease = *self.lease.borrow_and_update();
        let (mut looked_unix_us, mut write_due) = (clock.unix_us(), clock.now());
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = self.lease.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = *self.lease.borrow_and_update();
                    if now.is_some() && now != lease {
                        self.restart();
                    }
                    lease = now.or(lease);
                }
                () = clock.sleep(LOOK_EVERY) => {}
            }
            // What is found now may have changed right after the last look.
            let now_unix_us = clock.unix_us();
            self.log.change(take_changes(), looked_unix_us);
            looked_unix_us = now_unix_us;
            let waiting = self
                .log
                .waiting_since()
                .map_or(0, |since| now_unix_us.saturating_sub(since));
            metrics::gauge!("baton_store_location_pending_seconds").set(waiting as f64 / 1e6);
            let (Some(lease), true) = (lease, write_due <= clock.now()) else {
                continue;
            };
            let written = tokio::select! {
                () = shutdown.cancelled() => return,
                written = self.write(lease) => written,
            };
            write_due = match written {
                Ok(bytes) => {
                    backoff.reset();
                    clock.now() + self.budget.pause(self.nodes, bytes)
                }
                Err(error) => {
                    tracing::debug!(node_id = %self.node_id, %error, "block locations are not written, trying on");
                    clock.now() + backoff.pause()
                }
            };
        }
    }

    fn restart(&mut self) {
        tracing::info!(node_id = %self.node_id, "block locations are published anew");
        self.unanswered = None;
        self.log.restart(self.store.clock().unix_us());
    }

    /// Makes the next write, where there is one; gives its size.
    async fn write(&mut self, lease: i64) -> Result<usize, StoreError> {
        let Some(write) = self.unanswered.take().or_else(|| self.log.next_write()) else {
            return Ok(0);
        };
        let write = self.unanswered.insert(write);
        let cluster = self.store.options().cluster.clone();
        let key = |seq| {
            let (node_id, instance) = (self.node_id.clone(), self.instance);
            blocks::key(&cluster, &SegmentName { node_id, instance, seq })
        };
        let value = blocks::encode(&write.segment);
        let bytes = value.len();
        let mut ops = vec![TxnOp::put(
            key(write.seq),
            value,
            Some(PutOptions::new().with_lease(lease)),
        )];
        if !write.replaces.is_empty() {
            let end = DeleteOptions::new().with_range(key(write.replaces.end));
            ops.push(TxnOp::delete(key(write.replaces.start), Some(end)));
        }
        let txn = Txn::new().and_then(ops);
        let answer = self
            .store
            .call(|mut client| async move { client.txn(txn).await })
            .await?;
        self.unanswered = None;
        metrics::counter!("baton_store_location_writes_total").increment(1);
        metrics::counter!("baton_store_location_written_bytes_total").increment(bytes as u64);
        let revision = answer.header().map_or(0, ResponseHeader::revision);
        if revision < self.revision {
            // The store went back in time: it may lack what was written before.
            self.restart();
        }
        self.revision = revision;
        self.count_nodes(&cluster).await?;
        Ok(bytes)
    }

    async fn count_nodes(&mut self, cluster: &str) -> Result<(), StoreError> {
        let now = self.store.clock().now();
        if now < self.count_due {
            return Ok(());
        }
        let prefix = nodes::prefix(cluster);
        let options = GetOptions::new().with_range(prefix_end(&prefix)).with_count_only();
        let answer = self
            .store
            .call(|mut client| async move { client.get(prefix, Some(options)).await })
            .await?;
        self.nodes = u64::try_from(answer.count()).unwrap_or(1);
        self.count_due = now + COUNT_EVERY;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_of_writes_and_of_bytes() {
        let budget = LocationBudget {
            writes_per_s: 500,
            bytes_per_s: 1 << 20,
        };
        assert_eq!(budget.pause(1, 100), LOOK_EVERY);
        assert_eq!(budget.pause(1000, 100), Duration::from_secs(2));
        assert_eq!(budget.pause(100, 64 << 10), Duration::from_millis(6250));
        assert_eq!(budget.pause(0, 0), LOOK_EVERY);
    }
}
