//! The writer's end of the handshake, and the tuning of sockets that both ends share.

use super::listen::Shared;
use super::send::{Sender, SenderOptions};
use super::wire::{HELLO_BYTES, Hello, VERSION_BYTES, Verdict, WireError, check_version};
use crate::transport::lanes::{LANES_MAX, LaneOptions, LanePath};
use crate::transport::local::check_same;
use crate::transport::{ConnectError, Path};
use crate::{PathKind, WIRE_MAJOR};
use baton_types::Instance;
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What is on its way in one connection should stay in the cache: a larger buffer is slower, not faster
/// (256 KiB against the system's own choice: 4.4 to 6.4 against 2.7 to 3.5 GB/s over loopback).
const SEND_BUFFER_BYTES: usize = 256 << 10;
const KEEPALIVE_IDLE: Duration = Duration::from_secs(2);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_RETRIES: u32 = 3;

/// Sets what a data connection needs: no delay, a bounded send buffer, and an end when the peer is gone.
pub(super) fn tune(stream: &TcpStream, progress_timeout: Duration) -> io::Result<()> {
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    socket.set_tcp_nodelay(true)?;
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(progress_timeout))
}

/// Opens a path: several connections, each with its own handshake.
pub(super) async fn connect(shared: &Shared, wanted: Instance, address: &str) -> Result<Arc<dyn Path>, ConnectError> {
    let host = address
        .strip_prefix("tcp://")
        .filter(|host| {
            host.rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        })
        .ok_or_else(|| ConnectError::BadAddress {
            address: address.to_owned(),
            path: PathKind::Tcp,
        })?;
    let lanes = shared.options.connections_per_peer.clamp(1, LANES_MAX) as u32;
    let waited = shared.options.connect_timeout;
    let handshakes = futures::future::try_join_all((0..lanes).map(|_| handshake(shared, wanted, address, host)));
    let connections = tokio::select! {
        biased;
        () = shared.stop.cancelled() => return Err(ConnectError::ShuttingDown),
        connections = shared.local.clock.timeout(waited, handshakes) => connections,
    };
    let connections = connections.map_err(|_| ConnectError::Timeout {
        address: address.to_owned(),
        waited,
    })??;
    let options = LaneOptions {
        kind: PathKind::Tcp,
        lanes,
        bytes_in_flight_max: shared.options.bytes_in_flight_max,
        stop: shared.stop.child_token(),
    };
    let (path, queues) = LanePath::new(options, shared.local.arena.clone());
    for ((stream, crc), queue) in connections.into_iter().zip(queues) {
        let stop = queue.stopped();
        let started = stream.into_std().and_then(|stream| {
            let sender = Sender::new(SenderOptions {
                stream,
                crc,
                queue,
                clock: shared.local.clock,
                progress_timeout: shared.options.progress_timeout,
            })?;
            let running = Arc::clone(&sender);
            let supervisor = &shared.local.supervisor;
            let thread = supervisor.spawn_thread("transfer-tcp-send", move || running.run())?;
            Ok((sender, thread))
        });
        // An error drops the queues that are left, which ends the lanes that run.
        let (sender, thread) = started.map_err(|error| ConnectError::Unreachable {
            address: address.to_owned(),
            kind: error.kind(),
        })?;
        let guarding = async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => sender.stop(),
                () = thread.join() => {}
            }
            thread.join().await;
        };
        let guarding = shared.tasks.track_future(guarding);
        shared.local.supervisor.spawn("transfer-tcp-path", guarding);
    }
    Ok(Arc::new(path))
}

/// Reads a hello. One of another version may have another length: only its first bytes are awaited.
///
/// # Errors
/// Outside: what the system says. Inside: what is wrong with what came.
pub(super) async fn read_hello(stream: &mut TcpStream) -> io::Result<Result<Hello, WireError>> {
    let mut bytes = [0; HELLO_BYTES];
    let (version, rest) = bytes.split_at_mut(VERSION_BYTES);
    stream.read_exact(version).await?;
    if let Err(error) = check_version(version) {
        return Ok(Err(error));
    }
    stream.read_exact(rest).await?;
    Ok(Hello::decode(&bytes))
}

/// One connection that both ends agree on; whether payloads carry checksums.
async fn handshake(
    shared: &Shared,
    wanted: Instance,
    address: &str,
    host: &str,
) -> Result<(TcpStream, bool), ConnectError> {
    let unreachable = |error: io::Error| ConnectError::Unreachable {
        address: address.to_owned(),
        kind: error.kind(),
    };
    let broken = |reason| ConnectError::Handshake {
        address: address.to_owned(),
        reason,
    };
    let mut stream = TcpStream::connect(host).await.map_err(unreachable)?;
    tune(&stream, shared.options.progress_timeout).map_err(unreachable)?;
    let ours = &shared.local.identity;
    let asking = Hello::new(ours, wanted, shared.options.crc, Verdict::Asking);
    stream.write_all(&asking.encode()).await.map_err(unreachable)?;
    let theirs = match read_hello(&mut stream).await.map_err(unreachable)? {
        Ok(theirs) => theirs,
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
    if theirs.from != wanted {
        return Err(ConnectError::WrongInstance {
            wanted,
            found: theirs.from,
        });
    }
    check_same(ours, WIRE_MAJOR, &theirs.fingerprint, &theirs.geometry)?;
    match theirs.verdict {
        Verdict::Accepted => Ok((stream, shared.options.crc || theirs.crc)),
        Verdict::Full => Err(broken("the receiver has too many connections")),
        Verdict::Refused | Verdict::Asking => Err(broken("the receiver refused without a reason")),
    }
}
