//! What goes over the Unix socket: the handshake with its descriptors, and one byte each way at the end.
//!
//! ```text
//! writer -> receiver   hello (that of tcp) | descriptor: the writer's pidfd
//! receiver -> writer   hello with the verdict | blocks u64 | refusal u8 | 7 zeros
//!                      descriptors, if accepted: arena, ring, eventfd of the receiver, eventfd of the writer
//! receiver -> writer   `STOP`: unmap and say so
//! writer -> receiver   `DETACHED`: this writer has unmapped the arena and will never write it again
//! ```

use super::map::readable;
use crate::transport::ConnectError;
use crate::transport::tcp::wire::{HELLO_BYTES, Hello, VERSION_BYTES, Verdict, WireError, check_version};
use crate::{Identity, PathKind};
use crc_fast::CrcAlgorithm;
use rustix::event::EventfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// Asks the writer to unmap.
pub(super) const STOP: u8 = b'S';
/// Says that the writer has.
pub(super) const DETACHED: u8 = b'D';
/// Descriptors of an acceptance.
pub(super) const ACCEPTED_FDS: usize = 4;
const FDS_MAX: usize = 8;
const ANSWER_BYTES: usize = HELLO_BYTES + 16;

/// This host, for as long as it runs: processes of other hosts (or of an earlier life of this one) share no memory with us.
///
/// # Errors
/// Where the system does not say.
pub(super) fn host_id() -> io::Result<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let hash = crc_fast::checksum(CrcAlgorithm::Crc64Nvme, boot.trim().as_bytes());
    Ok(format!("{hash:016x}"))
}

/// Why a receiver lets a writer not in, as it tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    None,
    OtherUser,
    OtherInstance,
    Differs,
    ShuttingDown,
    Full,
    /// An earlier connection of the same process was ended and its end is not proven.
    Leaving,
    NoProcess,
    NoMemory,
}

impl Refusal {
    const ALL: [Self; 9] = [
        Self::None,
        Self::OtherUser,
        Self::OtherInstance,
        Self::Differs,
        Self::ShuttingDown,
        Self::Full,
        Self::Leaving,
        Self::NoProcess,
        Self::NoMemory,
    ];

    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::None => "the receiver refused without a reason",
            Self::OtherUser => "the writer belongs to another user",
            Self::OtherInstance => "the writer means another process instance",
            Self::Differs => "the writer's model or geometry is another",
            Self::ShuttingDown => "the receiver is shutting down",
            Self::Full => "the receiver has too many connections",
            Self::Leaving => "the end of this process's earlier connection is not proven yet",
            Self::NoProcess => "the writer's process handle is none or another's",
            Self::NoMemory => "the receiver has no memory to share",
        }
    }
}

/// What the receiver answers to a writer's hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) hello: Hello,
    pub(super) blocks: u64,
    pub(super) refusal: Refusal,
}

impl Answer {
    pub(super) fn new(ours: &Identity, to: &Hello, blocks: usize, refusal: Refusal) -> Self {
        let accepted = refusal == Refusal::None;
        let verdict = if accepted { Verdict::Accepted } else { Verdict::Refused };
        Self {
            hello: Hello::new(ours, to.from, false, verdict),
            blocks: blocks as u64,
            refusal,
        }
    }

    pub(super) fn encode(&self) -> [u8; ANSWER_BYTES] {
        let mut bytes = [0; ANSWER_BYTES];
        bytes[..HELLO_BYTES].copy_from_slice(&self.hello.encode());
        bytes[HELLO_BYTES..HELLO_BYTES + 8].copy_from_slice(&self.blocks.to_le_bytes());
        // Its place in the list fits a byte.
        bytes[HELLO_BYTES + 8] = self.refusal as u8;
        bytes
    }

    fn decode(bytes: &[u8; ANSWER_BYTES]) -> Result<Self, WireError> {
        let (hello, rest) = bytes.split_first_chunk().expect("an answer begins with a hello");
        let (blocks, rest) = rest.split_first_chunk().expect("and has 16 bytes more");
        let refusal = Refusal::ALL.get(rest[0] as usize).copied().ok_or(WireError::Field {
            field: "refusal",
            value: rest[0].into(),
        })?;
        Ok(Self {
            hello: Hello::decode(hello)?,
            blocks: u64::from_le_bytes(*blocks),
            refusal,
        })
    }
}

/// Sends all of `bytes`, the descriptors with the first of them.
///
/// # Errors
/// Whatever the system says.
pub(super) async fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(ErrorKind::InvalidInput.into());
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags)?)
        })
        .await?;
    // A fresh socket takes a message of this size whole or not at all.
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(ErrorKind::WriteZero.into())
    }
}

/// Receives exactly so many bytes, and whatever descriptors come with them.
async fn receive(stream: &UnixStream, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<()> {
    let mut got = 0;
    while got < bytes.len() {
        let rest = &mut bytes[got..];
        let n = stream
            .async_io(Interest::READABLE, || receive_once(stream, rest, fds))
            .await?;
        if n == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        got += n;
    }
    Ok(())
}

fn receive_once(stream: &UnixStream, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(stream, &mut [IoSliceMut::new(bytes)], &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            fds.extend(passed);
        }
    }
    if fds.len() > FDS_MAX || received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(ErrorKind::InvalidData.into());
    }
    Ok(received.bytes)
}

/// Receives a message of `N` bytes that begins with a version. One of another version may have another length: only its
/// first bytes are awaited.
async fn receive_versioned<const N: usize>(
    stream: &UnixStream,
    fds: &mut Vec<OwnedFd>,
) -> io::Result<Result<[u8; N], WireError>> {
    let mut bytes = [0; N];
    let (version, rest) = bytes.split_at_mut(VERSION_BYTES);
    receive(stream, version, fds).await?;
    if let Err(error) = check_version(version) {
        return Ok(Err(error));
    }
    receive(stream, rest, fds).await?;
    Ok(Ok(bytes))
}

