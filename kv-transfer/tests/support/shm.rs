//! The shared-memory transport, both ends in one process.

use super::{Kind, NodeOptions};
use baton_kv_transfer::transport::{Local, ShmOptions, ShmTransport, Transport};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::sync::Arc;
use std::time::Duration;

/// The shared-memory transport.
#[derive(Default)]
pub struct Shm;

impl Kind for Shm {
    fn start(&self, options: &NodeOptions, local: Local) -> BoxFuture<'_, Arc<dyn Transport>> {
        let options = ShmOptions {
            connect_timeout: Duration::from_secs(30),
            shutdown_timeout: Duration::from_secs(30),
            bytes_in_flight_max: options.bytes_in_flight_max,
        };
        async move { Arc::new(ShmTransport::start(options, local).unwrap()) as Arc<dyn Transport> }.boxed()
    }

    fn connections(&self, _asked: usize) -> usize {
        1
    }

    fn one_sided(&self) -> bool {
        true
    }
}
