//! What keeps a coordinator from coming up, or ends it.

use crate::TenantsError;
use baton_cluster_state::{ClaimError, StoreError};
use baton_node_runtime::telemetry::TelemetryError;
use baton_node_runtime::{AdminError, BindError};
use baton_planner::profile::ProfileError;

/// A coordinator that did not come up, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A flag's value does not fit.
    #[error("{flag} is {value}; it must be {expected}")]
    Option {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: String,
        /// What would fit.
        expected: &'static str,
    },
    /// Logs or metrics.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// An address is not to be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// A bound socket does not work.
    #[error("{flag}: {source}")]
    Socket {
        /// The flag that names it.
        flag: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The admin port.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store belongs to another coordinator.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The tenants file.
    #[error("--tenants: {0}")]
    Tenants(#[from] TenantsError),
    /// The controller's profile.
    #[error("--control-profile: {0}")]
    Profile(#[from] ProfileError),
    /// The gRPC reflection service could not be made.
    #[error("gRPC reflection: {reason}")]
    Reflection {
        /// Why.
        reason: String,
    },
    /// The process was told to end before it was up.
    #[error("told to end before it was up")]
    Interrupted,
    /// A task failed that the coordinator cannot do without.
    #[error("{reason}")]
    Fatal {
        /// What happened.
        reason: String,
    },
}

impl StartError {
    /// The same start may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Bind(error) => error.is_retryable(),
            Self::Admin(error) => error.is_retryable(),
            Self::Store(error) => error.is_retryable(),
            Self::Claim(error) => error.is_retryable(),
            Self::Profile(error) => error.is_retryable(),
            Self::Interrupted => true,
            Self::Option { .. }
            | Self::Telemetry(_)
            | Self::Socket { .. }
            | Self::Tenants(_)
            | Self::Reflection { .. }
            | Self::Fatal { .. } => false,
        }
    }
}
