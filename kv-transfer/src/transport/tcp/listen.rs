//! The transport itself: its listener, the receiver's end of the handshake, and its end.

use super::connect::{connect, read_hello, tune};
use super::receive::{Receiver, Socket};
use super::wait::Wake;
use super::wire::{HELLO_BYTES, Hello, Verdict, WireError};
use crate::transport::local::check_same;
use crate::transport::writers::{NoEntry, WriterEntry, Writers};
use crate::transport::{ConnectError, Local, Path, Transport, metric};
use crate::{PathKind, Peer, WIRE_MAJOR};
use baton_types::Instance;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections that have not shaken hands yet, all together.
const HANDSHAKES_MAX: usize = 256;
/// Rest after the system refused to accept, most likely for want of descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// How a tcp transport is made.
#[derive(Debug, Clone)]
pub struct TcpOptions {
    /// Where writers connect. Port 0 lets the system choose.
    pub listen: SocketAddr,
    /// The host that peers are told, where it is not the one listened on.
    pub advertise: Option<String>,
    /// Connections of each path that it opens.
    pub connections_per_peer: usize,
    /// Check each extent's CRC32C. On where either end wants it.
    pub crc: bool,
    /// Bound on connecting, handshake included.
    pub connect_timeout: Duration,
    /// Bound on a peer that takes nothing, or sends nothing within a frame.
    pub progress_timeout: Duration,
    /// Bytes queued on one path before writes wait.
    pub bytes_in_flight_max: usize,
}

pub(super) struct Shared {
    pub(super) options: TcpOptions,
    pub(super) local: Local,
    /// Ends the paths that were opened from here, the listener and the handshakes.
    pub(super) stop: CancellationToken,
    writers: Arc<Writers>,
    handshakes: Arc<Semaphore>,
    /// All tasks of this transport.
    pub(super) tasks: TaskTracker,
    address: String,
}

/// The tcp transport of one process. Dropped without `shutdown`, it stops listening and ends all connections by and by.
pub struct TcpTransport(Arc<Shared>);

impl Drop for TcpTransport {
    fn drop(&mut self) {
        self.0.stop.cancel();
        self.0.writers.stop();
    }
}

impl TcpTransport {
    /// Listens.
    ///
    /// # Errors
    /// An address that cannot be had.
    pub async fn bind(options: TcpOptions, local: Local) -> io::Result<Self> {
        let listener = TcpListener::bind(options.listen).await?;
        let bound = listener.local_addr()?;
        let address = match &options.advertise {
            Some(host) if host.contains(':') && !host.starts_with('[') => format!("tcp://[{host}]:{}", bound.port()),
            Some(host) => format!("tcp://{host}:{}", bound.port()),
            None => format!("tcp://{bound}"),
        };
        let shared = Arc::new(Shared {
            writers: Writers::new(PathKind::Tcp, Arc::clone(&local.landing)),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            options,
            local,
            address,
        });
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
            .spawn("transfer-tcp-accept", shared.tasks.track_future(accepting));
        Ok(Self(shared))
    }
}

impl Transport for TcpTransport {
    fn path(&self) -> PathKind {
        PathKind::Tcp
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
                    .spawn("transfer-tcp-receive", shared.tasks.track_future(serve));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a data connection");
                shared.local.clock.sleep(ACCEPT_REST).await;
            }
        }
    }
}

/// One incoming connection, from its first byte to its end.
async fn serve(shared: Arc<Shared>, stream: TcpStream, from: SocketAddr, permit: OwnedSemaphorePermit) {
    let waited = shared.options.connect_timeout;
    let shaken = tokio::select! {
        biased;
        () = shared.stop.cancelled() => return,
        shaken = shared.local.clock.timeout(waited, shake(&shared, stream)) => shaken,
    };
    drop(permit);
    match shaken {
        Ok(Ok(receiver)) => receive(&shared, receiver).await,
        Ok(Err(reason)) => tracing::debug!(%from, reason, "data connection refused"),
        Err(_) => tracing::debug!(%from, ?waited, "data connection did not shake hands"),
    }
}

/// Receives on a thread of its own.
async fn receive(shared: &Shared, receiver: Receiver) {
    let (wake, stop) = (receiver.wake(), receiver.stopped());
    let started = shared
        .local
        .supervisor
        .spawn_thread("transfer-tcp-receive", move || receiver.run());
    let thread = match started {
        Ok(thread) => thread,
        Err(error) => return tracing::warn!(%error, "no thread for a data connection"),
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => wake.stop(),
        () = thread.join() => {}
    }
    thread.join().await;
}

/// The receiver's end of the handshake.
///
/// # Errors
/// Why there is no connection, in words for the log; the writer was told where it speaks Baton at all.
async fn shake(shared: &Shared, mut stream: TcpStream) -> Result<Receiver, &'static str> {
    let options = &shared.options;
    tune(&stream, options.progress_timeout).map_err(|_| "its socket options cannot be set")?;
    let asking = read_hello(&mut stream)
        .await
        .map_err(|_| "it closed before it said who it is")?;
    let ours = &shared.local.identity;
    let (to, judged) = match asking {
        Ok(hello) => (
            hello.from,
            judge(shared, &hello).map(|entry| (entry, options.crc || hello.crc)),
        ),
        Err(WireError::Major { .. }) => (Instance(0), Err((Verdict::Refused, "it speaks another wire version"))),
        Err(WireError::Magic | WireError::Checksum { .. } | WireError::Field { .. }) => {
            metric::malformed(PathKind::Tcp);
            return Err("it is none of Baton's");
        }
    };
    let verdict = judged
        .as_ref()
        .map_or_else(|(verdict, _)| *verdict, |_| Verdict::Accepted);
    let answer = Hello::new(ours, to, options.crc, verdict);
    let told = stream.write_all(&answer.encode()).await;
    let (entry, crc) = match judged {
        Ok(judged) => judged,
        Err((_, reason)) => {
            // What it sent and nobody read would make the system throw our answer away with the connection.
            let _ = stream.shutdown().await;
            let _ = stream.read(&mut [0; HELLO_BYTES]).await;
            return Err(reason);
        }
    };
    told.map_err(|_| "it closed before it was answered")?;
    let (stream, wake) = match (stream.into_std(), Wake::new()) {
        (Ok(stream), Ok(wake)) => (stream, Arc::new(wake)),
        (Err(_), _) | (_, Err(_)) => return Err("the system gives no descriptor"),
    };
    let socket = Socket {
        stream,
        clock: shared.local.clock,
        progress_timeout: options.progress_timeout,
        wake,
    };
    Ok(Receiver::new(socket, crc, shared.local.arena.clone(), entry))
}

/// Whether this writer may write here.
fn judge(shared: &Shared, hello: &Hello) -> Result<WriterEntry, (Verdict, &'static str)> {
    let ours = &shared.local.identity;
    if hello.to != ours.instance {
        return Err((Verdict::Refused, "it means another process instance"));
    }
    check_same(ours, WIRE_MAJOR, &hello.fingerprint, &hello.geometry)
        .map_err(|_| (Verdict::Refused, "its model or geometry is another"))?;
    shared.writers.enter(hello.from).map_err(|no_entry| match no_entry {
        NoEntry::Full => (Verdict::Full, "there are too many data connections"),
        NoEntry::ShuttingDown | NoEntry::Leaving => (Verdict::Refused, "this transport is shutting down"),
    })
}
