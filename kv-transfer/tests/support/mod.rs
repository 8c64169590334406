//! What the conformance suite needs: nodes with an arena and a book of grants, and the transports under test.

mod book;
mod faulty;
mod node;
#[cfg(feature = "rdma")]
mod rdma;
mod shm;

pub use book::{Book, Event};
pub use faulty::{Dice, Faults, FaultyPath};
pub use node::{Kind, Memory, Node, NodeOptions, Tcp, geometry};
#[cfg(feature = "rdma")]
pub use rdma::Rdma;
pub use shm::Shm;
