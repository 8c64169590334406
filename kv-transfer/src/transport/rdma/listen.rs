//! The transport itself: its devices, its listener, the receiver's end of the rendezvous, and its end.

use super::arena::ArenaOptions;
use super::connect::{connect, tune};
use super::device::{Device, nearest};
use super::hello::{Hello, Verdict};
use super::pair::{EndOptions, PairEnd};
use super::receive::{MESSAGES, RECEIVES_MIN, Receiver};
use super::send::ended;
use super::verbs::{Port, Registration};
use crate::transport::lanes::LANES_MAX;
use crate::transport::local::check_same;
use crate::transport::writers::{NoEntry, WriterEntry, Writers};
use crate::transport::{ConnectError, Local, Path, Transport, metric};
use crate::{PathKind, Peer, WIRE_MAJOR};
use baton_types::Instance;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Rendezvous that are not over yet, all together.
const HANDSHAKES_MAX: usize = 256;
/// Rest after the system refused to accept, most likely for want of descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// Most receives of a queue pair: credits are counted in 16 bits.
const RECEIVES_MAX: usize = 4096;

/// How an rdma transport is made.
#[derive(Debug, Clone)]
pub struct RdmaOptions {
    /// Where writers come to the rendezvous, over tcp. Port 0 lets the system choose.
    pub listen: SocketAddr,
    /// The host that peers are told, where it is not the one listened on.
    pub advertise: Option<String>,
    /// The devices to use by name, such as `mlx5_0`; all of them where none is named.
    pub devices: Vec<String>,
    /// Queue pairs of each path that it opens, spread over the devices.
    pub connections_per_peer: usize,
    /// Bound on connecting, rendezvous included.
    pub connect_timeout: Duration,
    /// Bound on a peer that gives no credit.
    pub progress_timeout: Duration,
    /// Bytes queued on one path before writes wait.
    pub bytes_in_flight_max: usize,
    /// Receives posted on each queue pair of a writer: notifications that can be under way.
    pub receives: usize,
    /// Most bytes of one registration of the arena, beside what the device allows.
    pub region_bytes_max: u64,
    /// The dma-buf that the arena lies in, where that is a device's memory. Where the network's device takes no dma-buf, the
    /// memory is registered as the host's, and [`RdmaTransport::registration`] says so.
    pub dma_buf: Option<Arc<OwnedFd>>,
}

impl RdmaOptions {
    /// Receives where nothing else is wanted: 2 KiB of memory each, per queue pair.
    pub const RECEIVES: usize = 256;
}

/// Why an rdma transport did not start.
#[derive(Debug, thiserror::Error)]
pub enum RdmaError {
    /// There are no devices, or not those named, or they refuse.
    #[error("{reason}")]
    Device {
        /// What was seen.
        reason: String,
    },
    /// The address of the rendezvous cannot be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
}

pub(super) struct Shared {
    pub(super) options: RdmaOptions,
    pub(super) local: Local,
    pub(super) devices: Vec<Arc<Device>>,
    /// Ends the paths that were opened from here, the listener and the rendezvous.
    pub(super) stop: CancellationToken,
    writers: Arc<Writers>,
    handshakes: Arc<Semaphore>,
    /// All tasks of this transport.
    pub(super) tasks: TaskTracker,
    paths: AtomicUsize,
    address: String,
}

impl Shared {
    /// Counts paths, which take their first device by turns.
    pub(super) fn next_path(&self) -> usize {
        self.paths.fetch_add(1, Ordering::Relaxed)
    }
}

/// The rdma transport of one process. Dropped without `shutdown`, it stops listening and ends all connections by and by.
pub struct RdmaTransport(Arc<Shared>);

impl Drop for RdmaTransport {
    fn drop(&mut self) {
        self.0.stop.cancel();
        self.0.writers.stop();
    }
}

impl RdmaTransport {
    /// The names of this host's devices; none where it has no rdma.
    pub fn devices() -> Vec<String> {
        super::verbs::Context::names().unwrap_or_default()
    }

