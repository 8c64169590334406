//! A coordinator's life: come up in order, serve, finish what runs, leave.
//!
//! Two supervisors keep the order: the process's one only says that the end has come; everything that running requests need
//! hangs on the inner one, which ends when they are over or out of time.

use crate::api::{grpc, http};
use crate::control::{Control, ControlPlan, Record};
use crate::driver::{Coordinator, CoordinatorOptions, RoutingOptions};
use crate::membership::{Members, WatchOptions, network, watch, watch_locations};
use crate::tenants::Tenants;
use crate::{Options, StartError, StoreChoice};
use baton_cluster_state::embedded::EmbeddedStore;
use baton_cluster_state::{Store, StoreAddress};
use baton_node_runtime::{
    AdminServer, Announcement, CancellationToken, Clock, Metrics, Readiness, Supervisor, announce, bind, process,
    telemetry,
};
use baton_scheduling::{AdmissionLimits, BlockIndex, Slo};
use baton_types::Instance;
use futures::stream;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

/// How often the end looks whether requests still run.
const DRAIN_LOOK: Duration = Duration::from_millis(20);
/// How long clients may take to read the end of their streams.
const GOODBYE: Duration = Duration::from_secs(1);
/// How long tasks may take to end once nothing is left to do.
const JOIN_DEADLINE: Duration = Duration::from_secs(3);

/// Runs a coordinator until the process is told to end.
///
/// # Errors
/// Whatever kept it from coming up, or broke it.
pub async fn run(options: Options, supervisor: Supervisor) -> Result<(), StartError> {
    options.validate()?;
    let metrics = telemetry::init(&options.process.telemetry)?;
    describe_metrics();
    options.process.watch_for_end(&supervisor);
    let ends = supervisor.shutdown_token();
    let service = until(&ends, Service::start(&options, metrics)).await??;
    announce::ready(&service.announcement);
    let broken = service.inner.shutdown_token();
    tokio::select! {
        () = ends.cancelled() => {}
        () = broken.cancelled() => {}
    }
    let result = service.stop(options.drain_timeout).await;
    match supervisor.fatal() {
        Some(reason) => Err(StartError::Fatal { reason }),
        None => result,
    }
}

/// Does `work` unless the process is told to end first.
async fn until<T>(ends: &CancellationToken, work: impl Future<Output = T>) -> Result<T, StartError> {
    tokio::select! {
        () = ends.cancelled() => Err(StartError::Interrupted),
        result = work => Ok(result),
    }
}

/// A coordinator that serves. Tests run several in one process.
pub struct Service {
    coordinator: Coordinator,
    inner: Supervisor,
    doors: CancellationToken,
    readiness: Readiness,
    clock: Clock,
    /// Where it is reached.
    pub announcement: Announcement,
}

