//! The gRPC service `etcdserverpb.Watch`: one task per stream, which may hold several watches.
//!
//! A watch is only a position in the log. Its task sends what lies behind that position and waits for the next revision,
//! so that a slow reader costs no memory: where the log is compacted before it got there, its watch is cancelled with the
//! compacted revision, and it begins afresh from a snapshot. A response holds whole revisions only.

use super::history::History;
use super::range::KeyRange;
use super::refusal::Refusal;
use super::server::{Shared, header};
use baton_node_runtime::Moment;
use etcd_client::WatchFilterType;
use etcd_client::proto::{PbEvent, PbWatchRequest, PbWatchRequestUnion, PbWatchResponse, PbWatchService};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// A response is sent once it holds this much, at the next border between revisions.
const RESPONSE_BYTES: usize = 1 << 20;
/// How often a watch that asked for it learns how far it is. As in etcd.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(600);
/// Names no watch. As in etcd.
const NO_WATCH: i64 = -1;

pub(super) struct WatchService(pub(super) Arc<Shared>);

#[tonic::async_trait]
impl PbWatchService for WatchService {
    type WatchStream = ReceiverStream<Result<PbWatchResponse, Status>>;

    async fn watch(&self, request: Request<Streaming<PbWatchRequest>>) -> Result<Response<Self::WatchStream>, Status> {
        let (responses, stream) = mpsc::channel(16);
        let task = WatchTask {
            shared: Arc::clone(&self.0),
            watches: BTreeMap::new(),
            responses,
        };
        self.0.supervisor.spawn("embedded-store-watch", async move {
            // It ends with its client or with the store; neither is worth a word.
            let _ = task.run(request.into_inner()).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

struct Watch {
    range: KeyRange,
    next: i64,
    prev_kv: bool,
    progress: bool,
    puts: bool,
    deletes: bool,
}

struct WatchTask {
    shared: Arc<Shared>,
    watches: BTreeMap<i64, Watch>,
    responses: mpsc::Sender<Result<PbWatchResponse, Status>>,
}

/// The client has gone.
struct Gone;

impl WatchTask {
    async fn run(mut self, mut requests: Streaming<PbWatchRequest>) -> Result<(), Gone> {
        let shutdown = self.shared.shutdown.clone();
        let mut revisions = self.shared.revision.subscribe();
        let mut progress_due = self.progress_moment();
        loop {
            let delivered = self.deliver().await?;
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = self.responses.closed() => return Err(Gone),
                request = requests.message() => match request {
                    Ok(Some(request)) => self.handle(request).await?,
                    Ok(None) | Err(_) => return Err(Gone),
                },
                changed = revisions.changed() => changed.map_err(|_| Gone)?,
                () = self.shared.clock.sleep_until(progress_due) => {
                    progress_due = self.progress_moment();
                    let asked: Vec<i64> =
                        self.watches.iter().filter(|(_, watch)| watch.progress).map(|(id, _)| *id).collect();
                    for watch_id in asked {
                        self.send(PbWatchResponse { watch_id, ..response(delivered) }).await?;
                    }
                }
            }
        }
    }

    fn progress_moment(&self) -> Moment {
        self.shared.clock.now() + PROGRESS_INTERVAL
    }

    async fn send(&self, response: PbWatchResponse) -> Result<(), Gone> {
        self.responses.send(Ok(response)).await.map_err(|_| Gone)
    }

    /// Sends all that the watches lack; gives the revision up to which they lack nothing.
    async fn deliver(&mut self) -> Result<i64, Gone> {
        loop {
            let watches = &mut self.watches;
            let ((responses, revision), _) = self.shared.with(|state, _| {
                let history = state.history();
                let responses: Vec<_> = watches
                    .iter_mut()
                    .filter_map(|(id, watch)| watch.advance(*id, history))
                    .collect();
                (responses, history.revision())
            });
            if responses.is_empty() {
                return Ok(revision);
            }
            for response in responses {
                if response.canceled {
                    self.watches.remove(&response.watch_id);
                }
                self.send(response).await?;
            }
        }
    }

    async fn handle(&mut self, request: PbWatchRequest) -> Result<(), Gone> {
        match request.request_union {
            None => Ok(()),
            Some(PbWatchRequestUnion::ProgressRequest(_)) => {
                let delivered = self.deliver().await?;
                self.send(PbWatchResponse {
                    watch_id: NO_WATCH,
                    ..response(delivered)
                })
                .await
            }
            Some(PbWatchRequestUnion::CancelRequest(cancel)) => {
                if self.watches.remove(&cancel.watch_id).is_none() {
                    return Ok(());
                }
                let revision = *self.shared.revision.borrow();
                self.send(PbWatchResponse {
                    watch_id: cancel.watch_id,
                    canceled: true,
                    ..response(revision)
                })
                .await
            }
            Some(PbWatchRequestUnion::CreateRequest(create)) => {
                let ((), header) = self.shared.with(|_, _| ());
                let created = PbWatchResponse {
                    header: Some(header),
                    created: true,
                    ..PbWatchResponse::default()
                };
                let watch_id = if create.watch_id == 0 {
                    self.free_id()
                } else {
                    create.watch_id
                };
                if self.watches.contains_key(&watch_id) || watch_id < 0 {
                    let cancel_reason = "mvcc: duplicate watch ID provided on the WatchStream".to_owned();
                    let refused = PbWatchResponse {
                        watch_id: NO_WATCH,
                        canceled: true,
                        cancel_reason,
                        ..created
                    };
                    return self.send(refused).await;
                }
                let from = if create.key.is_empty() {
                    &[0]
                } else {
                    create.key.as_slice()
                };
                let wanted = |filter: WatchFilterType| !create.filters.contains(&(filter as i32));
                let next = if create.start_revision > 0 {
                    create.start_revision
                } else {
                    header.revision + 1
                };
                let watch = Watch {
                    range: KeyRange::new(from, &create.range_end),
                    next,
                    prev_kv: create.prev_kv,
                    progress: create.progress_notify,
                    puts: wanted(WatchFilterType::NoPut),
                    deletes: wanted(WatchFilterType::NoDelete),
                };
                self.watches.insert(watch_id, watch);
                self.send(PbWatchResponse { watch_id, ..created }).await
            }
        }
    }

    fn free_id(&self) -> i64 {
        (0..).find(|id| !self.watches.contains_key(id)).unwrap_or(NO_WATCH)
    }
}

impl Watch {
    /// The next response, where one is due: events of whole revisions, or the end of this watch.
    fn advance(&mut self, watch_id: i64, history: &History) -> Option<PbWatchResponse> {
        if self.next < history.compacted() {
            return Some(PbWatchResponse {
                watch_id,
                canceled: true,
                compact_revision: history.compacted(),
                cancel_reason: Refusal::Compacted.to_string(),
                ..response(history.revision())
            });
        }
        let mut events: Vec<PbEvent> = Vec::new();
        let mut bytes = 0;
        for revision in history.since(self.next) {
            if bytes >= RESPONSE_BYTES {
                break;
            }
            for change in &revision.changes {
                let wanted = if change.now.is_some() { self.puts } else { self.deletes };
                if wanted && self.range.contains(change.key()) {
                    bytes += change.bytes();
                    events.push(change.event(self.prev_kv));
                }
            }
            self.next = revision.number + 1;
        }
        let response = PbWatchResponse {
            watch_id,
            events,
            ..response(history.revision())
        };
        if response.events.is_empty() {
            None
        } else {
            Some(response)
        }
    }
}

fn response(revision: i64) -> PbWatchResponse {
    PbWatchResponse {
        header: Some(header(revision)),
        ..PbWatchResponse::default()
    }
}
