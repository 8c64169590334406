//! A node's life: come up in order, serve, drain, leave.
//!
//! Two supervisors keep the order: the process's one only says that the end has come; everything that a running request
//! needs hangs on the inner one, which ends when the node is empty or out of time.

use crate::blocks::PoolBlocks;
use crate::error::BringUpError;
use crate::host::{Host, NodeIdentity, NodeLimits, NodeParts};
use crate::model::{self, LoadedModel};
use crate::options::NodeOptions;
use crate::phase::Goal;
use crate::roles::Roles;
use crate::self_test;
use crate::service::{self, NodeService};
use baton_cluster_state::{NodeRecord, Registration, Store};
use baton_engine::BlockPool;
use baton_kv_transfer::{Endpoint, Identity};
use baton_node_runtime::{
    AdminServer, Announcement, Clock, Metrics, Readiness, Supervisor, announce, bind, process, telemetry,
};
use baton_proto::v1::node_server::NodeServer;
use baton_text::Grammars;
use baton_types::{Instance, KvDtype, KvGeometry, ModelFingerprint, NodeId, NodeRole, NodeState, NumericsId};
use std::future::Future;
use std::time::Duration;
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

/// A coordinator that does not answer for this long and as long again is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Prompts of the longest contexts fit.
const MESSAGE_BYTES_MAX: usize = 32 << 20;
/// How long tasks may take to end once nothing is left to do.
const JOIN_DEADLINE: Duration = Duration::from_secs(5);
/// How long requests may take to end once their time is over: they only say so.
const GIVE_UP: Duration = Duration::from_secs(3);
/// How often a draining node looks whether it is empty.
const DRAIN_LOOK: Duration = Duration::from_millis(20);
/// How often block states are shown as metrics.
const SHOW_EVERY: Duration = Duration::from_secs(1);

/// Version of this binary, as peers and records see it.
pub const BUILD: &str = env!("CARGO_PKG_VERSION");

/// Runs one node until the process is told to end or the node is drained. `make_roles` gets the node once it stands.
///
/// # Errors
/// Whatever kept it from coming up, or broke it.
pub async fn run<R: Into<Roles>>(
    options: NodeOptions,
    role: NodeRole,
    make_roles: impl FnOnce(Host) -> R,
    supervisor: Supervisor,
) -> Result<(), BringUpError> {
    options.validate()?;
    let metrics = telemetry::init(&options.process.telemetry)?;
    describe_metrics();
    options.process.watch_for_end(&supervisor);
    run_beside_others(options, role, make_roles, metrics, supervisor).await
}

/// As [`run`] in a process that holds several roles: its logs, metrics and signals are the caller's business.
///
/// # Errors
/// As [`run`].
pub async fn run_beside_others<R: Into<Roles>>(
    options: NodeOptions,
    role: NodeRole,
    make_roles: impl FnOnce(Host) -> R,
    metrics: Metrics,
    supervisor: Supervisor,
) -> Result<(), BringUpError> {
    options.validate()?;
    model::check_model(&options)?;
    model::check_kv_bytes(&options)?;
    let inner = Supervisor::new();
    let result = live(&options, role, make_roles, metrics, &supervisor, &inner).await;
    inner.begin_shutdown();
    if let Err(tasks) = inner.join(JOIN_DEADLINE).await {
        tracing::warn!(?tasks, "tasks still run at the end");
    }
    match inner.fatal().or(supervisor.fatal()) {
        Some(reason) => Err(BringUpError::Fatal { reason }),
        None => result,
    }
}

