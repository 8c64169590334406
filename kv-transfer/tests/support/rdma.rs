//! The rdma transport over the two devices that `BATON_TEST_RDMA_DEVICES` names (`rxe0,rxe1`): writers have the first,
//! receivers the second.

use super::{Kind, NodeOptions};
use baton_kv_transfer::transport::{Local, RdmaOptions, RdmaTransport, Transport};
use futures::FutureExt;
use futures::future::BoxFuture;
use rustix::fs::MemfdFlags;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// The transport, where this host has devices for it.
pub struct Rdma {
    writer: String,
    receiver: String,
}

impl Rdma {
    /// None where there are no devices; says so aloud.
    pub fn here() -> Option<Self> {
        let named = std::env::var("BATON_TEST_RDMA_DEVICES").unwrap_or_default();
        match named.split_once(',') {
            Some((writer, receiver)) => Some(Self {
                writer: writer.to_owned(),
                receiver: receiver.to_owned(),
            }),
            None => {
                // Past the harness, which keeps what passing tests print to itself.
                let _ = writeln!(
                    std::io::stderr(),
                    "skipped: BATON_TEST_RDMA_DEVICES names no two rdma devices (this host has {:?}); \
                     tests/rdma-guest.sh runs this where there are two",
                    RdmaTransport::devices()
                );
                None
            }
        }
    }

    /// Options that bring every bound within reach of a test.
    pub fn options(&self, options: &NodeOptions) -> RdmaOptions {
        let block_bytes = options.geometry.block_bytes() as u64;
        // No dma-buf, but a descriptor: what the device says of it is tested.
        let memory = rustix::fs::memfd_create("no-dma-buf", MemfdFlags::CLOEXEC).unwrap();
        RdmaOptions {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: None,
            devices: vec![if options.receives { &self.receiver } else { &self.writer }.clone()],
            connections_per_peer: options.connections,
            connect_timeout: Duration::from_secs(30),
            progress_timeout: Duration::from_secs(30),
            bytes_in_flight_max: options.bytes_in_flight_max,
            receives: 8,
            region_bytes_max: (block_bytes * 7).max(3 << 20),
            dma_buf: Some(Arc::new(memory)),
        }
    }
}

impl Kind for Rdma {
    fn start(&self, options: &NodeOptions, local: Local) -> BoxFuture<'_, Arc<dyn Transport>> {
        let options = self.options(options);
        async move {
            let transport = RdmaTransport::start(options, local).await.unwrap();
            let registration = transport.registration();
            let fallback = "host instead of dma-buf: ibv_reg_dmabuf_mr: ";
            assert!(
                registration.iter().all(|how| how.starts_with(fallback)),
                "{registration:?}"
            );
            Arc::new(transport) as Arc<dyn Transport>
        }
        .boxed()
    }

    fn one_sided(&self) -> bool {
        true
    }

    fn slow(&self) -> bool {
        true
    }
}
