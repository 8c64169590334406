//! Verbs as safe types: the only unsafe code of the rdma transport, and the only place that names `ibverbs_sys`.
//!
//! Every object holds an `Arc` of what it was made from, so that nothing is destroyed before its children. What makes the
//! rest sound: a device reaches memory only through a registration, a [`Region`] keeps its memory alive until the
//! registration is over, and nobody makes references into registered memory.
//!
//! Posting, polling and arming go through the table of operations of the context, because the functions of verbs.h are
//! inline. The classic `post_send` is used: the extended calls of rdma-core 44 are faulty for rxe.

mod context;
mod error;
mod memory;
mod queue;
mod work;

pub(in crate::transport) use context::{AsyncEvent, AsyncEvents, Context, Port};
pub(in crate::transport) use error::VerbsError;
pub(in crate::transport) use memory::{DmaBuf, HostMemory, Mailbox, Memory, ProtectionDomain, Region, Registration};
pub(in crate::transport) use queue::{Capacity, CompletionQueue, QueuePair, RemoteEnd};
pub(in crate::transport) use work::{Chain, Completion, Failure, Part, Remote, Work};