async fn live<R: Into<Roles>>(
    options: &NodeOptions,
    role: NodeRole,
    make_roles: impl FnOnce(Host) -> R,
    metrics: baton_node_runtime::Metrics,
    supervisor: &Supervisor,
    inner: &Supervisor,
) -> Result<(), BringUpError> {
    let clock = Clock::new();
    let listener = bind("--listen", options.listen).await?;
    let grpc = listener.local_addr().map_err(|source| BringUpError::Socket {
        flag: "--listen",
        source,
    })?;
    let readiness = Readiness::new();
    let admin = AdminServer::start(options.process.admin_listen, readiness.clone(), metrics, inner).await?;
    let identity = identity(options, role);
    let ends = supervisor.shutdown_token();
    let store = until(&ends, Store::connect(options.store_options(), clock, inner.clone())).await??;
    let record = starting_record(options, &identity, options.advertised(grpc));
    let registration = until(&ends, store.register(record)).await??;
    let come_up = come_up(options, identity.clone(), clock, inner);
    let (host, card) = match until(&ends, come_up).await.and_then(|result| result) {
        Ok(up) => up,
        Err(error) => {
            registration.deregister().await;
            return Err(error);
        }
    };
    let roles = make_roles(host.clone()).into();
    let digest = card.digest();
    let service = NodeService::new(host.clone(), roles, card.to_bytes());
    serve(listener, service, inner).await?;
    let (peer, facts) = (host.endpoint().peer(), host.model().clone());
    let blocks = host.pool().counts().total;
    let fits = blocks.saturating_mul(facts.geometry.block_tokens);
    registration
        .update(|record| {
            record.state = NodeState::Ready;
            record.transfer = peer.addresses;
            record.model = card.name.clone();
            record.card_digest = digest;
            record.fingerprint = facts.fingerprint;
            record.numerics = facts.numerics;
            record.geometry = facts.geometry;
            record.stub = facts.stub;
            record.blocks = blocks;
            record.context_tokens = facts.config.context_tokens.min(fits);
        })
        .await;
    let pool = host.pool().clone();
    registration.publish_blocks(options.location_budget(), move || pool.take_changes());
    readiness.set(true, "ready");
    tracing::info!(node_id = %identity.node_id, role = %identity.role, grpc = %grpc, model = %card.name, blocks, "ready");
    announce::ready(&Announcement {
        role: identity.role.to_string(),
        node_id: identity.node_id.to_string(),
        pid: process::pid(),
        grpc: Some(options.advertised(grpc)),
        http: None,
        admin: Some(admin.address().to_string()),
        store: Some(options.store.to_string()),
    });
    show_blocks(&host, inner);
    let broken = inner.shutdown_token();
    let deadline = loop {
        tokio::select! {
            () = ends.cancelled() => break options.drain_timeout,
            () = broken.cancelled() => break Duration::ZERO,
            phase = host.until_phase(|phase| !phase.takes_work()) => match phase.goal {
                Goal::Leave { within } => break within,
                Goal::Change { to, within } => tokio::select! {
                    () = ends.cancelled() => break options.drain_timeout,
                    () = broken.cancelled() => break Duration::ZERO,
                    () = change_role(&host, &registration, options, to, within) => {}
                },
                Goal::Work => {}
            },
        }
    };
    readiness.set(false, "draining");
    leave(&host, registration, deadline).await;
    Ok(())
}

/// Takes up another role once what the present one has is gone. Nothing is loaded again, and the cache stays. Given up where
/// the node is to leave meanwhile; where this future is dropped, nothing has changed.
async fn change_role(host: &Host, registration: &Registration, options: &NodeOptions, to: NodeRole, within: Duration) {
    let (from, node_id) = (host.role(), &host.identity().node_id);
    tracing::info!(%node_id, role = %from, %to, requests = host.requests(), "changing role");
    registration.update(|record| record.state = NodeState::Draining).await;
    if !emptied(host, within).await {
        tracing::error!(%node_id, requests = host.requests(), "requests do not end, so the role changes under them");
    }
    if host.phase().leaves() {
        return;
    }
    host.engine().set_running_max(options.running_max(to));
    // The record first: whoever hears by heartbeat that the node is ready must not take it for one of the old role.
    registration
        .update(|record| (record.role, record.state) = (to, NodeState::Ready))
        .await;
    if host.end_role_change() {
        tracing::info!(%node_id, role = %to, "ready in another role");
    }
}

/// Does `work` unless the process is told to end first.
async fn until<T>(
    ends: &baton_node_runtime::CancellationToken,
    work: impl Future<Output = T>,
) -> Result<T, BringUpError> {
    tokio::select! {
        () = ends.cancelled() => Err(BringUpError::Interrupted),
        done = work => Ok(done),
    }
}

