//! The gRPC service `baton.v1.Node`: wire forms in, wire forms out. What a request means is the role's business.

use crate::host::Host;
use baton_kv_transfer::{PathKind, PathStats};
use baton_node_runtime::process;
use baton_proto::v1::{self, node_server::Node};
use baton_types::NodeState;
use bytes::Bytes;
use futures::Stream;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Largest piece of a model card.
const CARD_PIECE_BYTES: usize = 1 << 20;
/// Heartbeats come no faster than this, whatever is asked.
const HEARTBEAT_LEAST: Duration = Duration::from_millis(50);
/// Heartbeats come so often where nothing is asked.
const HEARTBEAT_DEFAULT: Duration = Duration::from_millis(500);
/// A drain that names no deadline.
const DRAIN_DEFAULT: Duration = Duration::from_secs(120);
/// While it computes, or has very many blocks, the block pool is checked on one heartbeat in so many.
const INTEGRITY_EVERY: u32 = 16;
/// More blocks take a millisecond or so to check, during which nobody gets one.
const INTEGRITY_BLOCKS: u32 = 100_000;

/// A stream of messages of one request. Dropping it cancels the request.
pub type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What a node does for requests.
pub trait Role: Send + Sync + 'static {
    /// One attempt at prefilling a request and handing it over.
    ///
    /// # Errors
    /// Where the request is not taken.
    fn prefill(&self, request: v1::PrefillRequest) -> Result<EventStream<v1::PrefillEvent>, Status>;

    /// One request's stay on a decode node. Refusals come in the stream.
    ///
    /// # Errors
    /// Where the node does not decode at all.
    fn decode(&self, commands: EventStream<v1::DecodeCommand>) -> Result<EventStream<v1::DecodeEvent>, Status>;
}

/// The service.
pub struct NodeService {
    host: Host,
    role: Arc<dyn Role>,
    card: Bytes,
}

impl NodeService {
    /// Serves `role`; `card` is the encoded model card.
    pub fn new(host: Host, role: Arc<dyn Role>, card: Vec<u8>) -> Self {
        Self {
            host,
            role,
            card: card.into(),
        }
    }

    /// The node that it serves.
    pub fn host(&self) -> &Host {
        &self.host
    }
}

/// The load figures that heartbeats carry.
pub fn load(host: &Host, check_integrity: bool) -> v1::NodeLoad {
    let engine = host.engine().load();
    let transfer = host.endpoint().stats();
    let fault = if check_integrity {
        host.pool().check_integrity().err()
    } else {
        None
    };
    if let Some(fault) = &fault {
        tracing::error!(%fault, "the block pool contradicts itself");
        host.note_error(fault);
    }
    let errors = host.errors().list(&host.clock());
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    v1::NodeLoad {
        blocks: Some(host.pool().counts().into()),
        queued_requests: count(engine.queued + transfer.queued_asks),
        queued_tokens: engine.queued_tokens,
        running_requests: count(engine.running),
        queue_capacity: count(host.limits().queue_capacity),
        prefill_tokens_per_s: engine.prefill_tokens_per_s as f32,
        decode_step_us: engine.decode_step_us as f32,
        last_errors: errors
            .into_iter()
            .map(|(age, message)| v1::NodeError {
                age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
                message,
            })
            .collect(),
        process: Some(v1::ProcessStatus {
            pid: process::pid(),
            open_files: count(process::open_files()),
            tasks: count(host.supervisor().tasks()),
            resident_bytes: process::resident_bytes(),
        }),
        handovers_out: count(transfer.handovers_out),
        handovers_in: count(transfer.handovers_in),
        integrity_faults: u32::from(fault.is_some()),
        paths: transfer
            .paths
            .iter()
            .map(|(kind, stats)| path_load(*kind, stats))
            .collect(),
    }
}

fn path_load(kind: PathKind, stats: &PathStats) -> v1::PathLoad {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    v1::PathLoad {
        path: kind.to_string(),
        open: count(stats.open),
        down: count(stats.down),
        bytes_per_second: stats.bytes_per_second,
        sent: stats.sent,
        received: stats.received,
        failed: stats.failed,
        fallbacks: stats.fallbacks,
    }
}

