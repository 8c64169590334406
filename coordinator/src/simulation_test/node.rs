//! A node as the coordinator meets it: the real service definition, the real block pool, compute that only takes time, and
//! tokens that depend on every token before them, so that a wrong context cannot go unseen.

use super::handover::{Arrivals, Arrived, Destination, Last};
use super::network::Reachable;
use super::{BLOCK_TOKENS, Planted, Sim, card, draw, store};
use baton_cluster_state::NodeRecord;
use baton_engine::{BlockPool, BlockTable};
use baton_node_runtime::CancellationToken;
use baton_proto::convert::{parse_id, parse_ticket, ticket_bytes};
use baton_proto::v1::node_server::{Node, NodeServer};
use baton_proto::v1::{self, decode_command::Command, decode_event, prefill_event};
use baton_types::{Attempt, BlockHash, BlockId, Instance, KvDtype, KvGeometry, NodeId, NodeRole, NodeState, Work};
use futures::stream::{BoxStream, StreamExt};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};

const BLOCKS: u32 = 48;
const QUEUE: usize = 8;
/// How long a decode node waits for a hand-over.
const PATIENCE: Duration = Duration::from_secs(5);
const ROOM_WAIT: Duration = Duration::from_millis(20);
const ROOM_TRIES: usize = 100;

/// One life of a node.
pub(super) struct Process {
    pub(super) sim: Arc<Sim>,
    pub(super) at: usize,
    pub(super) instance: Instance,
    pub(super) life: CancellationToken,
    pub(super) pool: Arc<BlockPool>,
    /// What each block holds: the tokens whose KV it is.
    pub(super) contents: Mutex<BTreeMap<BlockId, Vec<u32>>>,
    pub(super) arrivals: Mutex<Arrivals>,
    /// What the store was told of its blocks.
    pub(super) told: Mutex<BTreeSet<BlockHash>>,
    role: NodeRole,
    /// One prompt at a time.
    compute: Semaphore,
    draining: AtomicBool,
    queued: AtomicUsize,
    open: AtomicUsize,
}

/// Counts while it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn work_failed(code: Code, message: &str, peer_at_fault: bool) -> v1::WorkFailed {
    v1::WorkFailed {
        code: code as u32,
        message: message.to_owned(),
        retryable: true,
        peer_at_fault,
    }
}

fn no_room() -> v1::WorkFailed {
    work_failed(Code::ResourceExhausted, "no room", false)
}

