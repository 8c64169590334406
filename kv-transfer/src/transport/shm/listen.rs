//! The transport itself: its listener, the receiver's end of the handshake, and its end.

use super::connect::connect;
use super::map::{SharedWords, readable};
use super::receive::{Intake, Receiver, Signals};
use super::ring::{Consumer, WORDS};
use super::socket::{Answer, Bell, Refusal, host_id, is_handle_of, receive_hello, send, socket_name};
use crate::arena::Arena;
use crate::transport::local::check_same;
use crate::transport::tcp::wire::{Hello, Verdict, WireError};
use crate::transport::writers::{NoEntry, WriterEntry, Writers};
use crate::transport::{ConnectError, Local, Path, Transport, metric};
use crate::{PathKind, Peer, WIRE_MAJOR};
use baton_types::Instance;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener as StdListener};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const KIND: PathKind = PathKind::Shm;
/// Connections that have not shaken hands yet, all together.
const HANDSHAKES_MAX: usize = 256;
/// Rest after the system refused to accept, most likely for want of descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// How a shared-memory transport is made.
#[derive(Debug, Clone)]
pub struct ShmOptions {
    /// Bound on connecting, handshake included.
    pub connect_timeout: Duration,
    /// How long `shutdown` waits for writers to prove that they have unmapped the arena.
    pub shutdown_timeout: Duration,
    /// Bytes copied ahead of what the receiver has taken notice of, per path, before writes wait.
    pub bytes_in_flight_max: usize,
}

pub(super) struct Shared {
    pub(super) options: ShmOptions,
    pub(super) local: Local,
    pub(super) host: String,
    /// Ends the paths that were opened from here, the listener and the handshakes.
    pub(super) stop: CancellationToken,
    /// No proof is awaited any longer.
    abandon: CancellationToken,
    writers: Arc<Writers>,
    handshakes: Arc<Semaphore>,
    /// All tasks of this transport.
    pub(super) tasks: TaskTracker,
    address: String,
    /// The arena, for writers to map.
    memory: OwnedFd,
}

/// The shared-memory transport of one process. Dropped without `shutdown`, it stops listening and ends all connections by
/// and by.
pub struct ShmTransport(Arc<Shared>);

impl Drop for ShmTransport {
    fn drop(&mut self) {
        self.0.stop.cancel();
        self.0.writers.stop();
    }
}

impl ShmTransport {
    /// Listens, under a name that only those know who are told.
    ///
    /// # Errors
    /// An arena that other processes cannot map; whatever the system refuses.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(options: ShmOptions, local: Local) -> io::Result<Self> {
        let arena = Arena::of(&local.arena).ok_or(ErrorKind::Unsupported)?;
        let memory = arena.memory().try_clone_to_owned()?;
        let host = host_id()?;
        let name = format!("baton-{}-{}", local.identity.instance, Instance::random());
        let listener = StdListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let shared = Arc::new(Shared {
            address: format!("shm://{host}/{name}"),
            host,
            writers: Writers::new(KIND, Arc::clone(&local.landing)),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            stop: CancellationToken::new(),
            abandon: CancellationToken::new(),
            tasks: TaskTracker::new(),
            options,
            local,
            memory,
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
            .spawn("transfer-shm-accept", shared.tasks.track_future(accepting));
        Ok(Self(shared))
    }
}

impl Transport for ShmTransport {
    fn path(&self) -> PathKind {
        KIND
    }

    fn address(&self) -> String {
        self.0.address.clone()
    }

    fn reaches(&self, address: &str) -> bool {
        socket_name(address, &self.0.host).is_ok()
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
            let shared = &self.0;
            shared.stop.cancel();
            let waited = shared.options.shutdown_timeout;
            if shared
                .local
                .clock
                .timeout(waited, shared.writers.shutdown())
                .await
                .is_err()
            {
                shared.abandon.cancel();
            }
            shared.tasks.close();
            shared.tasks.wait().await;
        }
        .boxed()
    }
}

async fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    loop {
        // Taken before accepting, so that the backlog of the system holds what is too much.
        let Ok(permit) = Arc::clone(&shared.handshakes).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((socket, _)) => {
                let serving = Arc::clone(shared);
                let serve = async move { serve(serving, socket, permit).await };
                shared
                    .local
                    .supervisor
                    .spawn("transfer-shm-receive", shared.tasks.track_future(serve));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a shared-memory connection");
                shared.local.clock.sleep(ACCEPT_REST).await;
            }
        }
    }
}

/// One incoming connection, from its first byte to its proven end.
async fn serve(shared: Arc<Shared>, socket: UnixStream, permit: OwnedSemaphorePermit) {
    let waited = shared.options.connect_timeout;
    let shaken = tokio::select! {
        biased;
        () = shared.stop.cancelled() => return,
        shaken = shared.local.clock.timeout(waited, shake(&shared, socket)) => shaken,
    };
    drop(permit);
    match shaken {
        Ok(Ok(receiver)) => {
            drop(shared);
            receiver.run().await;
        }
        Ok(Err(reason)) => tracing::debug!(reason, "shared-memory connection refused"),
        Err(_) => tracing::debug!(?waited, "shared-memory connection did not shake hands"),
    }
}

