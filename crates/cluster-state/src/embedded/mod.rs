//! Skeleton.
use baton_node_runtime::{Clock, Supervisor};
use std::net::SocketAddr;
/// A store inside this process.
pub struct EmbeddedStore;
impl EmbeddedStore {
    /// Serves on `listener` until the supervisor shuts down.
    pub async fn serve(_listener: tokio::net::TcpListener, _clock: Clock, _supervisor: Supervisor) -> std::io::Result<Self> { todo!() }
    /// Where it listens.
    pub fn address(&self) -> SocketAddr { todo!() }
}
