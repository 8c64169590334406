//! How extents travel: one contract, one conformance suite (`tests/conformance.rs`), one folder or file per implementation.
//!
//! `contract` is the border to the endpoint.

mod contract;

pub use contract::{
    Claim, ConnectError, Extent, ExtentHeader, Landing, Path, PathError, Reject, SourceClaim, Transport, WriterConnection,
};
