//! The shared-memory transport, both ends in one process.

use super::{Kind, NodeOptions};
use baton_kv_transfer::transport::{Local, ShmOptions, ShmTransport, Transport};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::sync::Arc;
use std::time::Duration;

/// The shared-memory transport.
pub struct Shm {
    shutdown_timeout: Duration,
}

impl Default for Shm {
    fn default() -> Self {
        let shutdown_timeout = Duration::from_secs(30);
        Self { shutdown_timeout }
    }
}

impl Shm {
    /// One that waits for proof only briefly when it ends.
    pub fn impatient() -> Self {
        let shutdown_timeout = Duration::from_millis(200);
        Self { shutdown_timeout }
    }
}

impl Kind for Shm {
    fn start(&self, options: &NodeOptions, local: Local) -> BoxFuture<'_, Arc<dyn Transport>> {
        let options = ShmOptions {
            connect_timeout: Duration::from_secs(30),
            shutdown_timeout: self.shutdown_timeout,
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

    fn queues(&self) -> bool {
        false
    }
}
