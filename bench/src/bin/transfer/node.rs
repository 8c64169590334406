//! One end: an arena, a book and a transport of the kind under test.

use crate::book::Book;
use crate::case::Case;
use crate::options::Options;
use anyhow::{Context, Result, bail};
use baton_kv_transfer::transport::{
    Landing, Local, MemoryNetwork, MemoryOptions, MemoryTransport, ShmOptions, ShmTransport, TcpOptions, TcpTransport,
    Transport,
};
use baton_kv_transfer::{Arena, EndpointOptions, Identity, PathKind, Peer};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::{ArenaView, Instance, ModelFingerprint, NodeId, NumericsId};
use std::net::SocketAddr;
use std::sync::Arc;

/// A node without a role.
pub struct Node {
    pub identity: Identity,
    pub view: ArenaView,
    pub book: Arc<Book>,
    pub transport: Arc<dyn Transport>,
}

impl Node {
    /// With as many blocks as fit into the pool.
    pub async fn start(options: &Options, case: &Case, name: &str) -> Result<Self> {
        let identity = Identity {
            node: NodeId::new(name),
            instance: Instance::random(),
            fingerprint: ModelFingerprint([7; 32]),
            geometry: case.geometry,
            numerics: NumericsId("bench".into()),
            build: env!("CARGO_PKG_VERSION").into(),
        };
        let blocks = u32::try_from(case.blocks_in(options.pool_mib << 20)).context("too many blocks")?;
        let view = Arena::allocate(case.geometry, blocks, &mut |_, _| ())?.view();
        let book = Book::new(case.geometry);
        let local = Local {
            identity: identity.clone(),
            arena: view.clone(),
            landing: Arc::clone(&book) as Arc<dyn Landing>,
            clock: Clock::new(),
            supervisor: Supervisor::new(),
        };
        let transport = transport(options, local).await?;
        Ok(Self {
            identity,
            view,
            book,
            transport,
        })
    }

    pub fn peer(&self) -> Peer {
        Peer {
            node: self.identity.node.clone(),
            instance: self.identity.instance,
            addresses: vec![self.transport.address()],
        }
    }
}

/// The transport under test, with the defaults of an endpoint.
async fn transport(options: &Options, local: Local) -> Result<Arc<dyn Transport>> {
    let defaults = EndpointOptions::default();
    let connections_per_peer = options.connections.unwrap_or(defaults.connections_per_peer);
    let bytes_in_flight_max = defaults.bytes_in_flight_max;
    Ok(match options.transport {
        PathKind::Memory => {
            let options = MemoryOptions {
                name: local.identity.instance.to_string(),
                connections_per_peer,
                bytes_in_flight_max,
            };
            Arc::new(MemoryTransport::start(&MemoryNetwork::of_process(), options, local)?)
        }
        PathKind::Tcp => {
            let options = TcpOptions {
                listen: SocketAddr::new(options.host, 0),
                advertise: None,
                connections_per_peer,
                crc: options.crc.is_on(),
                connect_timeout: defaults.connect_timeout,
                progress_timeout: defaults.progress_timeout,
                bytes_in_flight_max,
            };
            Arc::new(TcpTransport::bind(options, local).await?)
        }
        PathKind::Rdma => rdma(options, connections_per_peer, local).await?,
        PathKind::Shm => {
            let options = ShmOptions {
                connect_timeout: defaults.connect_timeout,
                shutdown_timeout: defaults.fence_timeout,
                bytes_in_flight_max,
            };
            Arc::new(ShmTransport::start(options, local)?)
        }
        kind @ PathKind::Cuda => bail!("this build has no {kind} transport"),
    })
}

#[cfg(feature = "rdma")]
async fn rdma(options: &Options, connections_per_peer: usize, local: Local) -> Result<Arc<dyn Transport>> {
    use crate::options::Role;
    use baton_kv_transfer::transport::{RdmaOptions, RdmaTransport};
    let defaults = EndpointOptions::default();
    let device = match options.role {
        Role::Initiator => options.devices.first(),
        Role::Target => options.devices.last(),
    };
    let options = RdmaOptions {
        listen: SocketAddr::new(options.host, 0),
        advertise: None,
        devices: device.into_iter().cloned().collect(),
        connections_per_peer,
        connect_timeout: std::time::Duration::from_secs(10),
        progress_timeout: defaults.progress_timeout,
        bytes_in_flight_max: defaults.bytes_in_flight_max,
        receives: RdmaOptions::RECEIVES,
        region_bytes_max: u64::MAX,
        dma_buf: None,
    };
    Ok(Arc::new(RdmaTransport::start(options, local).await?))
}

#[cfg(not(feature = "rdma"))]
async fn rdma(_: &Options, _: usize, _: Local) -> Result<Arc<dyn Transport>> {
    bail!("this build has no rdma transport: build it with `--features rdma`")
}
