//! The gRPC door: `baton.v1.Inference` for clients, `baton.v1.Admin` for operators, and the standard health and reflection
//! services. Every response carries `x-request-id`.

mod admin;
mod advise;
mod convert;
mod explain;
mod health;
mod inference;
mod server;

pub(crate) use server::{DoorOptions, TASK, serve};
