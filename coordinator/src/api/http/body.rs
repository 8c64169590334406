//! Reads a request's body, within bounds of size and time.

use super::error::HttpError;
use super::router::HttpOptions;
use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;

/// The whole body.
pub(super) async fn read(body: Body, options: &HttpOptions) -> Result<Bytes, HttpError> {
    let whole = tokio::time::timeout(options.body_timeout, collect(body, options.body_bytes_max));
    whole
        .await
        .unwrap_or_else(|_| Err(HttpError::too_slow(options.body_timeout)))
}

async fn collect(body: Body, limit: usize) -> Result<Bytes, HttpError> {
    let mut pieces = body.into_data_stream();
    let mut whole = BytesMut::new();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| HttpError::malformed(format!("the body broke off: {error}")))?;
        if piece.len() > limit.saturating_sub(whole.len()) {
            return Err(HttpError::too_large(limit));
        }
        whole.extend_from_slice(&piece);
    }
    Ok(whole.freeze())
}
