//! From files to a backend: map, parse, check, fingerprint, hand to the backend.
//!
//! Files are hostile until checked: no length from a header is used before it was compared with the file's size, nothing
//! is allocated by a header's word alone, and arithmetic on it is checked.

mod checkpoint;
mod entry;
mod fingerprint;
mod gguf;
mod gguf_header;
mod hf_config;
mod limits;
mod mapped;
mod safetensors;

pub(crate) use checkpoint::Checkpoint;
pub use entry::{LoadOptions, load};
