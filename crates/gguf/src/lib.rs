//! The header of a GGUF file: its metadata and its list of tensors.
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little-endian.
//!
//! Files are hostile until checked: every length and count is compared with what is left of the file before it is used,
//! nothing is allocated by a header's word alone, arithmetic on it is checked, and nothing panics. A reader of our own,
//! because the small crates for it trust the header: they panic on an unknown element type or a large count, and reserve
//! memory by it.
//!
//! What the keys mean, and which element types can be read, is the callers' affair.

#![warn(missing_docs)]

mod cursor;
mod error;
mod header;
mod value;

pub use error::{Field, Flaw, ReadError};
pub use header::{Header, Layout, TensorInfo, read_header, read_metadata};
pub use value::{Metadata, Value};
