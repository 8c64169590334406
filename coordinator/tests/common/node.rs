//! A node that computes nothing: a gRPC server, registered like a real one, that follows a script. It has a runtime of its
//! own, so that killing it closes its sockets as the death of a process does.

use super::Fabric;
use baton_cluster_state::{NodeRecord, Store, StoreOptions};
use baton_node_runtime::{Clock, Supervisor};
use baton_proto::convert::ticket_bytes;
use baton_proto::v1::{self, node_server::Node, node_server::NodeServer};
use baton_text::{EngineFacts, ModelCard};
use baton_types::{Instance, KvDtype, KvGeometry, ModelFingerprint, NodeId, NodeRole, NodeState, NumericsId};
use futures::stream::{BoxStream, StreamExt};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use baton_types::Work;

/// What a node does with the next requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Script {
    /// As it should.
    Serve,
    /// It hands over, or goes on, only so far: this many tokens of its own, then silence until it is told to fail.
    Stall(usize),
    /// It gives up after so many tokens of its own, with a failure that it says is retryable.
    Fail(usize),
    /// It blames its peer, before anything.
    Blame,
    /// It has no place.
    Full,
    /// Every event twice, each batch with the token before it once more.
    Stutter,
}

#[derive(Default)]
pub struct Counts {
    pub opened: AtomicU32,
    /// Streams that ended before their work was done.
    pub cancelled: AtomicU32,
    pub superseded: AtomicU32,
    /// Ends the silence of decodes that stall.
    fail: Notify,
}

pub struct FakeNode {
    runtime: Option<Runtime>,
    script: Arc<Mutex<Script>>,
    load: Arc<Mutex<v1::NodeLoad>>,
    pub counts: Arc<Counts>,
    pub works: Arc<Mutex<Vec<Work>>>,
}

struct Server {
    record: NodeRecord,
    card: Vec<u8>,
    script: Arc<Mutex<Script>>,
    load: Arc<Mutex<v1::NodeLoad>>,
    counts: Arc<Counts>,
    works: Arc<Mutex<Vec<Work>>>,
    fabric: Fabric,
}

fn card() -> ModelCard {
    let engine = EngineFacts {
        fingerprint: ModelFingerprint([3; 32]),
        numerics: NumericsId("fake".into()),
        block_tokens: 16,
        kv_dtype: KvDtype::F16,
    };
    ModelCard::stub("fake", 512, engine)
}

fn record(name: &str, role: NodeRole, address: String) -> NodeRecord {
    let card = card();
    NodeRecord {
        node_id: NodeId::new(name),
        instance: Instance::random(),
        role,
        state: NodeState::Ready,
        grpc_address: address,
        transfer: vec!["memory://x".into()],
        model: card.name.clone(),
        card_digest: card.digest(),
        fingerprint: card.fingerprint,
        numerics: card.numerics,
        geometry: KvGeometry {
            layers: 1,
            kv_heads: 1,
            head_dim: 8,
            block_tokens: 16,
            dtype: KvDtype::F16,
        },
        host_id: "test".into(),
        build: "test".into(),
        stub: true,
        blocks: 1000,
        queue_capacity: 8,
        context_tokens: 512,
    }
}

