//! A decode node without an engine: it accepts every request and sends one token each gap, stamping when.

use anyhow::Result;
use baton_cluster_state::{NodeRecord, Registration, Store, StoreAddress, StoreOptions};
use baton_node_runtime::{Clock, Supervisor};
use baton_proto::v1::node_server::{Node, NodeServer};
use baton_proto::v1::{self, decode_command::Command, decode_event::Event};
use baton_text::{EngineFacts, ModelCard};
use baton_types::{Instance, KvDtype, KvGeometry, ModelFingerprint, NodeId, NodeRole, NodeState, NumericsId};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

const BLOCKS: u32 = 1 << 20;

/// When each token of each request was sent: `(the stream's name, token's index, moment)`.
pub type Stamps = Arc<Mutex<Vec<(u32, u32, Instant)>>>;

/// When tokens are sent.
#[derive(Clone, Copy)]
pub struct Pace {
    /// Between two tokens of a stream.
    pub gap: Duration,
    /// All streams at the same moments, as a batch gives them, instead of spread over the gap.
    pub aligned: bool,
    /// Tokens that are sent together.
    pub frame: u32,
}

/// The running node.
pub struct EchoNode {
    pub address: String,
    pub instance: Instance,
    pub fingerprint: ModelFingerprint,
    pub stamps: Stamps,
    _registration: Registration,
}

struct Service {
    pace: Pace,
    instance: Instance,
    card: Vec<u8>,
    stamps: Stamps,
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl EchoNode {
    /// Serves on a free port and registers as a ready decode node.
    pub async fn start(store: &str, pace: Pace) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let (instance, fingerprint) = (Instance::random(), ModelFingerprint([1; 32]));
        let numerics = NumericsId("echo".into());
        let facts = EngineFacts {
            fingerprint,
            numerics: numerics.clone(),
            block_tokens: 16,
            kv_dtype: KvDtype::F16,
        };
        let card = ModelCard::stub("echo", 1 << 20, facts);
        let record = NodeRecord {
            node_id: NodeId::new("echo"),
            instance,
            role: NodeRole::Decode,
            state: NodeState::Ready,
            grpc_address: address.clone(),
            transfer: Vec::new(),
            model: "echo".into(),
            card_digest: card.digest(),
            fingerprint,
            numerics,
            geometry: KvGeometry {
                layers: 1,
                kv_heads: 1,
                head_dim: 64,
                block_tokens: 16,
                dtype: KvDtype::F16,
            },
            host_id: "bench".into(),
            build: env!("CARGO_PKG_VERSION").into(),
            stub: true,
            blocks: BLOCKS,
            queue_capacity: 1 << 16,
            context_tokens: 1 << 20,
        };
        let stamps = Stamps::default();
        let service = Service {
            pace,
            instance,
            card: card.to_bytes(),
            stamps: stamps.clone(),
        };
        let server = tonic::transport::Server::builder().add_service(NodeServer::new(service));
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        tokio::spawn(server.serve_with_incoming(incoming));
        let options = StoreOptions::new(store.parse::<StoreAddress>()?);
        let store = Store::connect(options, Clock::new(), Supervisor::new()).await?;
        let registration = store.register(record).await?;
        Ok(Self {
            address,
            instance,
            fingerprint,
            stamps,
            _registration: registration,
        })
    }
}

/// A prompt that names its stream, in tokens that the model has.
pub fn prompt_of(name: u32) -> Vec<u32> {
    [[name % 250, name / 250].as_slice(), &[7; 14]].concat()
}

fn name_of(prompt: &[u32]) -> Option<u32> {
    Some(prompt.first()? + 250 * prompt.get(1)?)
}

