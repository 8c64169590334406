//! Reads a request's body, up to a limit.

use super::error::HttpError;
use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;

/// The whole body.
pub(super) async fn read(body: Body, limit: usize) -> Result<Bytes, HttpError> {
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
