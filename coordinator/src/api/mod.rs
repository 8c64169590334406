//! The doors. They convert between wire forms and [`crate::Frontend`]; nothing is decided here.

pub(crate) mod grpc;
pub mod http;
