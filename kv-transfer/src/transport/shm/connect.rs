//! The writer's end of the handshake.

use super::listen::Shared;
use super::map::{PeerArena, SharedWords};
use super::path::{self, Attendant, PathParts, ShmPath};
use super::ring::{Producer, WORDS};
use super::socket::{ACCEPTED_FDS, Answer, Bell, DETACHED, Refusal, receive_answer, send, send_signal, socket_name};
use crate::WIRE_MAJOR;
use crate::transport::local::check_same;
use crate::transport::tcp::wire::{Hello, Verdict, WireError};
use crate::transport::{ConnectError, Path};
use baton_types::Instance;
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use tokio::net::UnixStream;
use tokio_util::task::TaskTracker;

/// Opens a path.
pub(super) async fn connect(shared: &Shared, wanted: Instance, address: &str) -> Result<Arc<dyn Path>, ConnectError> {
    let name = socket_name(address, &shared.host)?;
    let waited = shared.options.connect_timeout;
    let mut dialled = Dialled(None);
    let handshake = handshake(shared, &mut dialled, wanted, address, name);
    let connected = tokio::select! {
        biased;
        () = shared.stop.cancelled() => return Err(ConnectError::ShuttingDown),
        connected = shared.local.clock.timeout(waited, handshake) => connected,
    };
    let (answer, fds) = connected.map_err(|_| ConnectError::Timeout {
        address: address.to_owned(),
        waited,
    })??;
    let unusable = |error: io::Error| ConnectError::Unreachable {
        address: address.to_owned(),
        kind: error.kind(),
    };
    open(shared, &mut dialled, &answer, fds).map_err(unusable)
}

/// Opens the socket of that name in the abstract namespace, where no file stays behind.
pub(super) async fn dial(name: &str) -> io::Result<UnixStream> {
    let path = [b"\0", name.as_bytes()].concat();
    UnixStream::connect(std::ffi::OsStr::from_bytes(&path)).await
}

/// A connection that is not a path yet. A receiver that has given its memory waits for proof that nobody writes it: where
/// no path came of it, nothing was or is mapped, and that is said.
struct Dialled(Option<UnixStream>);

impl Drop for Dialled {
    fn drop(&mut self) {
        if let Some(socket) = &self.0 {
            send_signal(socket, DETACHED);
        }
    }
}

async fn handshake(
    shared: &Shared,
    dialled: &mut Dialled,
    wanted: Instance,
    address: &str,
    name: &str,
) -> Result<(Answer, Vec<OwnedFd>), ConnectError> {
    let unreachable = |error: io::Error| ConnectError::Unreachable {
        address: address.to_owned(),
        kind: error.kind(),
    };
    let broken = |reason| ConnectError::Handshake {
        address: address.to_owned(),
        reason,
    };
    let socket = &*dialled.0.insert(dial(name).await.map_err(unreachable)?);
    // Names of that namespace belong to whoever takes them first: only our own user is told, and given, anything.
    let (us, them) = (
        rustix::process::geteuid().as_raw(),
        socket.peer_cred().map_err(unreachable)?.uid(),
    );
    if us != them {
        return Err(ConnectError::Refused {
            field: "user",
            ours: us.to_string(),
            theirs: them.to_string(),
        });
    }
    let ours = &shared.local.identity;
    let process = pidfd_open(getpid(), PidfdFlags::NONBLOCK).map_err(|errno| unreachable(errno.into()))?;
    let asking = Hello::new(ours, wanted, false, Verdict::Asking).encode();
    send(socket, &asking, &[process.as_fd()]).await.map_err(unreachable)?;
    let mut fds = Vec::new();
    let answer = match receive_answer(socket, &mut fds).await.map_err(unreachable)? {
        Ok(answer) => answer,
        Err(WireError::Major { theirs }) => {
            let (ours, theirs) = (WIRE_MAJOR.to_string(), theirs.to_string());
            return Err(ConnectError::Refused {
                field: "wire_major",
                ours,
                theirs,
            });
        }
        Err(WireError::Magic | WireError::Checksum { .. } | WireError::Field { .. }) => {
            return Err(broken("the answer is none of Baton's"));
        }
    };
    if answer.hello.from != wanted {
        return Err(ConnectError::WrongInstance {
            wanted,
            found: answer.hello.from,
        });
    }
    check_same(ours, WIRE_MAJOR, &answer.hello.fingerprint, &answer.hello.geometry)?;
    match answer.refusal {
        Refusal::None if answer.hello.verdict == Verdict::Accepted => Ok((answer, fds)),
        refusal => Err(broken(refusal.reason())),
    }
}

/// Maps what the receiver gave, and starts the path's task.
fn open(shared: &Shared, dialled: &mut Dialled, answer: &Answer, fds: Vec<OwnedFd>) -> io::Result<Arc<dyn Path>> {
    let [arena, ring, receiver, room]: [OwnedFd; ACCEPTED_FDS] =
        fds.try_into().map_err(|_| io::Error::from(ErrorKind::InvalidData))?;
    let local = &shared.local;
    let peer = PeerArena::map(&arena, answer.blocks, *local.arena.geometry())?;
    let words = SharedWords::map(&ring, WORDS)?;
    let parts = PathParts {
        arena: local.arena.clone(),
        peer,
        producer: Producer::new(Arc::new(words)),
        receiver: Bell::of(receiver),
        bytes_in_flight_max: shared.options.bytes_in_flight_max,
        stop: shared.stop.child_token(),
    };
    let bell = Bell::of(room).listen()?;
    let socket = dialled.0.take().ok_or(ErrorKind::NotConnected)?;
    let path = path::Shared::new(parts);
    let populating = TaskTracker::new();
    let (populate, token) = (path::populate(&path), populating.token());
    local.supervisor.spawn_blocking("transfer-shm-populate", move || {
        populate();
        drop(token);
    });
    let attendant = Attendant {
        shared: Arc::clone(&path),
        socket,
        bell,
        populating,
    };
    local
        .supervisor
        .spawn("transfer-shm-path", shared.tasks.track_future(attendant.run()));
    Ok(Arc::new(ShmPath::new(path)))
}
