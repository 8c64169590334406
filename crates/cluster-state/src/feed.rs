//! All keys under a prefix without a gap: a snapshot paged at one revision, then every change from the next one on.
//!
//! After an outage it resumes behind the last change that it saw. Where that is impossible (the store was compacted, holds
//! other data, or went back in time) it begins afresh from a snapshot. Only revisions of events move the position: etcd
//! before 3.4.25 sends progress notifications that run ahead of events. What keys and values mean is a [`Follower`]'s
//! business.

use crate::backoff::Backoff;
use crate::store::DataState;
use crate::{Store, StoreError, StoreId};
use baton_node_runtime::Moment;
use etcd_client::{Event, EventType, GetOptions, KeyValue, ResponseHeader, WatchOptions, WatchResponse, WatchStream};
use std::time::Duration;
use tokio::sync::mpsc;

/// Events that may wait for a reader.
const EVENTS_WAITING: usize = 256;
/// The longest pause between attempts while the store does not answer.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// How long a store may take to confirm a watch.
const CREATED_TIMEOUT: Duration = Duration::from_secs(2);
/// etcd answers a watch that has fallen behind with up to 1,000 revisions at once, each of at most one block segment.
const RESPONSE_BYTES_MAX: usize = 128 << 20;

/// Makes events of what stands under one prefix. Pure; all times are told.
pub(crate) trait Follower: Send + Sync + 'static {
    /// What a reader hears.
    type Event: Send + 'static;

    /// Name of the task, and in logs.
    const TASK: &'static str;
    /// Keys in one page of a snapshot: a page must stay below 4 MiB.
    const PAGE_KEYS: i64;

    /// Where the keys begin; ends in `/`.
    fn prefix(cluster: &str) -> String;

    /// The store answers again. What waits for it to change something may wait for a lease from `now` on.
    fn connected(&mut self, _now: Moment) {}

    /// A snapshot begins. `is_fresh`: of other data than what was seen before.
    fn begin_snapshot(&mut self, is_fresh: bool, out: &mut Vec<Self::Event>);

    /// More of the snapshot, in the order of keys.
    fn page(&mut self, page: &[KeyValue], out: &mut Vec<Self::Event>);

    /// That was the snapshot.
    fn end_snapshot(&mut self, now: Moment, out: &mut Vec<Self::Event>);

    /// A key was written.
    fn put(&mut self, kv: &KeyValue, out: &mut Vec<Self::Event>);

    /// A key was deleted, or its lease ended.
    fn delete(&mut self, key: &[u8], out: &mut Vec<Self::Event>);

    /// When [`Self::overdue`] should be called, where the store is there then.
    fn due(&self) -> Option<Moment> {
        None
    }

    /// That time has come.
    fn overdue(&mut self, _out: &mut Vec<Self::Event>) {}
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

struct Feed<F: Follower> {
    store: Store,
    follower: F,
    position: Option<Position>,
    events: mpsc::Sender<F::Event>,
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

/// Feeds a follower for as long as the process lives or its events are wanted.
pub(crate) fn follow<F: Follower>(store: &Store, follower: F) -> mpsc::Receiver<F::Event> {
    let (sender, events) = mpsc::channel(EVENTS_WAITING);
    let feed = Feed {
        store: store.clone(),
        follower,
        position: None,
        events: sender,
    };
    store.supervisor().spawn(F::TASK, feed.run());
    events
}

impl<F: Follower> Feed<F> {
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
                    tracing::info!(watch = F::TASK, "watch fell behind a compaction");
                    if let Some(position) = &mut self.position {
                        position.compacted = true;
                    }
                }
                Ended::Failed(error) => {
                    self.store.disconnect();
                    tracing::warn!(watch = F::TASK, %error, "watch was interrupted, what it told is kept");
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
        let clock = self.store.clock();
        self.follower.connected(clock.now());
        let position = match self.position {
            Some(position) if position.lies_in(&state) && !position.compacted => position,
            Some(_) | None => self.take_snapshot(&state).await?,
        };
        let mut stream = self.open(position.revision).await?;
        backoff.reset();
        loop {
            let due = self.follower.due();
            let overdue = async {
                match due {
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
                () = overdue => {
                    let mut events = Vec::new();
                    self.follower.overdue(&mut events);
                    self.emit(events).await?;
                }
            }
        }
    }

    async fn emit(&self, events: Vec<F::Event>) -> Result<(), Ended> {
        for event in events {
            self.events.send(event).await.map_err(|_| Ended::Unheard)?;
        }
        Ok(())
    }

    /// Reads all keys as of one revision, page by page.
    async fn take_snapshot(&mut self, data: &DataState) -> Result<Position, Ended> {
        let prefix = F::prefix(&self.store.options().cluster);
        let end = prefix_end(&prefix);
        let mut from = prefix.into_bytes();
        let mut revision = 0;
        let mut events = Vec::new();
        let is_fresh = self.position.is_some_and(|position| !position.lies_in(data));
        self.follower.begin_snapshot(is_fresh, &mut events);
        loop {
            let options = GetOptions::new()
                .with_range(end.clone())
                .with_limit(F::PAGE_KEYS)
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
            self.follower.page(page.kvs(), &mut events);
            self.emit(std::mem::take(&mut events)).await?;
            match page.kvs().last() {
                Some(last) if page.more() => from = [last.key(), &[0]].concat(),
                Some(_) | None => break,
            }
        }
        self.follower.end_snapshot(self.store.clock().now(), &mut events);
        let position = Position {
            store_id: data.store_id,
            revision,
            compacted: false,
        };
        self.position = Some(position);
        metrics::counter!("baton_store_snapshots_total").increment(1);
        self.emit(events).await?;
        Ok(position)
    }

    async fn open(&self, after: i64) -> Result<WatchStream, Ended> {
        let prefix = F::prefix(&self.store.options().cluster);
        let options = WatchOptions::new().with_prefix().with_start_revision(after + 1);
        let open = |client: etcd_client::Client| async move {
            let mut watches = client.watch_client().max_decoding_message_size(RESPONSE_BYTES_MAX);
            watches.watch(prefix, Some(options)).await
        };
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
            let mut events = Vec::new();
            match event.event_type() {
                EventType::Put => self.follower.put(kv, &mut events),
                EventType::Delete => self.follower.delete(kv.key(), &mut events),
            }
            self.emit(events).await?;
        }
        // After the last of them: one revision's events come in one response.
        let last = response.events().last().and_then(Event::kv).map(KeyValue::mod_revision);
        if let (Some(position), Some(last)) = (&mut self.position, last) {
            position.revision = position.revision.max(last);
        }
        Ok(())
    }
}

/// The first key behind all that begin with `prefix`, which ends in `/`.
pub(crate) fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}
