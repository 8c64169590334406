//! KV through shared memory, between processes of one host and one user: the writer maps the receiver's arena and copies once.
//!
//! `socket` is the handshake over a Unix socket, which passes descriptors, and its two ends are `connect` and `listen`; `map`
//! and `copy` are the memory, and the only unsafe code; `ring` is how the writer tells what it has copied; `path` and `receive`
//! are the two halves. The receiver's processor sees no write, so what is over is proven otherwise: see `receive`, and
//! docs/kv-transfer.md.

mod connect;
mod copy;
mod listen;
mod map;
mod path;
mod receive;
mod ring;
mod socket;

#[cfg(test)]
mod hostile_test;

pub use listen::{ShmOptions, ShmTransport};