impl Service {
    /// Comes up: sockets first, so that a taken port is said at once; then the store; then the doors.
    ///
    /// # Errors
    /// Whatever kept it from coming up.
    pub async fn start(options: &Options, metrics: Metrics) -> Result<Self, StartError> {
        let (clock, inner, instance) = (Clock::new(), Supervisor::new(), Instance::random());
        let plan = options.control.plan(routing(options))?;
        let http_listener = bind("--http-listen", options.http_listen).await?;
        let grpc_listener = bind("--grpc-listen", options.grpc_listen).await?;
        let http_address = address("--http-listen", &http_listener)?;
        let grpc_address = address("--grpc-listen", &grpc_listener)?;
        let readiness = Readiness::new();
        let admin = AdminServer::start(options.process.admin_listen, readiness.clone(), metrics, &inner).await?;
        let (store, embedded) = open_store(options, clock, &inner).await?;
        store.claim_coordinator(instance).await?;

        let tenants = Tenants::load(options.tenants.as_deref(), clock)?;
        let index = BlockIndex::new(options.index_locations_max);
        let members = Members::new(clock, options.lease_ttl, options.inhibit, index, network());
        let watching = WatchOptions {
            members: members.clone(),
            instance,
            heartbeat: options.heartbeat,
            clock,
            supervisor: inner.clone(),
        };
        follow(&store, watching);
        let coordinator = Coordinator::new(CoordinatorOptions {
            members,
            instance,
            limits: AdmissionLimits {
                requests_max: options.requests_max,
                queued_max: options.queue,
            },
            tenants,
            routing: routing(options),
            decisions_max: options.decisions_max,
            record: plan
                .as_ref()
                .map_or_else(Record::default, |plan| plan.record(clock.now())),
            timeout_default: options.default_timeout,
            timeout_max: options.timeout_max,
            clock,
            supervisor: inner.clone(),
        });
        let start = |plan: ControlPlan| Control::start(plan, &coordinator, &store, clock, &inner);
        let control = plan.map_or_else(Control::default, start);
        let doors = CancellationToken::new();
        let door = grpc::DoorOptions {
            coordinator: coordinator.clone(),
            control,
            store,
            store_name: embedded.map_or_else(|| options.store.to_string(), |address| format!("embedded at {address}")),
            body_bytes_max: usize::try_from(options.body_bytes_max).unwrap_or(usize::MAX),
            streams_max: options.requests_max.saturating_add(1024),
            readiness: readiness.clone(),
        };
        grpc::serve(grpc_listener, door, &inner, doors.clone())?;
        serve_http(http_listener, options, &coordinator, &inner, &doors);
        if options.tenants.is_none() {
            warn_of_open_doors(&[("--http-listen", http_address), ("--grpc-listen", grpc_address)]);
        }
        tracing::info!(%instance, http = %http_address, grpc = %grpc_address, store = %options.store, "ready");
        let announcement = Announcement {
            role: "coordinator".to_owned(),
            node_id: instance.to_string(),
            pid: process::pid(),
            grpc: Some(grpc_address.to_string()),
            http: Some(http_address.to_string()),
            admin: Some(admin.address().to_string()),
            store: embedded.map(|address| address.to_string()),
        };
        Ok(Self {
            coordinator,
            inner,
            doors,
            readiness,
            clock,
            announcement,
        })
    }

    /// Takes nothing new, lets requests finish for at most `deadline`, cancels the rest, and ends every task.
    ///
    /// # Errors
    /// Where a task had failed that the coordinator cannot do without.
    pub async fn stop(self, deadline: Duration) -> Result<(), StartError> {
        self.readiness.set(false, "draining");
        self.coordinator.close();
        self.doors.cancel();
        if !self.is_empty_within(deadline).await {
            tracing::warn!(
                requests = self.coordinator.requests(),
                "requests are cut short by the end"
            );
            self.coordinator.cancel_all();
            self.is_empty_within(GOODBYE).await;
        }
        // The doors end by themselves once each stream is read to its end.
        let doors_end = async {
            while self
                .inner
                .task_names()
                .iter()
                .any(|name| grpc::TASK == *name || HTTP_TASK == *name)
            {
                self.clock.sleep(DRAIN_LOOK).await;
            }
        };
        let _ = self.clock.timeout(GOODBYE, doors_end).await;
        self.inner.begin_shutdown();
        if let Err(tasks) = self.inner.join(JOIN_DEADLINE).await {
            tracing::warn!(?tasks, "tasks still run at the end");
        }
        match self.inner.fatal() {
            Some(reason) => Err(StartError::Fatal { reason }),
            None => Ok(()),
        }
    }

    async fn is_empty_within(&self, deadline: Duration) -> bool {
        let empty = async {
            while self.coordinator.requests() > 0 {
                self.clock.sleep(DRAIN_LOOK).await;
            }
        };
        self.clock.timeout(deadline, empty).await.is_ok()
    }
}

/// Follows who is in the cluster, and which node holds which blocks.
fn follow(store: &Store, watching: WatchOptions) {
    let locations = stream::unfold(store.watch_blocks(), |mut watch| async {
        Some((watch.next().await, watch))
    });
    let (members, clock) = (watching.members.clone(), watching.clock);
    watch_locations(locations, members, clock, &watching.supervisor);
    let nodes = stream::unfold(store.watch_nodes(), |mut watch| async {
        Some((watch.next().await, watch))
    });
    watch(nodes, watching);
}

fn routing(options: &Options) -> RoutingOptions {
    RoutingOptions {
        policy: options.routing_policy,
        slo: Slo {
            ttft: options.slo_ttft,
            itl: options.slo_itl,
        },
    }
}

