//! Routes, the request id that each response carries, and one line of log and metric per request.

use super::error::HttpError;
use super::request::Kind;
use super::{models, serve};
use crate::Frontend;
use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use baton_types::RequestId;
use http::{HeaderName, HeaderValue, Uri};
use std::sync::Arc;
use std::time::Duration;

/// The door's limits.
#[derive(Debug, Clone)]
pub struct HttpOptions {
    /// Larger request bodies are refused. Bytes.
    pub body_bytes_max: usize,
    /// A client that takes longer to send its request's body is refused.
    pub body_timeout: Duration,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            body_bytes_max: 4 << 20,
            body_timeout: Duration::from_secs(30),
        }
    }
}

/// What every handler shares.
pub(super) struct Door {
    pub(super) frontend: Arc<dyn Frontend>,
    pub(super) options: HttpOptions,
}

/// OpenAI's API before `frontend`, and `/healthz`.
pub fn router(frontend: Arc<dyn Frontend>, options: HttpOptions) -> Router {
    Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/completions", post(completion))
        .route("/v1/chat/completions", post(chat))
        .route("/healthz", get(async || "ok"))
        .fallback(async |uri: Uri| HttpError::no_such_path(uri.path()))
        .method_not_allowed_fallback(async |uri: Uri| HttpError::wrong_method(uri.path()))
        .with_state(Arc::new(Door { frontend, options }))
        .layer(middleware::from_fn(name))
}

async fn chat(State(door): State<Arc<Door>>, request: Request) -> Result<Response, HttpError> {
    serve::answer(door, Kind::Chat, request).await
}

async fn completion(State(door): State<Arc<Door>>, request: Request) -> Result<Response, HttpError> {
    serve::answer(door, Kind::Completion, request).await
}

/// Draws the request's id, which the response carries whatever becomes of it.
async fn name(mut request: Request, next: Next) -> Response {
    let request_id = RequestId::random();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    request.extensions_mut().insert(request_id);
    let mut response = next.run(request).await;
    let id = HeaderValue::try_from(request_id.to_string()).expect("hexadecimal digits are a header value");
    response
        .headers_mut()
        .insert(HeaderName::from_static("x-request-id"), id);
    let status = response.status().as_u16();
    metrics::counter!("baton_coordinator_http_responses_total", "status" => status.to_string()).increment(1);
    tracing::debug!(%request_id, %method, path, status, "http response begun");
    response
}
