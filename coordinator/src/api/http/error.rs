//! Failures in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use crate::{ApiCode, ApiError};
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde_json::{Value, json};
use std::time::Duration;

/// When a client that was not told otherwise may come again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A refusal or failure on its way to an HTTP client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HttpError {
    pub(super) status: StatusCode,
    /// OpenAI's `type`.
    pub(super) kind: &'static str,
    pub(super) code: Option<&'static str>,
    pub(super) message: String,
    /// The field at fault.
    pub(super) param: Option<String>,
    pub(super) retry_after: Option<Duration>,
}

impl HttpError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            code: None,
            message: message.into(),
            param: None,
            retry_after: None,
        }
    }

    /// A body that is no request at all.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A field at fault; `message` goes on after its name.
    pub(super) fn field(param: impl Into<String>, message: impl std::fmt::Display) -> Self {
        let param = param.into();
        Self {
            param: Some(param.clone()),
            ..Self::malformed(format!("`{param}` {message}"))
        }
    }

    /// A field that may be served one day.
    pub(super) fn unserved(param: impl Into<String>) -> Self {
        Self {
            code: Some("unsupported_parameter"),
            ..Self::field(param, "is not supported yet")
        }
    }

    pub(super) fn no_such_path(path: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            format!("there is nothing at {path}"),
        )
    }

    pub(super) fn wrong_method(path: &str) -> Self {
        let message = format!("{path} does not take this method");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    pub(super) fn too_large(limit: usize) -> Self {
        let message = format!("the body is larger than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    pub(super) fn too_slow(limit: Duration) -> Self {
        let message = format!("the body did not arrive within {} s", limit.as_secs_f32());
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message)
    }

    pub(super) fn no_such_model(model: &str) -> Self {
        ApiError::new(ApiCode::NotFound, format!("the model `{model}` is not served here")).into()
    }

    /// Somebody cancelled the request while its client still waited.
    pub(super) fn cancelled() -> Self {
        // 499, "client closed request", as nginx has it: no standard status says it, and clients do not retry this one.
        let status = StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST);
        Self {
            code: Some("cancelled"),
            ..Self::new(status, "cancelled_error", "the request was cancelled")
        }
    }

    /// The answer ended with neither a reason nor an error.
    pub(super) fn broken_off() -> Self {
        ApiError::new(ApiCode::Internal, "the answer broke off without a reason").into()
    }

    pub(super) fn to_json(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl From<ApiError> for HttpError {
    fn from(error: ApiError) -> Self {
        let (status, kind, code) = match error.code {
            ApiCode::InvalidArgument => (StatusCode::BAD_REQUEST, "invalid_request_error", None),
            ApiCode::Unauthenticated => (
                StatusCode::UNAUTHORIZED,
                "invalid_request_error",
                Some("invalid_api_key"),
            ),
            ApiCode::NotFound => (StatusCode::NOT_FOUND, "invalid_request_error", Some("model_not_found")),
            ApiCode::ResourceExhausted => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("overloaded")),
            ApiCode::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("unavailable")),
            ApiCode::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, "server_error", Some("deadline_exceeded")),
            ApiCode::Internal => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "server_error",
                Some("internal_error"),
            ),
        };
        let param = match error.field.as_deref() {
            // A prompt of token ids has a field of its own in gRPC, not here.
            Some("prompt_tokens") => Some("prompt".to_owned()),
            Some(field) => Some(field.to_owned()),
            None => (error.code == ApiCode::NotFound).then(|| "model".to_owned()),
        };
        let retry_after = error
            .retry_after
            .or_else(|| error.is_retryable().then_some(RETRY_AFTER));
        Self {
            status,
            kind,
            code,
            message: error.message,
            param,
            retry_after,
        }
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.to_json())).into_response();
        if let Some(after) = self.retry_after {
            let headers = response.headers_mut();
            let millis = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(millis.div_ceil(1000).max(1)));
            // The header that OpenAI's clients prefer.
            headers.insert(HeaderName::from_static("retry-after-ms"), HeaderValue::from(millis));
        }
        response
    }
}
