//! What is known of one kind of node that serves one model: how long it computes, sends and starts, and how much KV it has.

mod error;
mod file;
mod gpus;
mod grid;
mod models;
mod node;
mod roofline;
mod row;

pub use error::{OutOfRange, ProfileError};
pub use file::{
    Contended, Coverage, ErrorBar, FORMAT_VERSION, HandoverPath, HandoverTail, Kind, ModelShape, Profile, Residual,
    Steps,
};
pub use gpus::{GPUS, Gpu, gpu};
pub use grid::Grid;
pub use models::{MODELS, model};
pub use node::{Neighbour, NodeModel};
pub use roofline::estimate;
pub use row::{DecodeRow, Segment};