    /// Opens the devices, registers the arena with each (which pins its memory), and listens.
    ///
    /// # Errors
    /// No device, a device that refuses, or an address that cannot be had.
    pub async fn start(options: RdmaOptions, local: Local) -> Result<Self, RdmaError> {
        let address = options.listen;
        let listen = |source| RdmaError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let bound = listener.local_addr().map_err(listen)?;
        let address = match &options.advertise {
            Some(host) if host.contains(':') && !host.starts_with('[') => format!("rdma://[{host}]:{}", bound.port()),
            Some(host) => format!("rdma://{host}:{}", bound.port()),
            None => format!("rdma://{bound}"),
        };
        let devices = open_devices(&options, &local).await?;
        let shared = Arc::new(Shared {
            writers: Writers::new(PathKind::Rdma, Arc::clone(&local.landing)),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            paths: AtomicUsize::new(0),
            devices,
            options,
            local,
            address,
        });
        for device in &shared.devices {
            let (device, stop) = (Arc::clone(device), shared.stop.clone());
            let watching = async move {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => {}
                    () = device.watch() => {}
                }
            };
            let watching = shared.tasks.track_future(watching);
            shared.local.supervisor.spawn("transfer-rdma-events", watching);
        }
        let accepting = Arc::clone(&shared);
        let accepting = async move {
            tokio::select! {
                biased;
                () = accepting.stop.cancelled() => {}
                () = accept(&accepting, &listener) => {}
            }
        };
        shared
            .local
            .supervisor
            .spawn("transfer-rdma-accept", shared.tasks.track_future(accepting));
        Ok(Self(shared))
    }

    /// How each device has the arena, in words: `host`, `dma-buf`, or why the latter became the former.
    pub fn registration(&self) -> Vec<String> {
        let of = |device: &Arc<Device>| match device.arena().registration() {
            Registration::Host => "host".to_owned(),
            Registration::DmaBuf => "dma-buf".to_owned(),
            Registration::HostInsteadOfDmaBuf { reason } => format!("host instead of dma-buf: {reason}"),
        };
        self.0.devices.iter().map(of).collect()
    }
}

/// Opening pins memory, which takes a second per few gigabytes: not on a thread that others wait for.
async fn open_devices(options: &RdmaOptions, local: &Local) -> Result<Vec<Arc<Device>>, RdmaError> {
    let (names, arena) = (options.devices.clone(), local.arena.clone());
    let arena_options = ArenaOptions {
        region_bytes_max: options.region_bytes_max,
        dma_buf: options.dma_buf.clone(),
    };
    let (told, opened) = tokio::sync::oneshot::channel();
    let open = move || {
        let _ = told.send(Device::open_all(&names, &arena, &arena_options));
    };
    local.supervisor.spawn_blocking("transfer-rdma-open", open);
    let reason = match opened.await {
        Ok(Ok(devices)) => return Ok(devices),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "opening the devices was given up".to_owned(),
    };
    Err(RdmaError::Device { reason })
}

impl Transport for RdmaTransport {
    fn path(&self) -> PathKind {
        PathKind::Rdma
    }

    fn address(&self) -> String {
        self.0.address.clone()
    }

    fn connect(&self, peer: &Peer, address: &str) -> BoxFuture<'_, Result<Arc<dyn Path>, ConnectError>> {
        let (wanted, address) = (peer.instance, address.to_owned());
        async move { connect(&self.0, wanted, &address).await }.boxed()
    }

    fn disconnect_instance(&self, instance: Instance) -> BoxFuture<'_, ()> {
        self.0.writers.disconnect(Some(instance)).boxed()
    }

    fn shutdown(&self) -> BoxFuture<'_, ()> {
        async {
            self.0.stop.cancel();
            self.0.writers.shutdown().await;
            self.0.tasks.close();
            self.0.tasks.wait().await;
        }
        .boxed()
    }
}

async fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    loop {
        // Taken before accepting, so that the backlog of the system holds what is too much.
        let Ok(permit) = Arc::clone(&shared.handshakes).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, from)) => {
                let serving = Arc::clone(shared);
                let serve = async move { serve(serving, stream, from, permit).await };
                shared
                    .local
                    .supervisor
                    .spawn("transfer-rdma-meet", shared.tasks.track_future(serve));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a rendezvous");
                shared.local.clock.sleep(ACCEPT_REST).await;
            }
        }
    }
}

/// One rendezvous, from its first byte to its end: it lasts as long as the path's queue pairs.
async fn serve(shared: Arc<Shared>, stream: TcpStream, from: SocketAddr, permit: OwnedSemaphorePermit) {
    let waited = shared.options.connect_timeout;
    let shaken = tokio::select! {
        biased;
        () = shared.stop.cancelled() => return,
        shaken = shared.local.clock.timeout(waited, shake(&shared, stream)) => shaken,
    };
    drop(permit);
    let (stream, receivers) = match shaken {
        Ok(Ok(shaken)) => shaken,
        Ok(Err(reason)) => return tracing::debug!(%from, reason, "rendezvous refused"),
        Err(_) => return tracing::debug!(%from, ?waited, "a rendezvous was not completed"),
    };
    let Some(over) = receivers.first().map(|receiver| receiver.over.clone()) else {
        return;
    };
    for receiver in receivers {
        shared
            .local
            .supervisor
            .spawn("transfer-rdma-receive", shared.tasks.track_future(receiver.run()));
    }
    // The end of either is that of the other: a path is whole or over.
    tokio::select! {
        biased;
        () = over.cancelled() => {}
        _ = ended(Some(&stream)) => over.cancel(),
    }
}

