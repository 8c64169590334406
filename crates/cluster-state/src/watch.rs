//! A watch over the members without a gap: a snapshot paged at one revision, then every change from the next one on.
//!
//! After an outage it resumes behind the last change that it saw. Where that is impossible (the store was compacted, holds
//! other data, or went back in time) it begins afresh from a snapshot. That the store does not answer changes no
//! membership. Only revisions of events move the position: etcd before 3.4.25 sends progress notifications that run
//! ahead of events.

use crate::backoff::Backoff;
use crate::keys::nodes;
use crate::membership::Membership;
use crate::store::DataState;
use crate::{NodeRecord, Store, StoreError, StoreId};
use baton_node_runtime::Moment;
use baton_types::{Instance, NodeId};
use etcd_client::{Event, EventType, GetOptions, KeyValue, ResponseHeader, WatchOptions, WatchResponse, WatchStream};
use std::time::Duration;
use tokio::sync::mpsc;

/// Records in one page of a snapshot: about 700 KB.
const PAGE_RECORDS: i64 = 1000;
/// Events that may wait for a reader.
const EVENTS_WAITING: usize = 256;
/// The longest pause between attempts while the store does not answer.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// What doubted members have beyond a lease: the time of one unanswered call, which a store that starts may cost.
const DOUBT_GRACE: Duration = Duration::from_secs(2);
/// How long a store may take to confirm a watch.
const CREATED_TIMEOUT: Duration = Duration::from_secs(2);

/// A change of membership.
// Few exist at a time, and a box would stand in every match on them.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MembershipEvent {
    /// These are all members; forget others.
    Snapshot(Vec<NodeRecord>),
    /// A member came or changed.
    Put(NodeRecord),
    /// A member's lease ended.
    Gone {
        /// Its name.
        node_id: NodeId,
        /// Its last instance.
        instance: Instance,
    },
}

/// A watch over the members. Begins with a snapshot. Dropping it ends it.
pub struct NodeWatch {
    events: mpsc::Receiver<MembershipEvent>,
}

impl Store {
    /// Watches the members for as long as the process lives.
    pub fn watch_nodes(&self) -> NodeWatch {
        let (sender, events) = mpsc::channel(EVENTS_WAITING);
        let watcher = Watcher {
            store: self.clone(),
            membership: Membership::default(),
            position: None,
            events: sender,
        };
        self.supervisor().spawn("node-watch", watcher.run());
        NodeWatch { events }
    }
}

impl NodeWatch {
    /// The next change. May be dropped without losing one. Never returns once the process shuts down.
    pub async fn next(&mut self) -> MembershipEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}

/// What has been seen: all changes of this data up to this revision.
#[derive(Debug, Clone, Copy)]
struct Position {
    store_id: StoreId,
    revision: i64,
    compacted: bool,
}

impl Position {
    /// It is a place in these data.
    fn lies_in(&self, data: &DataState) -> bool {
        self.store_id == data.store_id && self.revision <= data.revision
    }
}

struct Watcher {
    store: Store,
    membership: Membership,
    position: Option<Position>,
    events: mpsc::Sender<MembershipEvent>,
}

/// Why a session ended.
enum Ended {
    /// Nobody listens any more.
    Unheard,
    /// The position is compacted away.
    Compacted,
    /// The store failed.
    Failed(StoreError),
}

impl From<StoreError> for Ended {
    fn from(error: StoreError) -> Self {
        Self::Failed(error)
    }
}

