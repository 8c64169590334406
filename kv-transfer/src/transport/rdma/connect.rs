//! The writer's end of the rendezvous: queue pairs of its own, asked to be joined to as many of the receiver.

use super::arena::RemoteArena;
use super::device::Device;
use super::hello::{Hello, NoHello, Verdict};
use super::listen::Shared;
use super::pair::{EndOptions, PairEnd};
use super::send::{CREDIT_RECEIVES, MESSAGES, Sender, SenderParts};
use super::verbs::{Port, VerbsError};
use crate::transport::lanes::{LANES_MAX, LaneOptions, LanePath};
use crate::transport::local::check_same;
use crate::transport::{ConnectError, Extent, Path, PathError};
use crate::{PathKind, WIRE_MAJOR};
use baton_types::{Epoch, Instance};
use futures::FutureExt;
use futures::future::BoxFuture;
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;

const KEEPALIVE_IDLE: Duration = Duration::from_secs(2);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_RETRIES: u32 = 3;

/// Sets what a rendezvous needs: an end when the peer is gone.
pub(super) fn tune(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&keepalive)
}

/// A path over queue pairs: checks where extents go, which the shared half cannot.
struct RdmaPath {
    lanes: LanePath,
    remote: Arc<RemoteArena>,
}

impl Path for RdmaPath {
    fn kind(&self) -> PathKind {
        PathKind::Rdma
    }

    fn connections(&self) -> u32 {
        self.lanes.connections()
    }

    fn write(&self, epoch: Epoch, extents: Vec<Extent>) -> BoxFuture<'static, Result<(), PathError>> {
        let outside = extents
            .iter()
            .find_map(|extent| self.remote.place(extent.destination, 0).err());
        match outside {
            Some(outside) => async move { Err(outside.into()) }.boxed(),
            None => self.lanes.write(epoch, extents),
        }
    }

    fn fence(&self, epoch: Epoch) -> BoxFuture<'static, Result<(), PathError>> {
        self.lanes.fence(epoch)
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.lanes.close()
    }
}

/// Opens a path: several queue pairs, by turns over the devices that have an active port.
pub(super) async fn connect(shared: &Shared, wanted: Instance, address: &str) -> Result<Arc<dyn Path>, ConnectError> {
    let host = address
        .strip_prefix("rdma://")
        .filter(|host| {
            host.rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        })
        .ok_or_else(|| ConnectError::BadAddress {
            address: address.to_owned(),
            path: PathKind::Rdma,
        })?;
    let waited = shared.options.connect_timeout;
    let meeting = shared.local.clock.timeout(waited, meet(shared, wanted, address, host));
    let joined = tokio::select! {
        biased;
        () = shared.stop.cancelled() => return Err(ConnectError::ShuttingDown),
        joined = meeting => joined,
    };
    let joined = joined.map_err(|_| ConnectError::Timeout {
        address: address.to_owned(),
        waited,
    })??;
    Ok(Arc::new(start(shared, joined)))
}

/// What the rendezvous came to.
struct Joined {
    stream: TcpStream,
    ends: Vec<(PairEnd, Arc<RemoteArena>)>,
    credits: usize,
}

fn start(shared: &Shared, joined: Joined) -> RdmaPath {
    let options = LaneOptions {
        kind: PathKind::Rdma,
        lanes: u32::try_from(joined.ends.len()).unwrap_or(u32::MAX),
        bytes_in_flight_max: shared.options.bytes_in_flight_max,
        stop: shared.stop.child_token(),
    };
    let remote = Arc::clone(&joined.ends.first().expect("a path has at least one queue pair").1);
    let (lanes, queues) = LanePath::new(options, shared.local.arena.clone());
    let mut rendezvous = Some(joined.stream);
    for ((end, remote), queue) in joined.ends.into_iter().zip(queues) {
        let parts = SenderParts {
            remote,
            credits: joined.credits,
            rendezvous: rendezvous.take(),
            queue,
            clock: shared.local.clock,
            progress_timeout: shared.options.progress_timeout,
        };
        let sender = Sender::new(end, parts);
        shared
            .local
            .supervisor
            .spawn("transfer-rdma-send", shared.tasks.track_future(sender.run()));
    }
    RdmaPath { lanes, remote }
}