async fn stream_tokens(
    open: v1::DecodeOpen,
    pace: Pace,
    stamps: Stamps,
    events: mpsc::Sender<Result<v1::DecodeEvent, Status>>,
) -> Option<()> {
    let work = open.work?;
    let name = name_of(&work.prompt)?;
    let total = work.sampling?.max_tokens?;
    let event = |event| Ok(v1::DecodeEvent { event: Some(event) });
    let peer = v1::TransferPeer {
        node_id: "echo".into(),
        instance: open.instance,
        addresses: Vec::new(),
    };
    let accepted = v1::Accepted {
        ticket: work.ticket,
        held_blocks: 0,
        peer: Some(peer),
    };
    events.send(event(Event::Accepted(accepted))).await.ok()?;
    // Names are small numbers: the golden ratio spreads them evenly over one gap.
    let share = if pace.aligned {
        0.0
    } else {
        (f64::from(name) * 0.618_034).fract()
    };
    let start = tokio::time::Instant::now() + pace.gap.mul_f64(share);
    for (frame, index) in (0..total).step_by(pace.frame as usize).enumerate() {
        if !pace.gap.is_zero() {
            tokio::time::sleep_until(start + pace.gap * (frame as u32 + 1)).await;
        }
        let end = (index + pace.frame).min(total);
        let mut tokens = v1::Tokens {
            first_index: index,
            tokens: (index..end).map(|index| 97 + index % 26).collect(),
            ..v1::Tokens::default()
        };
        if index == 0 {
            (tokens.queue_us, tokens.prefill_us) = (Some(0), Some(0));
            (tokens.prefill_tokens, tokens.cached_tokens) = (Some(1), Some(0));
        }
        stamps.lock().ok()?.push((name, index, Instant::now()));
        events.send(event(Event::Tokens(tokens))).await.ok()?;
    }
    let finish_reason = v1::FinishReason::Length.into();
    let finished = v1::DecodeFinished {
        finish_reason,
        decoded_tokens: total,
        decode_us: 0,
    };
    events.send(event(Event::Finished(finished))).await.ok()
}

#[tonic::async_trait]
impl Node for Service {
    type PrefillStream = Replies<v1::PrefillEvent>;
    type DecodeStream = Replies<v1::DecodeEvent>;
    type ModelCardStream = Replies<v1::ModelCardChunk>;
    type HeartbeatStream = Replies<v1::HeartbeatResponse>;

    async fn prefill(&self, _: Request<v1::PrefillRequest>) -> Result<Response<Self::PrefillStream>, Status> {
        Err(Status::failed_precondition("the echo node does not prefill"))
    }

    async fn decode(
        &self,
        request: Request<Streaming<v1::DecodeCommand>>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let mut commands = request.into_inner();
        let (pace, stamps) = (self.pace, self.stamps.clone());
        let (events, replies) = mpsc::channel(64);
        tokio::spawn(async move {
            if let Some(Ok(v1::DecodeCommand {
                command: Some(Command::Open(open)),
            })) = commands.next().await
            {
                stream_tokens(open, pace, stamps, events).await;
            }
            // The coordinator's side stays open until it has read the end.
            while let Some(Ok(_)) = commands.next().await {}
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    async fn model_card(&self, _: Request<v1::ModelCardRequest>) -> Result<Response<Self::ModelCardStream>, Status> {
        let pieces: Vec<_> = self
            .card
            .chunks(1 << 20)
            .map(|piece| {
                Ok(v1::ModelCardChunk {
                    data: piece.to_vec().into(),
                })
            })
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(pieces))))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<Self::HeartbeatStream>, Status> {
        let blocks = v1::BlockCounts {
            total: BLOCKS,
            free: BLOCKS,
            ..v1::BlockCounts::default()
        };
        let beat = v1::HeartbeatResponse {
            node_id: "echo".into(),
            instance: self.instance.to_string(),
            role: v1::NodeRole::Decode.into(),
            state: "ready".into(),
            load: Some(v1::NodeLoad {
                blocks: Some(blocks),
                queue_capacity: 1 << 16,
                ..v1::NodeLoad::default()
            }),
        };
        let every = Duration::from_millis(u64::from(request.into_inner().interval_ms.max(50)));
        let ticks = tokio_stream::wrappers::IntervalStream::new(tokio::time::interval(every));
        Ok(Response::new(Box::pin(ticks.map(move |_| Ok(beat.clone())))))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        Ok(Response::new(v1::DrainResponse {}))
    }

    async fn set_role(&self, _: Request<v1::SetRoleRequest>) -> Result<Response<v1::SetRoleResponse>, Status> {
        Err(Status::failed_precondition("role: an echo node has one"))
    }
}