impl FakeNode {
    pub fn start(
        name: &str,
        role: NodeRole,
        store: &str,
        fabric: Fabric,
        change: impl FnOnce(&mut NodeRecord) + Send + 'static,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (script, counts) = (Arc::new(Mutex::new(Script::Serve)), Arc::<Counts>::default());
        let works = Arc::<Mutex<Vec<Work>>>::default();
        let blocks = Some(v1::BlockCounts {
            total: 1000,
            free: 1000,
            ..Default::default()
        });
        let load = Arc::new(Mutex::new(v1::NodeLoad {
            blocks,
            queue_capacity: 8,
            ..Default::default()
        }));
        let mut node = Self {
            runtime: None,
            script: Arc::clone(&script),
            load: Arc::clone(&load),
            counts: Arc::clone(&counts),
            works: Arc::clone(&works),
        };
        let (name, address) = (name.to_owned(), store.parse().unwrap());
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut record = record(&name, role, listener.local_addr().unwrap().to_string());
            change(&mut record);
            let store = Store::connect(StoreOptions::new(address), Clock::new(), Supervisor::new())
                .await
                .unwrap();
            let card = card().to_bytes();
            let server = Server {
                record: record.clone(),
                card,
                script,
                load,
                counts,
                works,
                fabric,
            };
            let _registration = store.register(record).await.unwrap();
            let serving = tonic::transport::Server::builder().add_service(NodeServer::new(server));
            serving
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .unwrap();
        });
        node.runtime = Some(runtime);
        node
    }

    pub fn script(&self, script: Script) {
        *self.script.lock().unwrap() = script;
    }

    pub fn load(&self, change: impl FnOnce(&mut v1::NodeLoad)) {
        change(&mut self.load.lock().unwrap());
    }

    /// Decodes that stall now, or the next one that does, fail.
    pub fn fail(&self) {
        self.counts.fail.notify_one();
    }

    /// As kill -9 does it.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    pub fn opened(&self) -> u32 {
        self.counts.opened.load(Ordering::SeqCst)
    }

    pub fn cancelled(&self) -> u32 {
        self.counts.cancelled.load(Ordering::SeqCst)
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Counts a stream whose client goes away before the work is done.
struct Watch {
    counts: Arc<Counts>,
    done: bool,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.done {
            self.counts.cancelled.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn token(index: usize) -> u32 {
    u32::from(b'a') + (index % 26) as u32
}

fn failed(peer_at_fault: bool) -> v1::WorkFailed {
    let code = tonic::Code::Unavailable as u32;
    v1::WorkFailed {
        code,
        message: "as the test wants it".into(),
        retryable: true,
        peer_at_fault,
    }
}

type Events<T> = BoxStream<'static, Result<T, Status>>;

/// Sends events from a task that ends, and counts as cancelled, when the client goes away.
fn serve<E: Send + 'static, F>(
    counts: &Arc<Counts>,
    work: impl FnOnce(mpsc::Sender<Result<E, Status>>) -> F,
) -> Events<E>
where
    F: Future<Output = ()> + Send + 'static,
{
    let (events, receiver) = mpsc::channel(4);
    let watch = Watch {
        counts: Arc::clone(counts),
        done: false,
    };
    let gone = events.clone();
    let work = work(events);
    tokio::spawn(async move {
        let mut watch = watch;
        tokio::select! {
            () = gone.closed() => {}
            () = work => watch.done = true,
        }
    });
    ReceiverStream::new(receiver).boxed()
}

fn prefill_event(event: v1::prefill_event::Event) -> Result<v1::PrefillEvent, Status> {
    Ok(v1::PrefillEvent { event: Some(event) })
}

fn decode_event(event: v1::decode_event::Event) -> Result<v1::DecodeEvent, Status> {
    Ok(v1::DecodeEvent { event: Some(event) })
}

impl Server {
    fn open(&self, work: Option<v1::Work>, instance: &str) -> Result<(Script, Work), Status> {
        if instance != self.record.instance.to_string() {
            return Err(Status::failed_precondition("another process"));
        }
        let work = Work::try_from(work.unwrap_or_default())?;
        let script = *self.script.lock().unwrap();
        self.works.lock().unwrap().push(work.clone());
        // Last: who sees it may change the script.
        self.counts.opened.fetch_add(1, Ordering::SeqCst);
        if script == Script::Full {
            Err(Status::resource_exhausted("no place"))
        } else {
            Ok((script, work))
        }
    }
}

#[tonic::async_trait]
impl Node for Server {
    type PrefillStream = Events<v1::PrefillEvent>;
    type DecodeStream = Events<v1::DecodeEvent>;
    type ModelCardStream = Events<v1::ModelCardChunk>;
    type HeartbeatStream = Events<v1::HeartbeatResponse>;

    async fn prefill(&self, request: Request<v1::PrefillRequest>) -> Result<Response<Self::PrefillStream>, Status> {
        use v1::prefill_event::Event;
        let request = request.into_inner();
        let (script, work) = self.open(request.work, &request.instance)?;
        let fabric = Arc::clone(&self.fabric);
        Ok(Response::new(serve(&self.counts, |events| async move {
            let say = |event| events.send(prefill_event(event));
            if script == Script::Blame || script == Script::Fail(0) {
                let _ = say(Event::Failed(failed(script == Script::Blame))).await;
                return;
            }
            if script == Script::Stall(0) {
                std::future::pending::<()>().await;
            }
            let _ = say(Event::Started(v1::PrefillStarted {
                queue_us: 5,
                cached_tokens: 0,
            }))
            .await;
            let index = work.generated.len();
            let last = index as u32 + 1 == work.sampling.max_tokens;
            let first = v1::FirstToken {
                index: index as u32,
                token: token(index),
                logprobs: work.sampling.logprobs.map(|_| v1::TokenLogprobs::default()),
                finish_reason: if last { v1::FinishReason::Length.into() } else { 0 },
                prefill_us: 7,
                prefill_tokens: work.prompt.len() as u32,
            };
            let _ = say(Event::FirstToken(first)).await;
            match script {
                Script::Fail(_) => {
                    let _ = say(Event::Failed(failed(false))).await;
                }
                Script::Stall(_) => std::future::pending().await,
                Script::Serve | Script::Blame | Script::Full | Script::Stutter if !last => {
                    let peer = fabric.lock().unwrap().get(&ticket_bytes(work.ticket).to_vec()).cloned();
                    if let Some(peer) = peer {
                        let _ = peer.send(work.attempt.0);
                    }
                    let over = v1::HandedOver {
                        path: "memory".into(),
                        bytes: 99,
                        exposed_us: 3,
                        reserve_us: 2,
                        ..v1::HandedOver::default()
                    };
                    let _ = say(Event::HandedOver(over)).await;
                }
                Script::Serve | Script::Blame | Script::Full | Script::Stutter => {}
            }
        })))
    }

    async fn decode(
        &self,
        request: Request<Streaming<v1::DecodeCommand>>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        use v1::decode_command::Command;
        use v1::decode_event::Event;
        let mut commands = request.into_inner();
        let first = commands.message().await?.and_then(|first| first.command);
        let Some(Command::Open(open)) = first else {
            return Err(Status::invalid_argument("open comes first"));
        };
        let (script, work) = self.open(open.work, &open.instance)?;
        let (fabric, record, counts) = (Arc::clone(&self.fabric), self.record.clone(), Arc::clone(&self.counts));
        Ok(Response::new(serve(&self.counts, |events| async move {
            let say = |event| events.send(decode_event(event));
            let ticket = ticket_bytes(work.ticket);
            let (arrived, mut arrivals) = mpsc::unbounded_channel();
            fabric.lock().unwrap().insert(ticket.to_vec(), arrived);
            let peer = v1::TransferPeer {
                node_id: record.node_id.to_string(),
                instance: record.instance.to_string(),
                addresses: record.transfer.clone(),
            };
            let _ = say(Event::Accepted(v1::Accepted {
                ticket,
                held_blocks: 0,
                peer: Some(peer),
            }))
            .await;
            let (mut wanted, mut next) = (work.attempt.0, work.generated.len());
            let max = work.sampling.max_tokens as usize;
            if !open.local_prefill {
                loop {
                    tokio::select! {
                        // As in kv-transfer, a later attempt supersedes by itself: the writer may be faster than the word.
                        Some(arrived) = arrivals.recv() => if arrived >= wanted {
                            counts.superseded.fetch_add(arrived - wanted, Ordering::SeqCst);
                            wanted = arrived;
                            break;
                        },
                        command = commands.message() => match command {
                            Ok(Some(v1::DecodeCommand { command: Some(Command::Supersede(to)) })) => {
                                counts.superseded.fetch_add(to.attempt - wanted, Ordering::SeqCst);
                                wanted = to.attempt;
                            }
                            // The client goes away: the end of this stream counts as a cancellation.
                                _ => std::future::pending().await,
                        },
                    }
                }
                let committed = v1::Committed {
                    attempt: wanted,
                    index: next as u32,
                    token: token(next),
                    handover_bytes: 99,
                    held_tokens: 0,
                };
                let _ = say(Event::Committed(committed)).await;
                next += 1;
            }
            let mine = next;
            while next < max {
                match script {
                    Script::Stall(tokens) | Script::Fail(tokens) if next - mine == tokens => {
                        if let Script::Stall(_) = script {
                            counts.fail.notified().await;
                        }
                        let _ = say(Event::Failed(failed(false))).await;
                        return;
                    }
                    _ => {}
                }
                let from = if script == Script::Stutter {
                    next.saturating_sub(1).max(mine)
                } else {
                    next
                };
                let tokens: Vec<u32> = (from..=next).map(token).collect();
                let count = tokens.len();
                let local = (open.local_prefill && next == mine).then_some(1);
                let batch = v1::Tokens {
                    first_index: from as u32,
                    tokens,
                    logprobs: if work.sampling.logprobs.is_some() {
                        vec![Default::default(); count]
                    } else {
                        Vec::new()
                    },
                    queue_us: local,
                    prefill_us: local,
                    prefill_tokens: local.map(|_| work.prompt.len() as u32),
                    cached_tokens: local.map(|_| 0),
                };
                if script == Script::Stutter {
                    let _ = say(Event::Tokens(batch.clone())).await;
                }
                let _ = say(Event::Tokens(batch)).await;
                next += 1;
            }
            let finish_reason = v1::FinishReason::Length.into();
            let decoded_tokens = (next - mine) as u32;
            let _ = say(Event::Finished(v1::DecodeFinished {
                finish_reason,
                decoded_tokens,
                decode_us: 100,
            }))
            .await;
        })))
    }

    async fn model_card(&self, _: Request<v1::ModelCardRequest>) -> Result<Response<Self::ModelCardStream>, Status> {
        let half = self.card.len() / 2;
        let pieces = [self.card[..half].to_vec(), self.card[half..].to_vec()];
        let pieces = pieces.map(|data| Ok(v1::ModelCardChunk { data: data.into() }));
        Ok(Response::new(futures::stream::iter(pieces).boxed()))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<Self::HeartbeatStream>, Status> {
        let interval = Duration::from_millis(u64::from(request.into_inner().interval_ms));
        let (record, load) = (self.record.clone(), Arc::clone(&self.load));
        let beats = futures::stream::unfold(Duration::ZERO, move |wait| {
            let (record, load) = (record.clone(), Arc::clone(&load));
            async move {
                tokio::time::sleep(wait).await;
                let beat = v1::HeartbeatResponse {
                    node_id: record.node_id.to_string(),
                    instance: record.instance.to_string(),
                    role: v1::NodeRole::from(record.role).into(),
                    state: record.state.to_string(),
                    load: Some(load.lock().unwrap().clone()),
                };
                Some((Ok(beat), interval))
            }
        });
        Ok(Response::new(beats.boxed()))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        self.script.lock().unwrap().clone_from(&Script::Full);
        Ok(Response::new(v1::DrainResponse {}))
    }

    async fn set_role(&self, _: Request<v1::SetRoleRequest>) -> Result<Response<v1::SetRoleResponse>, Status> {
        Err(Status::failed_precondition("role: a fake has one"))
    }
}
