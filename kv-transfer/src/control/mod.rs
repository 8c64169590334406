//! The control connection: one ordered TCP connection from each sender to each receiver, over which everything but the blocks
//! travels. `wire` is its form, `convert` the way from and to the words of `session`, `codec` its framing, `handshake` who may
//! talk to whom, `line` the running connection.
//!
//! Invariants: no input makes it panic or allocate more than [`codec::FRAME_BYTES_MAX`]; a connection belongs to one pair of
//! process instances; silence kills it.

mod codec;
mod convert;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod handshake;
mod line;
mod wire;

pub(crate) use codec::PAYLOAD_BYTES_MAX;
pub(crate) use handshake::{HandshakeError, answer, greet};
pub(crate) use line::{Line, LineOptions, Spoken, run};