/// The receiver's end of the handshake.
///
/// # Errors
/// Why there is no connection, in words for the log; the writer was told where it speaks Baton at all.
async fn shake(shared: &Shared, socket: UnixStream) -> Result<Receiver, &'static str> {
    let mut fds = Vec::new();
    let hello = receive_hello(&socket, &mut fds)
        .await
        .map_err(|_| "it closed before it said who it is")?;
    let ours = &shared.local.identity;
    let hello = match hello {
        Ok(hello) => hello,
        Err(WireError::Major { .. }) => {
            // Our answer begins with our version, which is all that it will read.
            let unknown = Hello::new(ours, Instance(0), false, Verdict::Refused);
            let answer = Answer::new(ours, &unknown, 0, Refusal::Differs);
            let _ = send(&socket, &answer.encode(), &[]).await;
            return Err("it speaks another wire version");
        }
        Err(WireError::Magic | WireError::Checksum { .. } | WireError::Field { .. }) => {
            metric::malformed(KIND);
            return Err("it is none of Baton's");
        }
    };
    let admitted = admit(shared, &socket, &hello, fds).and_then(|(entry, process)| {
        let end = End::new(process).map_err(|_| Refusal::NoMemory)?;
        Ok((entry, end))
    });
    let refusal = admitted.as_ref().err().copied().unwrap_or(Refusal::None);
    let answer = Answer::new(ours, &hello, shared.local.arena.blocks(), refusal).encode();
    let (mut entry, end) = match admitted {
        Ok(admitted) => admitted,
        Err(refusal) => {
            let _ = send(&socket, &answer, &[]).await;
            return Err(refusal.reason());
        }
    };
    let ring = end.ring.as_fd();
    let fds = [shared.memory.as_fd(), ring, end.ours.get_ref().as_fd(), end.theirs.fd()];
    // Sending is the last step that can fail, and what could not be sent was not given.
    entry.lend();
    if send(&socket, &answer, &fds).await.is_err() {
        entry.given_back();
        return Err("it closed before it was answered");
    }
    Ok(end.receiver(shared, socket, entry))
}

/// What one connection needs, before its writer knows.
struct End {
    process: AsyncFd<OwnedFd>,
    words: SharedWords,
    ring: OwnedFd,
    ours: AsyncFd<OwnedFd>,
    theirs: Bell,
}

impl End {
    fn new(process: OwnedFd) -> io::Result<Self> {
        let (words, ring) = SharedWords::create(WORDS)?;
        Ok(Self {
            process: readable(process)?,
            words,
            ring,
            ours: Bell::new()?.listen()?,
            theirs: Bell::new()?,
        })
    }

    fn receiver(self, shared: &Shared, socket: UnixStream, entry: WriterEntry) -> Receiver {
        let geometry = shared.local.arena.geometry();
        Receiver {
            signals: Signals {
                socket,
                process: self.process,
                stop: entry.stopped().clone(),
                abandon: shared.abandon.clone(),
            },
            intake: Intake {
                consumer: Consumer::new(self.words, geometry.layers),
                bell: self.ours,
                writer: self.theirs,
                clock: shared.local.clock,
                layer_bytes: geometry.layer_bytes(),
                entry,
            },
        }
    }
}

/// Whether this writer may write here; with its entry and the handle of its process.
fn admit(
    shared: &Shared,
    socket: &UnixStream,
    hello: &Hello,
    fds: Vec<OwnedFd>,
) -> Result<(WriterEntry, OwnedFd), Refusal> {
    let ours = &shared.local.identity;
    let credentials = socket.peer_cred().map_err(|_| Refusal::NoProcess)?;
    if credentials.uid() != rustix::process::geteuid().as_raw() {
        return Err(Refusal::OtherUser);
    }
    if hello.to != ours.instance {
        return Err(Refusal::OtherInstance);
    }
    check_same(ours, WIRE_MAJOR, &hello.fingerprint, &hello.geometry).map_err(|_| Refusal::Differs)?;
    let [process]: [OwnedFd; 1] = fds.try_into().map_err(|_| Refusal::NoProcess)?;
    if !is_handle_of(&process, credentials.pid()) {
        return Err(Refusal::NoProcess);
    }
    let entry = shared.writers.enter_unless_leaving(hello.from);
    let entry = entry.map_err(|no_entry| match no_entry {
        NoEntry::Full => Refusal::Full,
        NoEntry::ShuttingDown => Refusal::ShuttingDown,
        NoEntry::Leaving => Refusal::Leaving,
    })?;
    Ok((entry, process))
}