/// Asks for as many queue pairs as a path has, and joins them.
async fn meet(shared: &Shared, wanted: Instance, address: &str, host: &str) -> Result<Joined, ConnectError> {
    let unreachable = |error: io::Error| ConnectError::Unreachable {
        address: address.to_owned(),
        kind: error.kind(),
    };
    let broken = |reason| ConnectError::Handshake {
        address: address.to_owned(),
        reason,
    };
    let refused = |error: VerbsError| {
        tracing::warn!(%error, "cannot make a queue pair");
        unreachable(error.source)
    };
    let mut stream = TcpStream::connect(host).await.map_err(unreachable)?;
    tune(&stream).map_err(unreachable)?;
    let ours = &shared.local.identity;
    let mut asking = Hello::new(ours, wanted);
    let ends = our_ends(shared).map_err(refused)?;
    asking.ends = ends.iter().map(|end| end.describe(0)).collect();
    asking.send(&mut stream).await.map_err(unreachable)?;
    let theirs = match Hello::receive(&mut stream).await.map_err(unreachable)? {
        Ok(theirs) => theirs,
        Err(NoHello::Major { theirs }) => {
            let (ours, theirs) = (WIRE_MAJOR.to_string(), theirs.to_string());
            return Err(ConnectError::Refused {
                field: "wire_major",
                ours,
                theirs,
            });
        }
        Err(NoHello::Magic | NoHello::Malformed) => return Err(broken("the answer is none of Baton's")),
    };
    let found = Instance(theirs.from);
    if found != wanted {
        return Err(ConnectError::WrongInstance { wanted, found });
    }
    let senseless = |_| broken("the answer makes no sense");
    let (fingerprint, geometry) = (theirs.fingerprint(), theirs.geometry());
    check_same(
        ours,
        WIRE_MAJOR,
        &fingerprint.map_err(senseless)?,
        &geometry.map_err(senseless)?,
    )?;
    if ends.is_empty() {
        return Err(broken("no rdma device of this node has an active port"));
    }
    match Verdict::of(theirs.verdict) {
        Some(Verdict::Accepted) => {}
        Some(Verdict::Full) => return Err(broken("the receiver has too many connections")),
        Some(Verdict::NoDevice) => return Err(broken("the receiver has no rdma device that works now")),
        Some(Verdict::Refused) | None => return Err(broken("the receiver refused without a reason")),
    }
    if theirs.ends.len() != ends.len() {
        return Err(broken("the answer makes no sense"));
    }
    let mut joined = Vec::with_capacity(ends.len());
    for (end, theirs_of_it) in ends.into_iter().zip(&theirs.ends) {
        end.connect(&theirs_of_it.remote().map_err(senseless)?)
            .map_err(refused)?;
        let remote = RemoteArena::new(&theirs, theirs_of_it.arena, &ours.geometry).map_err(senseless)?;
        joined.push((end, Arc::new(remote)));
    }
    Ok(Joined {
        stream,
        ends: joined,
        credits: theirs.receives as usize,
    })
}

/// Queue pairs of this side; none where no device has an active port.
fn our_ends(shared: &Shared) -> Result<Vec<PairEnd>, VerbsError> {
    let ports: Vec<(Arc<Device>, Port)> = shared
        .devices
        .iter()
        .filter_map(|device| Some((Arc::clone(device), device.port()?)))
        .collect();
    let options = EndOptions {
        receives: CREDIT_RECEIVES,
        messages: MESSAGES,
    };
    let turn = shared.next_path();
    let lanes = if ports.is_empty() {
        0
    } else {
        shared.options.connections_per_peer.clamp(1, LANES_MAX)
    };
    (0..lanes)
        .map(|lane| {
            let (device, port) = &ports[(turn + lane) % ports.len()];
            PairEnd::new(device, *port, options, shared.local.clock)
        })
        .collect()
}