fn count(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

type Answer<T> = Result<Response<BoxStream<'static, Result<T, Status>>>, Status>;
type Decoding = mpsc::Sender<Result<v1::DecodeEvent, Status>>;

async fn say(to: &Decoding, event: decode_event::Event) {
    let _ = to.send(Ok(v1::DecodeEvent { event: Some(event) })).await;
}

/// A sequence on its way.
struct Sequence {
    work: Work,
    context: Vec<u32>,
    table: BlockTable,
}

impl Process {
    /// Starts a life; it ends with its token.
    pub(super) fn start(sim: &Arc<Sim>, at: usize) {
        let instance = Instance(sim.number());
        let process = Arc::new(Self {
            sim: Arc::clone(sim),
            at,
            instance,
            life: CancellationToken::new(),
            pool: BlockPool::new(BLOCKS),
            contents: Mutex::default(),
            arrivals: Mutex::default(),
            told: Mutex::default(),
            role: if at <= 3 { NodeRole::Prefill } else { NodeRole::Decode },
            compute: Semaphore::new(1),
            draining: AtomicBool::new(false),
            queued: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
        });
        let (connections, incoming) = mpsc::unbounded_channel();
        let serving = Server::builder()
            .add_service(NodeServer::new(Door(Arc::clone(&process))))
            .serve_with_incoming(UnboundedReceiverStream::new(incoming).map(Ok::<_, std::io::Error>));
        process.spawn(async move { drop(serving.await) });
        process.spawn(store::keep(Arc::clone(&process)));
        sim.network.put(at, Some(Reachable { process, connections }));
    }

    /// Runs something until this life's end.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let life = self.life.clone();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = life.cancelled() => {}
                () = work => {}
            }
        });
    }

    pub(super) fn record(&self) -> NodeRecord {
        let card = card();
        NodeRecord {
            node_id: self.name(),
            instance: self.instance,
            role: self.role,
            state: NodeState::Ready,
            grpc_address: format!("node-{}:1", self.at),
            transfer: Vec::new(),
            model: card.name.clone(),
            card_digest: card.digest(),
            fingerprint: card.fingerprint,
            numerics: card.numerics,
            geometry: KvGeometry {
                layers: 1,
                kv_heads: 1,
                head_dim: 8,
                block_tokens: count(BLOCK_TOKENS),
                dtype: KvDtype::F16,
            },
            host_id: "h".into(),
            build: "b".into(),
            stub: true,
            blocks: BLOCKS,
            queue_capacity: count(QUEUE),
            context_tokens: 400,
        }
    }

    fn name(&self) -> NodeId {
        NodeId::new(format!("node-{}", self.at))
    }

    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.load(Ordering::Relaxed) == 0
    }

    /// What a node at rest must not have.
    pub(super) fn left_behind(&self) -> Option<String> {
        let counts = self.pool.counts();
        let in_use = counts.referenced + counts.reserved + counts.quarantined;
        let fault = self.pool.check_integrity().err().map(|fault| fault.to_string());
        fault.or_else(|| (in_use > 0 || !self.is_empty()).then(|| format!("{counts:?}, {:?} open", self.open)))
    }

    fn check(&self, instance: &str, work: Option<v1::Work>) -> Result<Work, Status> {
        if parse_id::<Instance>("instance", instance).ok() != Some(self.instance) {
            return Err(Status::failed_precondition("another process answers here"));
        }
        if self.draining.load(Ordering::Relaxed) {
            return Err(Status::unavailable("draining"));
        }
        if self.open.load(Ordering::Relaxed) >= QUEUE {
            return Err(Status::resource_exhausted("full"));
        }
        let work = work.ok_or_else(|| Status::invalid_argument("work is missing"))?;
        Work::try_from(work).map_err(|error| Status::invalid_argument(error.to_string()))
    }

    /// Time goes by, while the process is not stopped.
    async fn busy(&self, us: usize) {
        tokio::time::sleep(Duration::from_micros(us as u64)).await;
        self.sim.network.awake(self.at).await;
    }

    /// Computes a prompt: its blocks, the token behind it, and how much was there already.
    async fn compute(&self, context: &[u32], hashes: &[BlockHash]) -> Result<(BlockTable, u32, usize), v1::WorkFailed> {
        let blocks = context.len().div_ceil(BLOCK_TOKENS);
        // At least one token is computed.
        let held_max = (context.len() - 1) / BLOCK_TOKENS;
        let mut tries = 0;
        let table = loop {
            match self.pool.acquire(hashes, held_max, blocks) {
                Ok(table) => break table,
                Err(_) if tries == ROOM_TRIES => return Err(no_room()),
                Err(_) => tries += 1,
            }
            tokio::time::sleep(ROOM_WAIT).await;
        };
        let held = table.held() * BLOCK_TOKENS;
        self.busy(500 + 40 * (context.len() - held)).await;
        self.write(&table, context, table.held());
        self.check_contents(&table, context);
        for (ordinal, hash) in hashes.iter().enumerate() {
            table.publish(ordinal, *hash);
        }
        Ok((table, draw(context), held))
    }

    fn write(&self, table: &BlockTable, context: &[u32], from: usize) {
        let mut contents = self.contents.lock().unwrap();
        let pieces = context.chunks(BLOCK_TOKENS).zip(table.blocks()).skip(from);
        pieces.for_each(|(piece, block)| drop(contents.insert(*block, piece.to_vec())));
    }

    /// Reads what a sequence's blocks hold.
    fn check_contents(&self, table: &BlockTable, context: &[u32]) {
        let contents = self.contents.lock().unwrap();
        for (piece, block) in context.chunks(BLOCK_TOKENS).zip(table.blocks()) {
            let held = contents.get(block);
            if held.is_none_or(|held| held != piece) {
                let at = self.at;
                self.sim
                    .complain(format!("node {at} reads {held:?} in {block:?} instead of {piece:?}"));
            }
        }
    }

    async fn prefill(
        self: &Arc<Self>,
        work: Work,
        to: Destination,
        said: &mpsc::Sender<Result<v1::PrefillEvent, Status>>,
    ) -> Result<(), v1::WorkFailed> {
        let say = async |event| {
            let _ = said.send(Ok(v1::PrefillEvent { event: Some(event) })).await;
        };
        let queued = Counted::new(&self.queued);
        let turn = self.compute.acquire().await;
        drop(queued);
        let context = [work.prompt.as_slice(), &work.generated].concat();
        let cached_tokens = count(self.pool.held(&work.block_hashes) * BLOCK_TOKENS);
        let started = v1::PrefillStarted {
            queue_us: 1,
            cached_tokens,
        };
        say(prefill_event::Event::Started(started)).await;
        let (table, token, held) = self.compute(&context, &work.block_hashes).await?;
        drop(turn);
        let index = work.generated.len();
        let ends = index + 1 == work.sampling.max_tokens as usize;
        let first = v1::FirstToken {
            index: count(index),
            token,
            logprobs: None,
            finish_reason: if ends { v1::FinishReason::Length.into() } else { 0 },
            prefill_us: 500 + 40 * (context.len() - held) as u64,
            prefill_tokens: count(context.len() - held),
        };
        say(prefill_event::Event::FirstToken(first)).await;
        if ends {
            return Ok(());
        }
        let last = Last {
            index,
            token,
            between: Vec::new(),
        };
        let handed = self.hand_over(to, context, last).await;
        drop(table);
        match handed {
            Ok(bytes) => {
                let over = v1::HandedOver {
                    path: "simulated".into(),
                    bytes: bytes as u64,
                    ..Default::default()
                };
                say(prefill_event::Event::HandedOver(over)).await;
                Ok(())
            }
            Err(error) if error.full => Err(work_failed(Code::ResourceExhausted, error.why, true)),
            Err(error) => Err(work_failed(Code::Unavailable, error.why, true)),
        }
    }

    async fn decode(
        self: &Arc<Self>,
        open: v1::DecodeOpen,
        work: Work,
        mut commands: Streaming<v1::DecodeCommand>,
        said: &Decoding,
    ) -> Result<(), v1::WorkFailed> {
        let known = [work.prompt.as_slice(), &work.generated].concat();
        let accepted = v1::Accepted {
            ticket: ticket_bytes(work.ticket),
            held_blocks: count(self.pool.held(&work.block_hashes)),
            peer: Some(v1::TransferPeer {
                node_id: self.name().to_string(),
                instance: self.instance.to_string(),
                addresses: vec![self.at.to_string()],
            }),
        };
        let mut sequence = if open.local_prefill {
            say(said, decode_event::Event::Accepted(accepted)).await;
            let queued = Counted::new(&self.queued);
            let turn = self.compute.acquire().await;
            drop(queued);
            let (table, token, held) = self.compute(&known, &work.block_hashes).await?;
            drop(turn);
            let tokens = v1::Tokens {
                first_index: count(work.generated.len()),
                tokens: vec![token],
                queue_us: Some(1),
                prefill_us: Some(1),
                prefill_tokens: Some(count(known.len() - held)),
                cached_tokens: Some(count(held)),
                ..Default::default()
            };
            say(said, decode_event::Event::Tokens(tokens)).await;
            let context = [known.as_slice(), &[token]].concat();
            Sequence { work, context, table }
        } else {
            let context = known.len() + open.ahead as usize;
            let mut wish = self.wish(work.ticket, work.attempt, work.block_hashes.clone(), context);
            say(said, decode_event::Event::Accepted(accepted)).await;
            let queued = Counted::new(&self.queued);
            let arrived = self.wait(&work, &mut wish.arrived, &mut commands).await?;
            drop(queued);
            let Arrived { table, last, attempt } = arrived;
            let mut context = [known.as_slice(), &last.between].concat();
            self.check_contents(&table, &context);
            context.push(last.token);
            let committed = v1::Committed {
                attempt: attempt.0,
                index: count(last.index),
                token: last.token,
                handover_bytes: 1,
                held_tokens: 0,
            };
            say(said, decode_event::Event::Committed(committed)).await;
            Sequence { work, context, table }
        };
        self.run(&mut sequence, &mut commands, said).await
    }

    async fn wait(
        &self,
        work: &Work,
        arrived: &mut mpsc::UnboundedReceiver<Arrived>,
        commands: &mut Streaming<v1::DecodeCommand>,
    ) -> Result<Arrived, v1::WorkFailed> {
        let mut until = Instant::now() + PATIENCE;
        loop {
            let command = tokio::select! {
                biased;
                arrived = arrived.recv() => {
                    return arrived.ok_or_else(|| work_failed(Code::Internal, "its wish was dropped", false));
                }
                command = commands.next() => command,
                () = tokio::time::sleep_until(until) => {
                    return Err(work_failed(Code::Unavailable, "no hand-over came", true));
                }
            };
            match command {
                Some(Ok(v1::DecodeCommand {
                    command: Some(Command::Supersede(v1::Supersede { attempt })),
                })) => {
                    self.supersede(work.ticket, Attempt(attempt));
                    until = Instant::now() + PATIENCE;
                }
                Some(Ok(_)) => {}
                // The coordinator holds its end open for as long as it wants anything.
                Some(Err(_)) | None => return Err(work_failed(Code::Cancelled, "nobody wants it", false)),
            }
        }
    }

    /// Draws token after token. The KV of the last one is never written: nothing comes behind it.
    async fn run(
        self: &Arc<Self>,
        sequence: &mut Sequence,
        commands: &mut Streaming<v1::DecodeCommand>,
        said: &Decoding,
    ) -> Result<(), v1::WorkFailed> {
        let prompt = sequence.work.prompt.len();
        let end = prompt + sequence.work.sampling.max_tokens as usize;
        let (mut told, mut is_leaving, mut drawn) = (sequence.context.len(), false, 0_usize);
        let mut hand_on = None;
        let (results, mut handed_on) = mpsc::channel(4);
        let mut handing = JoinSet::new();
        while sequence.context.len() < end {
            if self.draining.load(Ordering::Relaxed) && !std::mem::replace(&mut is_leaving, true) {
                say(said, decode_event::Event::Leaving(v1::Leaving {})).await;
            }
            self.step(sequence).await?;
            drawn += 1;
            if sequence.context.len() == end || self.sim.one_in(2) {
                let tokens = v1::Tokens {
                    first_index: count(told - prompt),
                    tokens: sequence.context[told..].to_vec(),
                    ..Default::default()
                };
                told = sequence.context.len();
                say(said, decode_event::Event::Tokens(tokens)).await;
            }
            while let Some(Some(Ok(command))) = futures::FutureExt::now_or_never(commands.next()) {
                if let Some(Command::HandOn(wanted)) = command.command {
                    hand_on = Some(wanted);
                }
            }
            if let Some(wanted) = hand_on.take_if(|wanted| sequence.context.len() > wanted.context_tokens as usize) {
                let (process, results, shared) = (Arc::clone(self), results.clone(), self.part(sequence, &wanted));
                handing.spawn(async move {
                    let _ = results.send(process.hand_on(wanted, shared).await).await;
                });
            }
            while let Ok(result) = handed_on.try_recv() {
                say(said, decode_event::Event::HandedOn(result)).await;
            }
        }
        self.check_contents(&sequence.table, &sequence.context[..end - 1]);
        let finished = v1::DecodeFinished {
            finish_reason: v1::FinishReason::Length.into(),
            decoded_tokens: count(drawn),
            decode_us: 1,
        };
        say(said, decode_event::Event::Finished(finished)).await;
        Ok(())
    }

    async fn step(&self, sequence: &mut Sequence) -> Result<(), v1::WorkFailed> {
        self.busy(1_000 + self.sim.throw(3_000)).await;
        let blocks = sequence.context.len().div_ceil(BLOCK_TOKENS);
        let mut tries = 0;
        while sequence.table.blocks().len() < blocks && sequence.table.grow(1).is_err() {
            tries += 1;
            if tries == ROOM_TRIES {
                return Err(no_room());
            }
            tokio::time::sleep(ROOM_WAIT).await;
        }
        self.write(&sequence.table, &sequence.context, blocks - 1);
        let token = draw(&sequence.context);
        sequence.context.push(token);
        Ok(())
    }

    /// What is handed on: the blocks, their tokens, the last word.
    fn part(&self, sequence: &Sequence, wanted: &v1::HandOn) -> (BlockTable, Vec<u32>, Last) {
        let (upto, prompt) = (wanted.context_tokens as usize, sequence.work.prompt.len());
        let known = prompt + wanted.known_tokens as usize;
        let last = Last {
            index: upto - prompt,
            token: sequence.context[upto],
            between: sequence.context[known..upto].to_vec(),
        };
        let shared = sequence.table.share(0..upto / BLOCK_TOKENS);
        (shared, sequence.context[..upto].to_vec(), last)
    }

    async fn hand_on(
        self: &Arc<Self>,
        wanted: v1::HandOn,
        (_shared, context, last): (BlockTable, Vec<u32>, Last),
    ) -> v1::HandedOn {
        use v1::handed_on::End;
        let to = destination(wanted.decode.as_ref(), &wanted.ticket, wanted.attempt);
        let end = match to {
            None => End::Failed(work_failed(Code::Internal, "no destination", false)),
            Some(to) => match self.hand_over(to, context, last).await {
                Ok(_) => End::HandedOver(v1::HandedOver::default()),
                Err(error) if error.full => End::Failed(work_failed(Code::ResourceExhausted, error.why, true)),
                Err(error) => End::Failed(work_failed(Code::Unavailable, error.why, true)),
            },
        };
        v1::HandedOn {
            ticket: wanted.ticket,
            end: Some(end),
        }
    }

    /// A request ended, by itself or because its stream is gone.
    fn ended(&self, is_gone: bool) {
        if is_gone
            && self.sim.bug == Some(Planted::LeakOnCancel)
            && let Ok(table) = self.pool.acquire(&[], 0, 1)
        {
            std::mem::forget(table);
        }
    }
}

