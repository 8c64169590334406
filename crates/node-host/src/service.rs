//! The gRPC service `baton.v1.Node`: wire forms in, wire forms out. What a request means is the role's business.

use crate::host::Host;
use crate::phase::RoleRefused;
use crate::roles::{EventStream, Roles};
use baton_kv_transfer::{PathKind, PathStats};
use baton_node_runtime::process;
use baton_proto::convert;
use baton_proto::v1::{self, node_server::Node};
use bytes::Bytes;
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
/// A drain or a change of role that names no deadline.
const DRAIN_DEFAULT: Duration = Duration::from_secs(120);
/// While it computes, or has very many blocks, the block pool is checked on one heartbeat in so many.
const INTEGRITY_EVERY: u32 = 16;
/// More blocks take a millisecond or so to check, during which nobody gets one.
const INTEGRITY_BLOCKS: u32 = 100_000;

/// The service.
pub struct NodeService {
    host: Host,
    roles: Roles,
    card: Bytes,
}

impl NodeService {
    /// Serves the host's present role; `card` is the encoded model card.
    pub fn new(host: Host, roles: Roles, card: Vec<u8>) -> Self {
        Self {
            host,
            roles,
            card: card.into(),
        }
    }

    /// The node that it serves.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Whoever names a node means this one; nobody need name it.
    fn check_name(&self, named: &str) -> Result<(), Status> {
        let own = self.host.identity().node_id.as_str();
        if named.is_empty() || named == own {
            return Ok(());
        }
        Err(Status::failed_precondition(format!(
            "node_id is {named}; this is {own}"
        )))
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
    let (identity, phase) = (host.identity(), host.phase());
    let few = host.pool().counts().total <= INTEGRITY_BLOCKS;
    let check = (few && host.requests() == 0) || beat.is_multiple_of(INTEGRITY_EVERY);
    v1::HeartbeatResponse {
        node_id: identity.node_id.to_string(),
        instance: identity.instance.to_string(),
        role: v1::NodeRole::from(phase.role) as i32,
        state: phase.state().to_string(),
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
        let mut response = Response::new(self.roles.of(self.host.role()).prefill(request)?);
        if let Ok(value) = request_id.parse() {
            response.metadata_mut().insert("x-request-id", value);
        }
        Ok(response)
    }

    async fn decode(
        &self,
        request: Request<Streaming<v1::DecodeCommand>>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let role = self.roles.of(self.host.role());
        Ok(Response::new(role.decode(Box::pin(request.into_inner()))?))
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
            let (shutdown, mut phases) = (host.supervisor().shutdown_token(), host.phases());
            let mut beat = 0;
            loop {
                if tx.send(Ok(heartbeat(&host, beat))).await.is_err() {
                    return;
                }
                beat = beat.wrapping_add(1);
                tokio::select! {
                    () = host.clock().sleep(interval) => {}
                    // A drain is told at once, so that no more work is sent here for an interval.
                    _ = phases.changed() => {}
                    () = tx.closed() => return,
                    () = shutdown.cancelled() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx).map(|beat| beat))))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let request = request.into_inner();
        self.check_name(&request.node_id)?;
        self.host
            .begin_drain(request.deadline_ms.map_or(DRAIN_DEFAULT, Duration::from_millis));
        Ok(Response::new(v1::DrainResponse {}))
    }

    async fn set_role(&self, request: Request<v1::SetRoleRequest>) -> Result<Response<v1::SetRoleResponse>, Status> {
        let request = request.into_inner();
        self.check_name(&request.node_id)?;
        let role = convert::node_role(request.role)?;
        let within = request.deadline_ms.map_or(DRAIN_DEFAULT, Duration::from_millis);
        let refused = |refused: RoleRefused| Status::failed_precondition(refused.to_string());
        let present = self.host.role();
        if role != present && !self.roles.can_change() {
            return Err(refused(RoleRefused::SingleRole { role: present }));
        }
        self.host.begin_role_change(role, within).map_err(refused)?;
        Ok(Response::new(v1::SetRoleResponse {}))
    }
}