fn identity(options: &NodeOptions, role: NodeRole) -> NodeIdentity {
    let instance = Instance::random();
    let node_id = NodeId::new(options.node_id.clone().unwrap_or_else(|| format!("{role}-{instance}")));
    NodeIdentity {
        node_id,
        instance,
        role,
    }
}

/// What can be said before the model is loaded; nobody sends work to a node that starts.
fn starting_record(options: &NodeOptions, identity: &NodeIdentity, grpc_address: String) -> NodeRecord {
    let NodeIdentity {
        node_id,
        instance,
        role,
    } = identity.clone();
    let dtype = KvDtype::from(options.kv_dtype);
    NodeRecord {
        node_id,
        instance,
        role,
        state: NodeState::Starting,
        grpc_address,
        transfer: Vec::new(),
        model: options.model_name.clone().unwrap_or_else(|| options.model.clone()),
        card_digest: String::new(),
        fingerprint: ModelFingerprint([0; 32]),
        numerics: NumericsId(String::new()),
        geometry: KvGeometry {
            layers: 0,
            kv_heads: 0,
            head_dim: 0,
            block_tokens: options.block_tokens,
            dtype,
        },
        host_id: process::host_id(),
        build: BUILD.to_owned(),
        stub: false,
        blocks: 0,
        queue_capacity: u32::try_from(options.queue).unwrap_or(u32::MAX),
        context_tokens: 0,
    }
}

/// Loads the model, maps and fills the arena, tests both, opens the endpoint, starts the engine.
async fn come_up(
    options: &NodeOptions,
    identity: NodeIdentity,
    clock: Clock,
    inner: &Supervisor,
) -> Result<(Host, baton_text::ModelCard), BringUpError> {
    let load_options = options.clone();
    let load = move || -> Result<_, BringUpError> {
        let LoadedModel { mut backend, card } = model::load(&load_options, clock)?;
        let geometry = backend
            .config()
            .kv_geometry(load_options.block_tokens, load_options.kv_dtype.into());
        let arena = model::arena(&load_options, geometry)?;
        let pool = BlockPool::new(u32::try_from(arena.blocks()).unwrap_or(u32::MAX));
        self_test::run(&mut *backend, &arena.view(), &pool)?;
        Ok((backend, card, arena, PoolBlocks::new(pool)))
    };
    let (tx, rx) = tokio::sync::oneshot::channel();
    inner.spawn_blocking("load", move || {
        // Nobody waits any more where the process was told to end.
        let _ = tx.send(load());
    });
    let loaded = rx.await.map_err(|_| BringUpError::Fatal {
        reason: "loading the model panicked".into(),
    })?;
    let (backend, card, arena, blocks) = loaded?;
    let transfer_identity = Identity {
        node: identity.node_id.clone(),
        instance: identity.instance,
        fingerprint: backend.fingerprint(),
        geometry: *arena.view().geometry(),
        numerics: backend.numerics().clone(),
        build: BUILD.to_owned(),
    };
    let endpoint = Endpoint::start(
        options.endpoint_options(),
        transfer_identity,
        arena.view(),
        blocks.clone(),
        clock,
        inner.clone(),
    )
    .await?;
    let limits = NodeLimits {
        queue_capacity: options.queue,
        running_max: options.running_max(identity.role),
        chunk_tokens: options.chunk_tokens,
    };
    let host = Host::start(NodeParts {
        identity,
        limits,
        backend,
        speculation: options.speculation,
        eos_tokens: card.eos_tokens.clone(),
        grammars: Grammars::of_card(&card),
        arena: arena.view(),
        blocks,
        endpoint,
        clock,
        supervisor: inner.clone(),
    });
    Ok((host, card))
}

/// Serves gRPC with health and reflection until the inner supervisor ends.
async fn serve(listener: TcpListener, service: NodeService, inner: &Supervisor) -> Result<(), BringUpError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<NodeServer<NodeService>>().await;
    let host = service.host().clone();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(baton_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| BringUpError::Fatal {
            reason: format!("gRPC reflection: {error}"),
        })?;
    let node = NodeServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let shutdown = inner.shutdown_token();
    let ends = shutdown.clone();
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .tcp_keepalive(Some(KEEP_ALIVE))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(node)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async move {
            ends.cancelled().await;
        });
    let failing = inner.clone();
    inner.spawn("grpc", async move {
        if let Err(error) = server.await {
            failing.fail(format!("the gRPC server broke: {error}"));
        }
    });
    inner.spawn("health", async move {
        tokio::select! {
            _ = host.until_phase(|phase| phase.leaves()) => health.set_not_serving::<NodeServer<NodeService>>().await,
            () = shutdown.cancelled() => {}
        }
    });
    Ok(())
}

