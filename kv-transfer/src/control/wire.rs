//! The form of control messages: prost messages, never renumbered.

use prost::{Enumeration, Message, Oneof};

/// What each side says of itself first.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Hello {
    #[prost(string, tag = "1")]
    pub node: String,
    #[prost(fixed64, tag = "2")]
    pub instance: u64,
    /// The instance that the dialling side wants to talk to; 0 from the other side.
    #[prost(fixed64, tag = "3")]
    pub expected_instance: u64,
    #[prost(bytes = "vec", tag = "4")]
    pub fingerprint: Vec<u8>,
    #[prost(message, optional, tag = "5")]
    pub geometry: Option<Geometry>,
    #[prost(string, tag = "6")]
    pub numerics: String,
    #[prost(string, tag = "7")]
    pub build: String,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Geometry {
    #[prost(uint32, tag = "1")]
    pub layers: u32,
    #[prost(uint32, tag = "2")]
    pub kv_heads: u32,
    #[prost(uint32, tag = "3")]
    pub head_dim: u32,
    #[prost(uint32, tag = "4")]
    pub block_tokens: u32,
    #[prost(enumeration = "Dtype", tag = "5")]
    pub dtype: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Enumeration)]
pub(super) enum Dtype {
    Unspecified = 0,
    // 1 to 3 were the first three where a lane of keys was `[token][head_dim]`: such a peer is refused.
    F16 = 4,
    Bf16 = 5,
    F32 = 6,
    Q8 = 7,
}

/// One message. `from` and `to` are process instances.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Envelope {
    #[prost(fixed64, tag = "1")]
    pub from: u64,
    #[prost(fixed64, tag = "2")]
    pub to: u64,
    /// 16 bytes; empty in `keep_alive`.
    #[prost(bytes = "vec", tag = "3")]
    pub ticket: Vec<u8>,
    #[prost(uint32, tag = "4")]
    pub attempt: u32,
    /// 0 where there is no grant yet.
    #[prost(uint64, tag = "5")]
    pub epoch: u64,
    #[prost(oneof = "Body", tags = "6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16")]
    pub body: Option<Body>,
}

#[derive(Clone, PartialEq, Oneof)]
pub(super) enum Body {
    #[prost(message, tag = "6")]
    KeepAlive(KeepAlive),
    #[prost(message, tag = "7")]
    Reserve(Reserve),
    #[prost(message, tag = "8")]
    Renew(Renew),
    #[prost(message, tag = "9")]
    Complete(Complete),
    #[prost(message, tag = "10")]
    Abort(Abort),
    #[prost(message, tag = "11")]
    Fenced(Fenced),
    #[prost(message, tag = "12")]
    Grant(Grant),
    #[prost(message, tag = "13")]
    Refused(Refused),
    #[prost(message, tag = "14")]
    Committed(Committed),
    #[prost(message, tag = "15")]
    Fence(Fence),
    #[prost(message, tag = "16")]
    PathBroken(PathBroken),
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct KeepAlive {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Reserve {
    #[prost(uint64, tag = "1")]
    pub context_tokens: u64,
    /// A kind of path, by name.
    #[prost(string, tag = "2")]
    pub path: String,
    #[prost(uint64, tag = "3")]
    pub budget_us: u64,
    #[prost(bool, tag = "4")]
    pub digest: bool,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Renew {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Complete {
    #[prost(uint32, tag = "1")]
    pub first: u32,
    #[prost(uint32, tag = "2")]
    pub end: u32,
    #[prost(bytes = "bytes", tag = "3")]
    pub payload: prost::bytes::Bytes,
    /// See `session::digest`.
    #[prost(fixed64, optional, tag = "4")]
    pub digest: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Abort {
    #[prost(message, optional, tag = "1")]
    pub failure: Option<Failure>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Fenced {
    #[prost(uint32, tag = "1")]
    pub connections: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Grant {
    #[prost(uint32, tag = "1")]
    pub held: u32,
    #[prost(uint32, tag = "2")]
    pub first: u32,
    #[prost(uint32, tag = "3")]
    pub end: u32,
    /// Block ids in the receiver's arena, of `first..end`.
    #[prost(uint32, repeated, tag = "4")]
    pub destinations: Vec<u32>,
    #[prost(uint64, tag = "5")]
    pub lease_us: u64,
    /// The first ordinal that a digest covers.
    #[prost(uint32, tag = "6")]
    pub digest_from: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PathBroken {
    #[prost(message, optional, tag = "1")]
    pub failure: Option<Failure>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Refused {
    #[prost(message, optional, tag = "1")]
    pub failure: Option<Failure>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Committed {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Fence {
    #[prost(message, optional, tag = "1")]
    pub failure: Option<Failure>,
}

/// Why an attempt is over.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Failure {
    #[prost(enumeration = "Code", tag = "1")]
    pub code: i32,
    /// For people.
    #[prost(string, tag = "2")]
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Enumeration)]
pub(super) enum Code {
    Unspecified = 0,
    Aborted = 1,
    NoRoom = 2,
    Fenced = 3,
    AlreadyCommitted = 4,
    UnknownTicket = 5,
    PeerGone = 6,
    PathFailed = 7,
    LeaseExpired = 8,
    Deadline = 9,
    Corrupt = 10,
    Protocol = 11,
    ShuttingDown = 12,
}