fn address(flag: &'static str, listener: &TcpListener) -> Result<SocketAddr, StartError> {
    listener
        .local_addr()
        .map_err(|source| StartError::Socket { flag, source })
}

/// The store, and where the embedded one listens.
async fn open_store(
    options: &Options,
    clock: Clock,
    inner: &Supervisor,
) -> Result<(Store, Option<SocketAddr>), StartError> {
    let (store_address, embedded) = match &options.store {
        StoreChoice::At(at) => (at.clone(), None),
        StoreChoice::Embedded => {
            let listener = bind("--store-listen", options.store_listen).await?;
            let store = EmbeddedStore::serve(listener, clock, inner.clone())
                .await
                .map_err(|source| StartError::Socket {
                    flag: "--store-listen",
                    source,
                })?;
            // Others may reach it by any of this machine's addresses; this process by loopback.
            let mut own = store.address();
            if own.ip().is_unspecified() {
                own.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
            }
            warn_of_open_doors(&[("--store-listen", store.address())]);
            (StoreAddress::Etcd(vec![own.to_string()]), Some(store.address()))
        }
    };
    let store = Store::connect(options.store_options(store_address), clock, inner.clone()).await?;
    Ok((store, embedded))
}

const HTTP_TASK: &str = "http-door";

fn serve_http(
    listener: TcpListener,
    options: &Options,
    coordinator: &Coordinator,
    inner: &Supervisor,
    doors: &CancellationToken,
) {
    use axum::serve::ListenerExt;
    let limits = http::HttpOptions {
        body_bytes_max: usize::try_from(options.body_bytes_max).unwrap_or(usize::MAX),
        body_timeout: options.body_timeout,
    };
    let router = http::router(Arc::new(coordinator.clone()), limits);
    let listener = listener.tap_io(|socket| {
        // Without it a token may wait for the client's acknowledgement of the one before.
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "socket keeps its delay");
        }
    });
    let (closing, shutdown) = (doors.clone(), inner.shutdown_token());
    let failing = inner.clone();
    inner.spawn(HTTP_TASK, async move {
        let serving = axum::serve(listener, router).with_graceful_shutdown(closing.cancelled_owned());
        tokio::select! {
            () = shutdown.cancelled() => {}
            result = async { serving.await } => {
                if let Err(error) = result {
                    failing.fail(format!("the HTTP door failed: {error}"));
                }
            }
        }
    });
}

/// Keys for clients come with tenants; until then whoever reaches a door may use it.
fn warn_of_open_doors(doors: &[(&'static str, SocketAddr)]) {
    for (flag, address) in doors.iter().filter(|(_, address)| !address.ip().is_loopback()) {
        tracing::warn!(flag, %address, "listens beyond this machine without keys: whoever reaches it may use it");
    }
}

fn describe_metrics() {
    metrics::describe_counter!("baton_coordinator_requests_total", "Requests ended, by outcome");
    metrics::describe_counter!("baton_coordinator_tokens_total", "Tokens merged into clients' streams");
    metrics::describe_counter!("baton_coordinator_node_failures_total", "Times a node failed a request");
    metrics::describe_counter!("baton_coordinator_nodes_lost_total", "Times a node's heartbeat broke");
    metrics::describe_counter!("baton_coordinator_http_responses_total", "HTTP responses, by status");
    metrics::describe_gauge!("baton_coordinator_requests", "Requests let in and not over");
    metrics::describe_gauge!(
        "baton_coordinator_queued_requests",
        "Of these, those that wait for a place on a node"
    );
    metrics::describe_histogram!(
        "baton_coordinator_location_staleness_seconds",
        "Age of a node's oldest published change when the index knew it"
    );
    metrics::describe_gauge!("baton_coordinator_indexed_blocks", "Block locations that routing knows");
    metrics::describe_gauge!(
        "baton_coordinator_index_bytes",
        "Memory of the index of block locations"
    );
    metrics::describe_counter!(
        "baton_coordinator_unindexed_blocks_total",
        "Block locations left out because the index was full"
    );
    metrics::describe_histogram!("baton_coordinator_ttft_seconds", "Arrival to first token");
    metrics::describe_histogram!(
        "baton_coordinator_frame_seconds",
        "A node's tokens received to handed to the client"
    );
}
