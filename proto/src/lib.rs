//! The wire forms of Baton's gRPC services, generated from `proto/` and checked in, and their conversion to and from
//! `baton-types`. Generated types stop at the service edge: everything behind it speaks `baton-types`.

pub mod convert;

/// Package `baton.v1`.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    include!("generated/baton.v1.rs");
}

/// All `.proto` files of this crate as an encoded `FileDescriptorSet`, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!("generated/descriptors.binpb");
