//! Listening sockets, with errors that say which flag to change.

use std::net::SocketAddr;
use tokio::net::TcpListener;

/// An address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} ({flag}): {source}{remedy}")]
pub struct BindError {
    /// The flag that names the address, such as `--listen`.
    pub flag: &'static str,
    /// The address.
    pub address: SocketAddr,
    /// The system's answer.
    pub source: std::io::Error,
    remedy: &'static str,
}

impl BindError {
    /// A port in use may be free later; nothing else changes by itself.
    pub fn is_retryable(&self) -> bool {
        self.source.kind() == std::io::ErrorKind::AddrInUse
    }
}

/// Listens on `address`, which the operator gave by `flag` (such as `--listen`). Port 0 takes any free one.
///
/// # Errors
/// Names the flag and the address.
pub async fn bind(flag: &'static str, address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| {
        let remedy = match source.kind() {
            std::io::ErrorKind::AddrInUse => "; choose another port, or 0 for any free one",
            std::io::ErrorKind::AddrNotAvailable => "; this machine has no such address",
            std::io::ErrorKind::PermissionDenied => "; ports below 1024 need privileges",
            _ => "",
        };
        BindError {
            flag,
            address,
            source,
            remedy,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_in_use_names_flag_and_address() {
        let first = bind("--listen", "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = first.local_addr().unwrap();
        let error = bind("--http-listen", address).await.unwrap_err();
        assert!(error.is_retryable());
        let text = error.to_string();
        assert!(
            text.contains("--http-listen") && text.contains(&address.to_string()),
            "{text}"
        );
        assert!(text.contains("another port"), "{text}");
    }
}