fn destination(peer: Option<&v1::TransferPeer>, ticket: &[u8], attempt: u32) -> Option<Destination> {
    let peer = peer?;
    Some(Destination {
        at: peer.addresses.first()?.parse().ok()?,
        instance: parse_id("instance", &peer.instance).ok()?,
        ticket: parse_ticket(ticket).ok()?,
        attempt: Attempt(attempt),
    })
}

/// The node's service.
struct Door(Arc<Process>);

#[tonic::async_trait]
impl Node for Door {
    type PrefillStream = BoxStream<'static, Result<v1::PrefillEvent, Status>>;
    type DecodeStream = BoxStream<'static, Result<v1::DecodeEvent, Status>>;
    type ModelCardStream = BoxStream<'static, Result<v1::ModelCardChunk, Status>>;
    type HeartbeatStream = BoxStream<'static, Result<v1::HeartbeatResponse, Status>>;

    async fn prefill(&self, request: Request<v1::PrefillRequest>) -> Answer<v1::PrefillEvent> {
        let (request, process) = (request.into_inner(), Arc::clone(&self.0));
        let work = process.check(&request.instance, request.work)?;
        let to = destination(request.decode.as_ref(), &ticket_bytes(work.ticket), work.attempt.0);
        let to = to.ok_or_else(|| Status::invalid_argument("decode"))?;
        let (said, answer) = mpsc::channel(16);
        let life = Arc::clone(&process);
        life.spawn(async move {
            let _open = Counted::new(&process.open);
            tokio::select! {
                biased;
                () = said.closed() => process.ended(true),
                ended = process.prefill(work, to, &said) => {
                    if let Err(failed) = ended {
                        let event = Some(prefill_event::Event::Failed(failed));
                        let _ = said.send(Ok(v1::PrefillEvent { event })).await;
                    }
                    process.ended(false);
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(answer).boxed()))
    }

    async fn decode(&self, request: Request<Streaming<v1::DecodeCommand>>) -> Answer<v1::DecodeEvent> {
        let (mut commands, process) = (request.into_inner(), Arc::clone(&self.0));
        let first = commands.message().await?.and_then(|command| command.command);
        let Some(Command::Open(mut open)) = first else {
            return Err(Status::invalid_argument("the first command is no open"));
        };
        let work = process.check(&open.instance, open.work.take())?;
        let (said, answer) = mpsc::channel(16);
        let life = Arc::clone(&process);
        life.spawn(async move {
            let _open = Counted::new(&process.open);
            tokio::select! {
                biased;
                () = said.closed() => process.ended(true),
                ended = process.decode(open, work, commands, &said) => {
                    if let Err(failed) = ended {
                        say(&said, decode_event::Event::Failed(failed)).await;
                    }
                    process.ended(false);
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(answer).boxed()))
    }

    async fn model_card(&self, _: Request<v1::ModelCardRequest>) -> Answer<v1::ModelCardChunk> {
        Err(Status::unimplemented("the coordinator was given its card"))
    }

    async fn heartbeat(&self, request: Request<v1::HeartbeatRequest>) -> Answer<v1::HeartbeatResponse> {
        let every = Duration::from_millis(request.into_inner().interval_ms.into());
        let (said, answer) = mpsc::channel(1);
        let process = Arc::clone(&self.0);
        let life = Arc::clone(&process);
        life.spawn(async move {
            loop {
                process.sim.network.awake(process.at).await;
                let state = if process.draining.load(Ordering::Relaxed) {
                    "draining"
                } else {
                    "ready"
                };
                let (open, queued) = (
                    process.open.load(Ordering::Relaxed),
                    process.queued.load(Ordering::Relaxed),
                );
                let load = v1::NodeLoad {
                    blocks: Some(process.pool.counts().into()),
                    queued_requests: count(queued),
                    running_requests: count(open.saturating_sub(queued)),
                    queue_capacity: count(QUEUE),
                    ..Default::default()
                };
                let beat = v1::HeartbeatResponse {
                    node_id: process.name().to_string(),
                    instance: process.instance.to_string(),
                    state: state.into(),
                    load: Some(load),
                    ..Default::default()
                };
                if said.send(Ok(beat)).await.is_err() {
                    return;
                }
                tokio::time::sleep(every).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(answer).boxed()))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        Err(Status::unimplemented("drained by hand"))
    }

    async fn set_role(&self, _: Request<v1::SetRoleRequest>) -> Result<Response<v1::SetRoleResponse>, Status> {
        Err(Status::unimplemented("it has one role"))
    }
}
