//! A small in-memory store inside a process, speaking the part of the etcd v3 gRPC protocol that Baton uses, so that nodes
//! have one code path. Nothing survives the process; it is for one machine and one coordinator.
//!
//! Served: range, put, delete range, txn, compact; lease grant, keep-alive, revoke, time-to-live, leases; watch. All else
//! answers `UNIMPLEMENTED`. History is bounded: old revisions are compacted by themselves.

mod history;
mod kv_service;
mod lease_service;
mod leases;
mod range;
mod refusal;
mod server;
mod state;
mod watch_service;

pub use server::{EMBEDDED_CLUSTER_ID, EmbeddedStore};