fn show_blocks(host: &Host, inner: &Supervisor) {
    let (host, shutdown) = (host.clone(), inner.shutdown_token());
    inner.spawn("show-blocks", async move {
        loop {
            service::show_blocks(&host);
            tokio::select! {
                () = host.clock().sleep(SHOW_EVERY) => {}
                () = shutdown.cancelled() => return,
            }
        }
    });
}

/// Waits until nothing of a request is left. What runs after `within` is told to give up, so that it is done anew elsewhere;
/// false where even that does not help. A node that is told to leave while it changes its role stops waiting.
async fn emptied(host: &Host, within: Duration) -> bool {
    let clock = host.clock();
    let goal = host.phase().goal;
    let empty = async {
        while !host.is_empty() && host.phase().goal == goal {
            clock.sleep(DRAIN_LOOK).await;
        }
    };
    if clock.timeout(within, empty).await.is_ok() {
        return true;
    }
    tracing::warn!(requests = host.requests(), "drain deadline passed, requests are ended");
    host.expire();
    let empty = async {
        while !host.is_empty() {
            clock.sleep(DRAIN_LOOK).await;
        }
    };
    clock.timeout(GIVE_UP, empty).await.is_ok()
}

/// Takes no new work, lets what runs finish within `deadline`, leaves the cluster.
async fn leave(host: &Host, registration: Registration, deadline: Duration) {
    host.begin_drain(deadline);
    tracing::info!(requests = host.requests(), "draining");
    registration.update(|record| record.state = NodeState::Draining).await;
    if !emptied(host, deadline).await {
        tracing::warn!(
            requests = host.requests(),
            "requests do not end, the node leaves without them"
        );
    }
    registration.deregister().await;
    host.stop_engine().await;
    host.endpoint().shutdown().await;
    tracing::info!(node_id = %host.identity().node_id, "left the cluster");
}

fn describe_metrics() {
    use metrics::{describe_counter, describe_gauge, describe_histogram};
    describe_gauge!("baton_node_blocks", "KV blocks by state");
    describe_gauge!("baton_node_requests", "Requests from admission to their last word");
    describe_gauge!(
        "baton_node_queued_requests",
        "Requests that wait for blocks or a reservation"
    );
    describe_gauge!("baton_node_queued_tokens", "Prompt tokens that wait to be computed");
    describe_gauge!("baton_node_running_requests", "Requests that are being computed");
    describe_histogram!("baton_node_step_seconds", "Time of one engine step");
    describe_histogram!("baton_node_queue_seconds", "Time that requests waited for blocks");
    describe_histogram!(
        "baton_node_handover_exposed_seconds",
        "Hand-over time that compute did not hide"
    );
    describe_counter!("baton_node_prefill_tokens_total", "Prompt tokens computed");
    describe_counter!(
        "baton_node_cached_tokens_total",
        "Prompt tokens whose KV came from the prefix cache"
    );
    describe_counter!("baton_node_decode_tokens_total", "Tokens decoded");
    describe_counter!(
        "baton_node_preemptions_total",
        "Sequences that gave their blocks back and began anew"
    );
    describe_counter!(
        "baton_node_steps_aborted_total",
        "Steps broken off because nobody wanted them any more"
    );
    describe_counter!(
        "baton_node_handed_on_total",
        "Running sequences handed to another decode node"
    );
    describe_counter!("baton_node_requests_total", "Requests by role and how they ended");
    describe_gauge!(
        "baton_store_location_pending_seconds",
        "How long the oldest change of this node's cache has waited to be written to the store"
    );
    describe_counter!(
        "baton_store_location_writes_total",
        "Segments of block locations written to the store"
    );
    describe_counter!("baton_store_location_written_bytes_total", "Their sizes");
    describe_counter!(
        "baton_engine_cache_evicted_blocks_total",
        "Cached blocks given to new contents"
    );
}