/// What the writer says first.
///
/// # Errors
/// Outside: what the system says. Inside: what is wrong with what came.
pub(super) async fn receive_hello(stream: &UnixStream, fds: &mut Vec<OwnedFd>) -> io::Result<Result<Hello, WireError>> {
    let bytes = receive_versioned(stream, fds).await?;
    Ok(bytes.and_then(|bytes| Hello::decode(&bytes)))
}

/// What the receiver answers.
///
/// # Errors
/// As [`receive_hello`].
pub(super) async fn receive_answer(
    stream: &UnixStream,
    fds: &mut Vec<OwnedFd>,
) -> io::Result<Result<Answer, WireError>> {
    let bytes = receive_versioned(stream, fds).await?;
    Ok(bytes.and_then(|bytes| Answer::decode(&bytes)))
}

/// The next byte of an open connection; none at its end.
///
/// # Errors
/// Whatever the system says.
pub(super) async fn receive_signal(stream: &UnixStream) -> io::Result<Option<u8>> {
    let mut byte = [0];
    let received = stream
        .async_io(Interest::READABLE, || {
            Ok(rustix::net::recv(stream, &mut byte[..], RecvFlags::DONTWAIT)?.0)
        })
        .await?;
    Ok((received > 0).then_some(byte[0]))
}

/// Sends one byte, which the socket's buffer always takes; where it does not, the peer is gone or harmful, and what it is
/// told makes no difference.
pub(super) fn send_signal(stream: &UnixStream, signal: u8) {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let _ = rustix::net::send(stream, &[signal], flags);
}

/// The end of `shm://HOSTID/NAME` that names the socket, where the host is this one.
///
/// # Errors
/// Another form of address; another host, at once.
pub(super) fn socket_name<'a>(address: &'a str, host: &str) -> Result<&'a str, ConnectError> {
    let of = |name: &'a str| {
        name.split_once('/')
            .filter(|(host, name)| !host.is_empty() && !name.is_empty())
    };
    let (their_host, name) = address
        .strip_prefix("shm://")
        .and_then(of)
        .ok_or_else(|| ConnectError::BadAddress {
            address: address.to_owned(),
            path: PathKind::Shm,
        })?;
    if their_host != host {
        return Err(ConnectError::Unreachable {
            address: address.to_owned(),
            kind: ErrorKind::HostUnreachable,
        });
    }
    Ok(name)
}

/// Wakes one task of another process, or of this one.
pub(super) struct Bell(OwnedFd);

impl Bell {
    /// # Errors
    /// Whatever the system refuses.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(rustix::event::eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    pub(super) fn of(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Rings. Where the count is at its top it rings already.
    pub(super) fn ring(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// To hear it.
    ///
    /// # Errors
    /// A descriptor that cannot be waited on.
    pub(super) fn listen(self) -> io::Result<AsyncFd<OwnedFd>> {
        let flags = rustix::fs::fcntl_getfl(&self.0)?;
        rustix::fs::fcntl_setfl(&self.0, flags | rustix::fs::OFlags::NONBLOCK)?;
        readable(self.0)
    }
}

/// Waits until a bell rings, and silences it.
///
/// # Errors
/// A descriptor that is no bell.
pub(super) async fn hear(bell: &AsyncFd<OwnedFd>) -> io::Result<()> {
    bell.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut [0; 8])?))
        .await
        .map(|_| ())
}

/// Whether this descriptor is a handle of that process: what is readable on its end, and on nothing else.
pub(super) fn is_handle_of(pidfd: &OwnedFd, pid: Option<i32>) -> bool {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()));
    let named = info.as_deref().unwrap_or_default().lines();
    let mut named = named.filter_map(|line| line.strip_prefix("Pid:")?.trim().parse::<i32>().ok());
    // A process outside our pid namespace has no number here: 0 in both places.
    named.next().is_some_and(|named| named == pid.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_this_host_only() {
        assert_eq!(socket_name("shm://ab/baton-1", "ab"), Ok("baton-1"));
        let unreachable = |error| matches!(error, Err(ConnectError::Unreachable { .. }));
        assert!(unreachable(socket_name("shm://ac/baton-1", "ab")));
        for bad in ["", "shm://", "shm://ab", "shm://ab/", "shm:///x", "tcp://ab/x"] {
            assert!(
                matches!(socket_name(bad, "ab"), Err(ConnectError::BadAddress { .. })),
                "{bad}"
            );
        }
        assert_eq!(host_id().unwrap(), host_id().unwrap());
        assert_eq!(host_id().unwrap().len(), 16);
    }

    #[test]
    fn a_handle_is_told_from_other_descriptors_and_other_processes() {
        let us = rustix::process::getpid();
        let ours = rustix::process::pidfd_open(us, rustix::process::PidfdFlags::NONBLOCK).unwrap();
        let pid = us.as_raw_nonzero().get();
        assert!(is_handle_of(&ours, Some(pid)));
        assert!(!is_handle_of(&ours, Some(pid + 1)));
        assert!(!is_handle_of(&ours, None));
        assert!(!is_handle_of(&Bell::new().unwrap().0, Some(pid)));
        assert!(!is_handle_of(&Bell::new().unwrap().0, None));
    }

    #[test]
    fn every_refusal_has_its_place() {
        for (refusal, place) in Refusal::ALL.into_iter().zip(0..) {
            assert_eq!(refusal as usize, place);
        }
    }
}
