//! What Baton needs of a store, run on the embedded one and on a real etcd: whoever passes may hold a cluster's state.
//!
//! The raw protocol comes first (`kv`, `lease`, `watch`), then what this crate makes of it (`nodes`, `candidacy`, `outage`).

// A failed expectation anywhere in here is a failed test.
#![allow(clippy::unwrap_used)]

mod backend;
mod blocks;
mod candidacy;
mod kv;
mod lease;
mod nodes;
mod outage;
mod proxy;
mod support;
mod tls;
mod watch;
