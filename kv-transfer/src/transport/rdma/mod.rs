//! KV over RDMA: one-sided writes from arena to arena, through reliable queue pairs.
//!
//! `verbs` is all that is unsafe. `device` and `arena` are opened and registered once; `hello` is the rendezvous over tcp that
//! `connect` and `listen` hold; `pair` is one end of a queue pair; `plan` turns extents into work requests, `send` posts them,
//! `wire` is what travels in-band beside the data, `receive` takes note of it. The receiver's processor sees no byte of the
//! data: what fences it is the order within a queue pair, and its destruction.

mod arena;
mod completions;
mod connect;
mod device;
mod hello;
mod listen;
mod pair;
mod plan;
mod receive;
mod send;
mod verbs;
mod wire;

pub use listen::{RdmaError, RdmaOptions, RdmaTransport};