impl Watcher {
    async fn run(mut self) {
        let shutdown = self.store.supervisor().shutdown_token();
        let clock = self.store.clock();
        let listener = self.events.clone();
        let mut backoff = Backoff::new(BACKOFF_MAX.min(self.store.options().lease_ttl / 3));
        loop {
            let ended = tokio::select! {
                () = shutdown.cancelled() => return,
                () = listener.closed() => return,
                ended = self.session(&mut backoff) => ended,
            };
            match ended {
                Ended::Unheard => return,
                Ended::Compacted => {
                    tracing::info!("node watch fell behind a compaction");
                    if let Some(position) = &mut self.position {
                        position.compacted = true;
                    }
                }
                Ended::Failed(error) => {
                    self.store.disconnect();
                    tracing::warn!(%error, "node watch was interrupted, members are kept");
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = listener.closed() => return,
                () = clock.sleep(backoff.pause()) => {}
            }
        }
    }

    /// One connection's time: catches up, then follows until something breaks.
    async fn session(&mut self, backoff: &mut Backoff) -> Ended {
        match self.follow(backoff).await {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    async fn follow(&mut self, backoff: &mut Backoff) -> Result<std::convert::Infallible, Ended> {
        let state = self.store.data_state().await?;
        self.membership.extend_doubt(self.doubt_ends());
        let position = match self.position {
            Some(position) if position.lies_in(&state) && !position.compacted => position,
            Some(_) | None => self.take_snapshot(&state).await?,
        };
        let mut stream = self.open(position.revision).await?;
        backoff.reset();
        loop {
            let doubt_ends = self.membership.doubt_ends();
            let clock = self.store.clock();
            let doubt = async {
                match doubt_ends {
                    Some(moment) => clock.sleep_until(moment).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                response = stream.message() => {
                    let response = response.map_err(|error| self.store.explain(&error))?;
                    let response = response.ok_or_else(|| self.store.unreachable("the watch ended".to_owned()))?;
                    self.check_live(&response)?;
                    self.take_in(&response).await?;
                }
                () = doubt => {
                    for event in self.membership.end_doubt() {
                        self.emit(event).await?;
                    }
                }
            }
        }
    }

    fn doubt_ends(&self) -> Moment {
        self.store.clock().now() + self.store.options().lease_ttl + DOUBT_GRACE
    }

    async fn emit(&self, event: MembershipEvent) -> Result<(), Ended> {
        self.events.send(event).await.map_err(|_| Ended::Unheard)
    }

    /// Reads all records as of one revision, page by page.
    async fn take_snapshot(&mut self, data: &DataState) -> Result<Position, Ended> {
        let prefix = nodes::prefix(&self.store.options().cluster);
        let end = prefix_end(&prefix);
        let mut from = prefix.into_bytes();
        let mut revision = 0;
        let mut records = Vec::new();
        loop {
            let options = GetOptions::new()
                .with_range(end.clone())
                .with_limit(PAGE_RECORDS)
                .with_revision(revision);
            let key = from.clone();
            let page = self
                .store
                .call(|mut client| async move { client.get(key, Some(options)).await })
                .await;
            let page = match page {
                // Compacted between two pages.
                Err(StoreError::Refused { .. }) if revision > 0 => return Err(Ended::Compacted),
                page => page?,
            };
            if revision == 0 {
                revision = page.header().map_or(0, ResponseHeader::revision);
            }
            records.extend(page.kvs().iter().filter_map(|kv| self.read(kv)));
            match page.kvs().last() {
                Some(last) if page.more() => from = [last.key(), &[0]].concat(),
                Some(_) | None => break,
            }
        }
        let doubt_ends = self.doubt_ends();
        let event = match self.position {
            Some(position) if !position.lies_in(data) => self.membership.fresh_data(records, doubt_ends),
            Some(_) | None => self.membership.snapshot(records),
        };
        let position = Position {
            store_id: data.store_id,
            revision,
            compacted: false,
        };
        self.position = Some(position);
        metrics::counter!("baton_store_snapshots_total").increment(1);
        self.emit(event).await?;
        Ok(position)
    }

    async fn open(&self, after: i64) -> Result<WatchStream, Ended> {
        let prefix = nodes::prefix(&self.store.options().cluster);
        let options = WatchOptions::new().with_prefix().with_start_revision(after + 1);
        let open =
            |client: etcd_client::Client| async move { client.watch_client().watch(prefix, Some(options)).await };
        let mut stream = self.store.call(open).await?;
        let created = self.store.clock().timeout(CREATED_TIMEOUT, stream.message()).await;
        let created = created.map_err(|_| self.store.unreachable("the watch is not confirmed".to_owned()))?;
        let created = created
            .map_err(|error| self.store.explain(&error))?
            .ok_or_else(|| self.store.unreachable("the watch ended".to_owned()))?;
        self.check_live(&created)?;
        // The store may have been wiped since the position was compared: a watch from the future would wait in silence.
        if created.header().map_or(0, ResponseHeader::revision) < after {
            return Err(self.store.unreachable("the store went back in time".to_owned()).into());
        }
        Ok(stream)
    }

    fn check_live(&self, response: &WatchResponse) -> Result<(), Ended> {
        if response.canceled() && response.compact_revision() > 0 {
            Err(Ended::Compacted)
        } else if response.canceled() {
            Err(self
                .store
                .unreachable(format!("the watch was cancelled: {}", response.cancel_reason()))
                .into())
        } else {
            Ok(())
        }
    }

    async fn take_in(&mut self, response: &WatchResponse) -> Result<(), Ended> {
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            if let Some(event) = self.change(event, kv) {
                self.emit(event).await?;
            }
        }
        // After the last of them: one revision's events come in one response.
        let last = response.events().last().and_then(Event::kv).map(KeyValue::mod_revision);
        if let (Some(position), Some(last)) = (&mut self.position, last) {
            position.revision = position.revision.max(last);
        }
        Ok(())
    }

    fn change(&mut self, event: &Event, kv: &KeyValue) -> Option<MembershipEvent> {
        match event.event_type() {
            EventType::Put => self.read(kv).map(|record| self.membership.put(record)),
            EventType::Delete => {
                let node_id = nodes::node_of(&self.store.options().cluster, kv.key())?;
                self.membership.gone(&node_id)
            }
        }
    }

    /// A record that cannot be read is no member: it was written by hand or by another version.
    fn read(&self, kv: &KeyValue) -> Option<NodeRecord> {
        match nodes::decode(&self.store.options().cluster, kv.key(), kv.value()) {
            Ok(record) => Some(record),
            Err(error) => {
                tracing::warn!(%error, "node record is ignored");
                None
            }
        }
    }
}

/// The first key behind all that begin with `prefix`, which ends in `/`.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}
