//! The door of the role: checks a request, gives it a place in the queue and a task.

use crate::handover::layer_borders;
use crate::request::PrefillRequest;
use baton_kv_transfer::Peer;
use baton_node_host::engine::{Beginning, Control, SequenceSpec, Until};
use baton_node_host::{CancelOnDrop, Compiling, EventStream, Host, Outcome, Role, work};
use baton_proto::{convert, v1};
use baton_types::{NodeId, NodeRole, Work};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Events of one request that may wait for a slow coordinator: all of them.
const EVENTS: usize = 8;
/// Progress that may wait for the request's task; more is left out.
const PROGRESS: usize = 64;

/// The role.
pub struct PrefillRole {
    host: Host,
    /// Where the layers of a last chunk are cut to be sent.
    layer_borders: Arc<[u32]>,
}

impl PrefillRole {
    /// On this node.
    pub fn new(host: Host) -> Self {
        let layer_borders = layer_borders(&host.model().geometry);
        Self { host, layer_borders }
    }

    fn start(&self, request: v1::PrefillRequest) -> Result<EventStream<v1::PrefillEvent>, Status> {
        let wire = request.work.ok_or(convert::ConvertError::Missing { field: "work" })?;
        let work = Work::try_from(wire)?;
        let peer = peer(
            request
                .decode
                .ok_or(convert::ConvertError::Missing { field: "decode" })?,
        )?;
        work::check(&self.host, &work, &request.instance)?;
        let deadline = self.host.clock().now() + work.budget.0;
        let control = Control::new(false);
        let (progress, events) = mpsc::channel(PROGRESS);
        let sequence = SequenceSpec {
            request_id: work.request_id,
            prompt: work.prompt.clone(),
            generated: work.generated.clone(),
            sampling: work.sampling.clone(),
            constraint: None,
            hashes: work.block_hashes.clone(),
            chain: None,
            deadline,
            beginning: Beginning::Compute,
            until: Until::FirstToken,
            layer_borders: self.layer_borders.clone(),
            control: control.clone(),
            events: progress,
        };
        let guard = self.host.enter();
        let compiling = Compiling::start(&self.host, &work);
        // What must be compiled is brought to the queue by its task.
        let mut later = None;
        if compiling.is_none() {
            submit(&self.host, sequence)?;
        } else {
            later = Some(sequence);
        }
        let cancel = CancelOnDrop::new(control.clone(), self.host.engine().clone());
        let (out, stream) = mpsc::channel(EVENTS);
        let task = PrefillRequest {
            host: self.host.clone(),
            work,
            peer,
            deadline,
            control,
            events,
            out,
        };
        self.host.supervisor().spawn("prefill-request", async move {
            // Dropped last to first: the sequence ends before the request is no longer counted.
            let _guard = guard;
            let _cancel = cancel;
            if let Some(sequence) = later
                && let Err(status) = submit_compiled(&task, sequence, compiling).await
            {
                refused(&status);
                // A full channel is one that nobody reads.
                let _ = task.out.try_send(Err(status));
                return;
            }
            task.run().await;
        });
        Ok(Box::pin(ReceiverStream::new(stream)))
    }
}

fn submit(host: &Host, sequence: SequenceSpec) -> Result<(), Status> {
    host.engine()
        .submit(sequence)
        .map_err(|error| work::submit_status(&error))
}

/// Brings a sequence to the queue once its grammar is compiled.
async fn submit_compiled(
    task: &PrefillRequest,
    mut sequence: SequenceSpec,
    compiling: Compiling,
) -> Result<(), Status> {
    sequence.constraint = tokio::select! {
        () = task.out.closed() => return Err(Status::cancelled("nobody wants the request any more")),
        constraint = compiling.constraint(&task.host, Vec::new()) => constraint?,
    };
    submit(&task.host, sequence)
}

fn refused(status: &Status) {
    Outcome::Refused.count(NodeRole::Prefill);
    tracing::debug!(code = ?status.code(), error = status.message(), "request refused");
}

fn peer(wire: v1::TransferPeer) -> Result<Peer, Status> {
    Ok(Peer {
        node: NodeId::new(wire.node_id),
        instance: convert::parse_id("decode.instance", &wire.instance)?,
        addresses: wire.addresses,
    })
}

impl Role for PrefillRole {
    fn prefill(&self, request: v1::PrefillRequest) -> Result<EventStream<v1::PrefillEvent>, Status> {
        let started = self.start(request);
        if let Err(status) = &started {
            refused(status);
        }
        started
    }

    fn decode(&self, _commands: EventStream<v1::DecodeCommand>) -> Result<EventStream<v1::DecodeEvent>, Status> {
        let node = &self.host.identity().node_id;
        Err(Status::failed_precondition(format!(
            "{node} is a prefill node: it does not decode"
        )))
    }
}