/// The receiver's end of the rendezvous.
///
/// # Errors
/// Why there is no connection, in words for the log; the writer was told where it speaks Baton at all.
async fn shake(shared: &Shared, mut stream: TcpStream) -> Result<(TcpStream, Vec<Receiver>), &'static str> {
    tune(&stream).map_err(|_| "its socket options cannot be set")?;
    let asking = Hello::receive(&mut stream)
        .await
        .map_err(|_| "it closed before it said who it is")?;
    let ours = &shared.local.identity;
    let (to, judged) = match &asking {
        Ok(hello) => (Instance(hello.from), judge(shared, hello)),
        Err(super::hello::NoHello::Major { .. }) => {
            (Instance(0), Err((Verdict::Refused, "it speaks another wire version")))
        }
        Err(super::hello::NoHello::Magic | super::hello::NoHello::Malformed) => {
            metric::malformed(PathKind::Rdma);
            return Err("it is none of Baton's");
        }
    };
    let mut answer = Hello::new(ours, to);
    let verdict = judged
        .as_ref()
        .map_or_else(|(verdict, _)| *verdict, |_| Verdict::Accepted);
    answer.verdict = verdict.number();
    if let Ok(receivers) = &judged {
        let index = |device: &Arc<Device>| shared.devices.iter().position(|other| Arc::ptr_eq(device, other));
        let arena = |end: &PairEnd| index(&end.device).unwrap_or(0) as u32;
        answer.ends = receivers
            .iter()
            .map(|receiver| receiver.end.describe(arena(&receiver.end)))
            .collect();
        answer.arenas = shared.devices.iter().map(|device| device.arena().describe()).collect();
        (answer.blocks, answer.region_blocks) = shared.devices.first().map_or((0, 0), |device| device.arena().shape());
        let receives = receivers.iter().map(|receiver| receiver.end.receives()).min();
        answer.receives = u32::try_from(receives.unwrap_or(0)).unwrap_or(0);
    }
    let told = answer.send(&mut stream).await;
    let receivers = judged.map_err(|(_, reason)| reason)?;
    told.map_err(|_| "it closed before it was answered")?;
    Ok((stream, receivers))
}

/// Whether this writer may write here: queue pairs joined to its own, one for each.
fn judge(shared: &Shared, hello: &Hello) -> Result<Vec<Receiver>, (Verdict, &'static str)> {
    let ours = &shared.local.identity;
    if Instance(hello.to) != ours.instance {
        return Err((Verdict::Refused, "it means another process instance"));
    }
    let malformed = |_| (Verdict::Refused, "its message makes no sense");
    let (fingerprint, geometry) = (hello.fingerprint(), hello.geometry());
    let (fingerprint, geometry) = (fingerprint.map_err(malformed)?, geometry.map_err(malformed)?);
    check_same(ours, WIRE_MAJOR, &fingerprint, &geometry)
        .map_err(|_| (Verdict::Refused, "its model or geometry is another"))?;
    if hello.ends.is_empty() || hello.ends.len() > LANES_MAX {
        return Err((Verdict::Refused, "it wants no queue pairs, or too many"));
    }
    let ports: Vec<(usize, Port)> = shared
        .devices
        .iter()
        .map(|device| device.port())
        .enumerate()
        .filter_map(|(index, port)| Some((index, port?)))
        .collect();
    let receives = shared.options.receives.clamp(RECEIVES_MIN, RECEIVES_MAX);
    let options = EndOptions {
        receives,
        messages: MESSAGES,
    };
    let refused = |error: super::verbs::VerbsError| {
        tracing::warn!(%error, "cannot make a queue pair for a writer");
        (Verdict::NoDevice, "the device refuses a queue pair")
    };
    let over = CancellationToken::new();
    let mut joined = Vec::with_capacity(hello.ends.len());
    for (turn, end) in hello.ends.iter().enumerate() {
        let theirs = end.remote().map_err(malformed)?;
        let nearest = nearest(&ports, &theirs.gid, turn);
        let (index, port) = nearest.ok_or((Verdict::NoDevice, "no device here has an active port"))?;
        let end = PairEnd::new(&shared.devices[index], port, options, shared.local.clock).map_err(refused)?;
        end.connect(&theirs).map_err(refused)?;
        joined.push(end);
    }
    let instance = Instance(hello.from);
    let receivers = joined.into_iter().map(|end| {
        let entry = enter(shared, instance)?;
        Ok(Receiver::new(end, ours.geometry, over.clone(), entry))
    });
    receivers.collect()
}

fn enter(shared: &Shared, instance: Instance) -> Result<WriterEntry, (Verdict, &'static str)> {
    shared
        .writers
        .enter_unless_leaving(instance)
        .map_err(|no_entry| match no_entry {
            NoEntry::Full => (Verdict::Full, "there are too many data connections"),
            NoEntry::Leaving => (Verdict::Refused, "its earlier connections are still being ended"),
            NoEntry::ShuttingDown => (Verdict::Refused, "this transport is shutting down"),
        })
}
