//! How extents travel: one contract, one conformance suite (`tests/conformance.rs`), one folder or file per implementation.
//!
//! `contract` is the border to the endpoint. `lanes` is the sender's half that implementations share (bounds on bytes in
//! flight, one queue per connection, fences behind data, an orderly end), `writers` the receiver's half (living connections
//! and their end), `raw` the unsafe code that they share. `memory`, `shm` and `tcp` carry the bytes.

mod contract;
mod lanes;
mod local;
mod memory;
mod metric;
mod raw;
#[cfg(feature = "rdma")]
mod rdma;
mod shm;
pub(crate) mod tcp;
mod writers;

pub use contract::{
    Claim, Claims, ConnectError, Extent, ExtentHeader, Landing, Path, PathError, Place, Reject, SourceClaim, Transport,
    WriterConnection,
};
pub use local::Local;
pub use memory::{MemoryNetwork, MemoryOptions, MemoryTransport, NameTaken};
pub(crate) use raw::Still;
#[cfg(feature = "rdma")]
pub use rdma::{RdmaError, RdmaOptions, RdmaTransport};
pub use shm::{ShmOptions, ShmTransport};
#[doc(hidden)]
pub use tcp::inside;
pub use tcp::{TcpOptions, TcpTransport};
