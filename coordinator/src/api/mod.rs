//! The doors. They convert between wire forms and [`crate::Frontend`]; nothing is decided here.

pub mod http;
