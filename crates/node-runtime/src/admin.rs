//! The admin port: `/metrics` for Prometheus, `/healthz` (the process answers) and `/readyz` (it takes work, else 503 and
//! the reason). It owns its listener; what it shows belongs to others.

use crate::{BindError, Metrics, Supervisor, bind};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How often recorded metrics are folded.
const UPKEEP: Duration = Duration::from_secs(5);

/// Whether the process takes work. Clones share it.
#[derive(Clone, Default)]
pub struct Readiness(Arc<Mutex<Ready>>);

struct Ready {
    ready: bool,
    reason: String,
}

impl Default for Ready {
    fn default() -> Self {
        Self {
            ready: false,
            reason: "starting".to_owned(),
        }
    }
}

impl Readiness {
    /// Not ready, because starting.
    pub fn new() -> Self {
        Self::default()
    }

    /// Changes it. The reason is shown in either case.
    pub fn set(&self, ready: bool, reason: impl Into<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Ready {
            ready,
            reason: reason.into(),
        };
    }

    /// As it is, with the reason.
    pub fn get(&self) -> (bool, String) {
        let ready = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (ready.ready, ready.reason.clone())
    }
}

/// An admin port that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The address is not to be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The socket does not tell its address.
    #[error("--admin-listen: {0}")]
    Socket(#[from] std::io::Error),
}

impl AdminError {
    /// As the cause is.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Bind(error) => error.is_retryable(),
            Self::Socket(_) => false,
        }
    }
}

/// The served port. It ends with the supervisor.
pub struct AdminServer {
    address: SocketAddr,
}

impl AdminServer {
    /// Serves on `listen` (`--admin-listen`) until the supervisor's shutdown.
    ///
    /// # Errors
    /// Where the address is not to be had.
    pub async fn start(
        listen: SocketAddr,
        readiness: Readiness,
        metrics: Metrics,
        supervisor: &Supervisor,
    ) -> Result<Self, AdminError> {
        let listener = bind("--admin-listen", listen).await?;
        let address = listener.local_addr()?;
        let shutdown = supervisor.shutdown_token();
        let router = axum::Router::new()
            .route("/metrics", get(render_metrics))
            .with_state(metrics.clone())
            .merge(
                axum::Router::new()
                    .route("/readyz", get(show_readiness))
                    .with_state(readiness),
            )
            .route("/healthz", get(|| async { "ok\n" }));
        let ends = shutdown.clone();
        supervisor.spawn("admin", async move {
            // Dropped rather than drained at the end: a scraper's idle connection must not hold the process.
            tokio::select! {
                () = ends.cancelled() => {}
                result = async { axum::serve(listener, router).await } => {
                    if let Err(error) = result {
                        tracing::warn!(%error, "admin port failed");
                    }
                }
            }
        });
        supervisor.spawn("metrics-upkeep", async move {
            loop {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(UPKEEP) => metrics.upkeep(),
                }
            }
        });
        Ok(Self { address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn render_metrics(State(metrics): State<Metrics>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.render())
}

async fn show_readiness(State(readiness): State<Readiness>) -> impl IntoResponse {
    let (ready, reason) = readiness.get();
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, format!("{reason}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn shows_health_readiness_and_metrics() {
        let supervisor = Supervisor::new();
        let readiness = Readiness::new();
        let listen = "127.0.0.1:0".parse().unwrap();
        let server = AdminServer::start(listen, readiness.clone(), Metrics::detached(), &supervisor)
            .await
            .unwrap();
        assert!(ask(server.address(), "/healthz").await.starts_with("HTTP/1.1 200"));
        let answer = ask(server.address(), "/readyz").await;
        assert!(
            answer.starts_with("HTTP/1.1 503") && answer.ends_with("starting\n"),
            "{answer}"
        );
        readiness.set(true, "ready");
        assert!(ask(server.address(), "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(ask(server.address(), "/metrics").await.contains("text/plain"));
        // An open connection does not hold the end.
        let _idle = tokio::net::TcpStream::connect(server.address()).await.unwrap();
        supervisor.begin_shutdown();
        assert_eq!(supervisor.join(Duration::from_secs(5)).await, Ok(()));
    }
}
