//! From files to a backend.

mod entry;

pub use entry::{LoadOptions, load};