/// Shows the block states as metrics.
pub fn show_blocks(host: &Host) {
    let counts = host.pool().counts();
    let states = [
        ("free", counts.free),
        ("cached", counts.cached),
        ("referenced", counts.referenced),
        ("reserved", counts.reserved),
        ("quarantined", counts.quarantined),
    ];
    for (state, blocks) in states {
        metrics::gauge!("baton_node_blocks", "state" => state).set(f64::from(blocks));
    }
    metrics::gauge!("baton_node_requests").set(host.requests() as f64);
}

fn heartbeat(host: &Host, beat: u32) -> v1::HeartbeatResponse {
    let identity = host.identity();
    let state = if host.draining().is_cancelled() {
        NodeState::Draining
    } else {
        NodeState::Ready
    };
    let few = host.pool().counts().total <= INTEGRITY_BLOCKS;
    let check = (few && host.requests() == 0) || beat.is_multiple_of(INTEGRITY_EVERY);
    v1::HeartbeatResponse {
        node_id: identity.node_id.to_string(),
        instance: identity.instance.to_string(),
        role: v1::NodeRole::from(identity.role) as i32,
        state: state.to_string(),
        load: Some(load(host, check)),
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    type PrefillStream = EventStream<v1::PrefillEvent>;
    type DecodeStream = EventStream<v1::DecodeEvent>;
    type ModelCardStream = EventStream<v1::ModelCardChunk>;
    type HeartbeatStream = EventStream<v1::HeartbeatResponse>;

    async fn prefill(&self, request: Request<v1::PrefillRequest>) -> Result<Response<Self::PrefillStream>, Status> {
        let request = request.into_inner();
        let request_id = request
            .work
            .as_ref()
            .map(|work| work.request_id.clone())
            .unwrap_or_default();
        let mut response = Response::new(self.role.prefill(request)?);
        if let Ok(value) = request_id.parse() {
            response.metadata_mut().insert("x-request-id", value);
        }
        Ok(response)
    }

    async fn decode(
        &self,
        request: Request<Streaming<v1::DecodeCommand>>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        Ok(Response::new(self.role.decode(Box::pin(request.into_inner()))?))
    }

    async fn model_card(
        &self,
        _request: Request<v1::ModelCardRequest>,
    ) -> Result<Response<Self::ModelCardStream>, Status> {
        let card = self.card.clone();
        let starts = (0..card.len()).step_by(CARD_PIECE_BYTES);
        let pieces = starts.map(move |start| {
            let end = card.len().min(start + CARD_PIECE_BYTES);
            Ok(v1::ModelCardChunk {
                data: card.slice(start..end),
            })
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(pieces))))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<Self::HeartbeatStream>, Status> {
        let asked = u64::from(request.into_inner().interval_ms);
        let interval = if asked == 0 {
            HEARTBEAT_DEFAULT
        } else {
            Duration::from_millis(asked).max(HEARTBEAT_LEAST)
        };
        let (tx, rx) = mpsc::channel(1);
        let host = self.host.clone();
        self.host.supervisor().spawn("heartbeat", async move {
            let shutdown = host.supervisor().shutdown_token();
            let mut beat = 0;
            loop {
                if tx.send(Ok(heartbeat(&host, beat))).await.is_err() {
                    return;
                }
                beat = beat.wrapping_add(1);
                // A drain is told at once, so that no more work is sent here for an interval.
                let drained = async {
                    if host.draining().is_cancelled() {
                        std::future::pending::<()>().await;
                    }
                    host.draining().cancelled().await;
                };
                tokio::select! {
                    () = host.clock().sleep(interval) => {}
                    () = drained => {}
                    () = tx.closed() => return,
                    () = shutdown.cancelled() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx).map(|beat| beat))))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let request = request.into_inner();
        let own = self.host.identity().node_id.as_str();
        if !request.node_id.is_empty() && request.node_id != own {
            return Err(Status::failed_precondition(format!(
                "node_id is {}; this is {own}",
                request.node_id
            )));
        }
        self.host
            .begin_drain(request.deadline_ms.map_or(DRAIN_DEFAULT, Duration::from_millis));
        Ok(Response::new(v1::DrainResponse {}))
    }
}
