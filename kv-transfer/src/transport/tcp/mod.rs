//! KV over TCP: several connections per pair of processes, extents straight from arena to arena.
//!
//! `wire` is the format (and the only place that knows it), `connect` and `listen` the two ends of the handshake, `send` and
//! `receive` the two ends of a connection, `outbox` and `acks` what they keep, `wait` how their threads wait. Nothing is staged:
//! the kernel copies out of source blocks and into destination blocks, many extents to one system call. Data flows one way and
//! acknowledgements the other; a connection that fails or ends is never resumed.

mod acks;
mod connect;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
#[doc(hidden)]
pub mod inside;
mod listen;
mod outbox;
mod receive;
mod send;
mod wait;
/// Its `Hello` opens the connections of other transports too.
pub(super) mod wire;

#[cfg(test)]
mod hostile_test;

pub use listen::{TcpOptions, TcpTransport};
