//! Why there is nothing to put load on.

/// Why there is nothing to put load on.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not an address.
    #[error("`{given}` is no endpoint: expected HOST:PORT (Baton, gRPC) or http://HOST:PORT (OpenAI's HTTP interface)")]
    Address {
        /// What was given.
        given: String,
    },
    /// Encryption is not spoken.
    #[error("{given}: only http:// is spoken, without encryption: load is put on servers of one's own network")]
    Encrypted {
        /// What was given.
        given: String,
    },
    /// Nobody answers there.
    #[error("nobody answers at {address}: {reason}")]
    Connect {
        /// Where.
        address: String,
        /// Why.
        reason: String,
    },
    /// Something answers, but not as expected.
    #[error("{address} does not list its models: {reason}")]
    Models {
        /// Where.
        address: String,
        /// What it said.
        reason: String,
    },
    /// It serves other models.
    #[error("{address} does not serve the model `{wanted}`: it serves {known}")]
    UnknownModel {
        /// Where.
        address: String,
        /// What was asked for.
        wanted: String,
        /// What there is.
        known: String,
    },
    /// It serves nothing yet, or several models and none was named.
    #[error("{address} serves {known}: name one with --model")]
    WhichModel {
        /// Where.
        address: String,
        /// What there is.
        known: String,
    },
}

impl LoadError {
    /// Later there may be somebody.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Models { .. } => true,
            Self::Address { .. } | Self::Encrypted { .. } | Self::UnknownModel { .. } | Self::WhichModel { .. } => {
                false
            }
        }
    }
}

/// The innermost cause: transports say only that something went wrong.
pub(crate) fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = inner.to_string();
        cause = inner.source();
    }
    text
}
