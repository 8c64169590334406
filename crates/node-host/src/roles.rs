//! What a node does for requests, and which of it the program can do.

use baton_proto::v1;
use baton_types::NodeRole;
use futures::Stream;
use std::pin::Pin;
use std::sync::Arc;
use tonic::Status;

/// A stream of messages of one request. Dropping it cancels the request.
pub type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What a node does for requests.
pub trait Role: Send + Sync + 'static {
    /// One attempt at prefilling a request and handing it over.
    ///
    /// # Errors
    /// Where the request is not taken.
    fn prefill(&self, request: v1::PrefillRequest) -> Result<EventStream<v1::PrefillEvent>, Status>;

    /// One request's stay on a decode node. Refusals come in the stream.
    ///
    /// # Errors
    /// Where the node does not decode at all.
    fn decode(&self, commands: EventStream<v1::DecodeCommand>) -> Result<EventStream<v1::DecodeEvent>, Status>;
}

/// The roles of a program. They share the host: its weights, its blocks, its engine.
#[derive(Clone)]
pub enum Roles {
    /// One, whatever it is.
    One(Arc<dyn Role>),
    /// Either, so that the node can change from one to the other.
    Both {
        /// What it does as a prefill node.
        prefill: Arc<dyn Role>,
        /// What it does as a decode node.
        decode: Arc<dyn Role>,
    },
}

impl From<Arc<dyn Role>> for Roles {
    fn from(role: Arc<dyn Role>) -> Self {
        Self::One(role)
    }
}

impl Roles {
    pub(crate) fn of(&self, role: NodeRole) -> &dyn Role {
        match (self, role) {
            (Self::One(only), _) => &**only,
            (Self::Both { prefill, .. }, NodeRole::Prefill) => &**prefill,
            (Self::Both { decode, .. }, NodeRole::Decode) => &**decode,
        }
    }

    pub(crate) fn can_change(&self) -> bool {
        match self {
            Self::One(_) => false,
            Self::Both { .. } => true,
        }
    }
}
