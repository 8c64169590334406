//! The connection to one node: HTTP/2, shared by all that is asked of it, kept alive by pings so that a node that was cut
//! off is noticed within 4 s.

use std::sync::Arc;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const PING_INTERVAL: Duration = Duration::from_secs(2);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// All streams together: tokens of other requests never wait for the window.
const CONNECTION_WINDOW_BYTES: u32 = 8 * 1024 * 1024;
const STREAM_WINDOW_BYTES: u32 = 512 * 1024;

/// Makes a connection to the node at an address, when it is first used and again after each loss.
pub(crate) type Connect = Arc<dyn Fn(&str) -> Result<Channel, tonic::transport::Error> + Send + Sync>;

/// How nodes are talked to.
///
/// # Errors
/// Where `address` is no `host:port`.
pub(crate) fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES);
    Ok(endpoint)
}

/// Connects over the network.
pub(crate) fn network() -> Connect {
    Arc::new(|address| Ok(endpoint(address)?.connect_lazy()))
}
