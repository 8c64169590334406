//! The door of the role: each stream gets a task.

use crate::request::DecodeRequest;
use baton_node_host::{EventStream, Host, Role};
use baton_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Events that may wait for a slow coordinator before tokens wait in the request's own channel.
const EVENTS: usize = 8;

/// The role.
pub struct DecodeRole {
    host: Host,
}

impl DecodeRole {
    /// On this node.
    pub fn new(host: Host) -> Self {
        Self { host }
    }
}

impl Role for DecodeRole {
    fn prefill(&self, _request: v1::PrefillRequest) -> Result<EventStream<v1::PrefillEvent>, Status> {
        let node = &self.host.identity().node_id;
        Err(Status::failed_precondition(format!(
            "{node} is a decode node: it does not prefill for others"
        )))
    }

    fn decode(&self, commands: EventStream<v1::DecodeCommand>) -> Result<EventStream<v1::DecodeEvent>, Status> {
        let (out, stream) = mpsc::channel(EVENTS);
        let (host, guard) = (self.host.clone(), self.host.enter());
        self.host.supervisor().spawn("decode-request", async move {
            let _guard = guard;
            DecodeRequest::run(host, commands, out).await;
        });
        Ok(Box::pin(ReceiverStream::new(stream)))
    }
}
