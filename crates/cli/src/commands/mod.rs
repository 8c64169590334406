//! The subcommands, a file each.

mod advice;
mod chat;
mod command_line;
mod coordinator;
mod demo;
mod drain;
mod explain;
mod model;
mod node;
mod plan;
mod profile;
mod replay;
mod role;
mod signals;
mod status;
mod up;
mod validate;
mod workload;

pub use command_line::Baton;
