//! The transports of an endpoint: which it has, and how each is started.

use crate::transport::{
    Local, MemoryNetwork, MemoryOptions, MemoryTransport, ShmOptions, ShmTransport, TcpOptions, TcpTransport, Transport,
};
use crate::{EndpointOptions, PathKind, StartError};
use futures::future::join_all;
use std::net::SocketAddr;
use std::sync::Arc;

/// Starts them in order. With `skip_unavailable`, those that this host cannot have are left out.
pub(super) async fn start_transports(
    options: &EndpointOptions,
    local: impl Fn(PathKind) -> Local,
) -> Result<Vec<Arc<dyn Transport>>, StartError> {
    let mut transports: Vec<Arc<dyn Transport>> = Vec::new();
    let mut unavailable = None;
    for path in &options.transports {
        match start_transport(*path, options, local(*path)).await {
            Ok(transport) => transports.push(transport),
            Err(error) if may_skip(options, *path, &error) => {
                tracing::info!(%path, %error, "path is not offered");
                unavailable.get_or_insert(error);
            }
            Err(error) => {
                join_all(transports.iter().map(|transport| transport.shutdown())).await;
                return Err(error);
            }
        }
    }
    match unavailable {
        Some(error) if transports.is_empty() => Err(error),
        Some(_) | None => Ok(transports),
    }
}

fn may_skip(options: &EndpointOptions, path: PathKind, error: &StartError) -> bool {
    let unavailable = match error {
        StartError::Transport { .. } | StartError::NotBuilt { .. } => true,
        StartError::Listen { .. }
        | StartError::Option { .. }
        | StartError::Geometry(_)
        | StartError::InstanceInUse { .. } => false,
    };
    unavailable && options.skip_unavailable && options.require_path != Some(path)
}

async fn start_transport(
    path: PathKind,
    options: &EndpointOptions,
    local: Local,
) -> Result<Arc<dyn Transport>, StartError> {
    match path {
        PathKind::Memory => {
            let instance = local.identity.instance;
            let memory = MemoryOptions {
                name: instance.to_string(),
                connections_per_peer: options.connections_per_peer,
                bytes_in_flight_max: options.bytes_in_flight_max,
            };
            let started = MemoryTransport::start(&MemoryNetwork::of_process(), memory, local);
            Ok(Arc::new(started.map_err(|_| StartError::InstanceInUse { instance })?))
        }
        PathKind::Tcp => start_tcp(options, local).await,
        PathKind::Shm => {
            let shm = ShmOptions {
                connect_timeout: options.connect_timeout,
                shutdown_timeout: options.fence_timeout,
                bytes_in_flight_max: options.bytes_in_flight_max,
            };
            let started = ShmTransport::start(shm, local);
            Ok(Arc::new(started.map_err(|error| StartError::Transport {
                path,
                reason: error.to_string(),
            })?))
        }
        PathKind::Rdma => start_rdma(options, local).await,
        PathKind::Cuda => Err(StartError::NotBuilt { path }),
    }
}

async fn start_tcp(options: &EndpointOptions, local: Local) -> Result<Arc<dyn Transport>, StartError> {
    let address = listen_behind(options, 1)?;
    let tcp = TcpOptions {
        listen: address,
        advertise: options.advertise.clone(),
        connections_per_peer: options.connections_per_peer,
        crc: options.crc,
        connect_timeout: options.connect_timeout,
        progress_timeout: options.progress_timeout,
        bytes_in_flight_max: options.bytes_in_flight_max,
    };
    let bound = TcpTransport::bind(tcp, local).await;
    Ok(Arc::new(
        bound.map_err(|source| StartError::Listen { address, source })?,
    ))
}

/// The address so many ports after that of control; any port where that has any.
fn listen_behind(options: &EndpointOptions, ports: u16) -> Result<SocketAddr, StartError> {
    let mut address = options.listen;
    address.set_port(match address.port() {
        0 => 0,
        port => port.checked_add(ports).ok_or(StartError::Option {
            option: "transfer_listen",
            value: address.to_string(),
            reason: "tcp data comes to the port after it, the rendezvous of rdma to the one after that",
        })?,
    });
    Ok(address)
}

#[cfg(feature = "rdma")]
async fn start_rdma(options: &EndpointOptions, local: Local) -> Result<Arc<dyn Transport>, StartError> {
    use crate::transport::{RdmaError, RdmaOptions, RdmaTransport};
    let rdma = RdmaOptions {
        listen: listen_behind(options, 2)?,
        advertise: options.advertise.clone(),
        devices: options.rdma_devices.clone(),
        connections_per_peer: options.connections_per_peer,
        connect_timeout: options.connect_timeout,
        progress_timeout: options.progress_timeout,
        bytes_in_flight_max: options.bytes_in_flight_max,
        receives: RdmaOptions::RECEIVES,
        region_bytes_max: u64::MAX,
        dma_buf: None,
    };
    let started = RdmaTransport::start(rdma, local).await;
    Ok(Arc::new(started.map_err(|error| match error {
        RdmaError::Listen { address, source } => StartError::Listen { address, source },
        RdmaError::Device { reason } => StartError::Transport {
            path: PathKind::Rdma,
            reason,
        },
    })?))
}

#[cfg(not(feature = "rdma"))]
async fn start_rdma(_: &EndpointOptions, _: Local) -> Result<Arc<dyn Transport>, StartError> {
    Err(StartError::NotBuilt { path: PathKind::Rdma })
}
