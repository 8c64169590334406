//! Nodes of both roles in one process, over the memory transport and with the scripted engine.

use baton_decode_node::DecodeRole;
use baton_engine::{Backend, BlockPool, StubSpec, stub};
use baton_kv_transfer::{Arena, Endpoint, EndpointOptions, Identity, PathKind};
use baton_node_host::engine::Speculation;
use baton_node_host::{EventStream, Host, NodeIdentity, NodeLimits, NodeParts, PoolBlocks, Role};
use baton_node_runtime::{Clock, Supervisor};
use baton_prefill_node::PrefillRole;
use baton_proto::v1::{self, decode_command::Command, decode_event, prefill_event};
use baton_text::{EngineFacts, Grammars, ModelCard};
use baton_types::{
    Attempt, BlockHashChain, Budget, Instance, KvDtype, NodeId, NodeRole, RequestId, SamplingParams, Ticket, Work,
};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

pub const BLOCK_TOKENS: u32 = 16;
const PATIENCE: Duration = Duration::from_secs(20);

pub struct TestNode {
    pub host: Host,
    pub role: Arc<dyn Role>,
    pub supervisor: Supervisor,
}

pub struct Shape {
    pub blocks: u32,
    pub queue: usize,
    pub running: usize,
    pub stub: &'static str,
    pub speculation: Speculation,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            blocks: 256,
            queue: 16,
            running: 16,
            stub: "stub",
            speculation: Speculation::Auto,
        }
    }
}

impl TestNode {
    pub async fn start(role: NodeRole, shape: Shape) -> Self {
        let backend = stub(shape.stub.parse::<StubSpec>().unwrap());
        Self::start_with(role, shape, backend).await
    }

    /// With this engine instead of the shape's.
    pub async fn start_with(role: NodeRole, shape: Shape, backend: Box<dyn Backend>) -> Self {
        let (clock, supervisor) = (Clock::new(), Supervisor::new());
        let geometry = backend.config().kv_geometry(BLOCK_TOKENS, KvDtype::F16);
        let arena = Arena::allocate(geometry, shape.blocks, &mut |_, _| {}).unwrap();
        let instance = Instance::random();
        let node_id = NodeId::new(format!("{role}-{instance}"));
        let identity = Identity {
            node: node_id.clone(),
            instance,
            fingerprint: backend.fingerprint(),
            geometry,
            numerics: backend.numerics().clone(),
            build: "test".into(),
        };
        let options = EndpointOptions {
            transports: vec![PathKind::Memory],
            quarantine_share: 1.0,
            ..EndpointOptions::default()
        };
        let blocks = PoolBlocks::new(BlockPool::new(shape.blocks));
        let endpoint = Endpoint::start(
            options,
            identity,
            arena.view(),
            blocks.clone(),
            clock,
            supervisor.clone(),
        )
        .await
        .unwrap();
        let card = ModelCard::stub(
            "stub",
            backend.config().context_tokens,
            EngineFacts {
                fingerprint: backend.fingerprint(),
                numerics: backend.numerics().clone(),
                block_tokens: BLOCK_TOKENS,
                kv_dtype: geometry.dtype,
            },
        );
        let host = Host::start(NodeParts {
            identity: NodeIdentity {
                node_id,
                instance,
                role,
            },
            limits: NodeLimits {
                queue_capacity: shape.queue,
                running_max: shape.running,
                chunk_tokens: 32,
            },
            backend,
            speculation: shape.speculation,
            eos_tokens: Vec::new(),
            grammars: Grammars::of_card(&card),
            arena: arena.view(),
            blocks,
            endpoint,
            clock,
            supervisor: supervisor.clone(),
        });
        let role: Arc<dyn Role> = match role {
            NodeRole::Prefill => Arc::new(PrefillRole::new(host.clone())),
            NodeRole::Decode => Arc::new(DecodeRole::new(host.clone())),
        };
        Self { host, role, supervisor }
    }

    pub fn instance(&self) -> String {
        self.host.identity().instance.to_string()
    }

    /// One request's attempt of `tokens` prompt tokens. Equal `seed`, equal prompt.
    pub fn work(&self, seed: u32, tokens: u32, max_tokens: u32) -> Work {
        let vocab = self.host.model().config.vocab.min(256);
        let prompt: Vec<u32> = (0..tokens).map(|i| (seed * 31 + i * 7 + i / 5) % vocab).collect();
        let scope = self.host.cache_scope("");
        Work {
            request_id: RequestId::random(),
            ticket: Ticket::random(),
            attempt: Attempt::FIRST,
            block_hashes: BlockHashChain::full_blocks(&scope, &prompt, BLOCK_TOKENS as usize),
            cache_salt: String::new(),
            prompt,
            generated: Vec::new(),
            sampling: SamplingParams {
                temperature: 0.0,
                max_tokens,
                ignore_eos: true,
                ..SamplingParams::default()
            },
            budget: Budget(Duration::from_secs(60)),
            coordinator: Instance(7),
            fingerprint: self.host.model().fingerprint,
        }
    }

    /// The same under a salt, for the tokens that the work has now.
    pub fn salted(&self, mut work: Work, salt: &str) -> Work {
        let tokens: Vec<u32> = work.prompt.iter().chain(&work.generated).copied().collect();
        work.block_hashes = BlockHashChain::full_blocks(&self.host.cache_scope(salt), &tokens, BLOCK_TOKENS as usize);
        work.cache_salt = salt.to_owned();
        work
    }

    /// Opens a decode stream.
    pub fn open(&self, work: &Work, local_prefill: bool) -> DecodeStream {
        self.open_ahead(work, local_prefill, 0)
    }

    /// As [`Self::open`]; so many tokens come with the hand-over.
    pub fn open_ahead(&self, work: &Work, local_prefill: bool, ahead: u32) -> DecodeStream {
        let (commands, rx) = mpsc::channel(8);
        let open = v1::DecodeOpen {
            work: Some(work.clone().into()),
            local_prefill,
            instance: self.instance(),
            ahead,
        };
        commands
            .try_send(Ok(v1::DecodeCommand {
                command: Some(Command::Open(open)),
            }))
            .unwrap();
        let events = self.role.decode(Box::pin(ReceiverStream::new(rx))).unwrap();
        DecodeStream { commands, events }
    }

    /// Asks for a prefill towards `decode`.
    pub fn prefill(&self, work: &Work, decode: &Self) -> Result<PrefillStream, Status> {
        let peer = decode.host.endpoint().peer();
        let peer = v1::TransferPeer {
            node_id: peer.node.to_string(),
            instance: peer.instance.to_string(),
            addresses: peer.addresses,
        };
        let request = v1::PrefillRequest {
            work: Some(work.clone().into()),
            decode: Some(peer),
            instance: self.instance(),
        };
        Ok(PrefillStream(self.role.prefill(request)?))
    }

    /// Waits until nothing is referenced, reserved or quarantined, and checks the pool.
    pub async fn is_empty_again(&self) {
        eventually("all blocks free or cached", || {
            let c = self.host.pool().counts();
            c.referenced + c.reserved + c.quarantined == 0 && self.host.requests() == 0
        })
        .await;
        self.host.pool().check_integrity().unwrap();
    }

    pub async fn stop(self) {
        self.is_empty_again().await;
        self.host.stop_engine().await;
        self.host.endpoint().shutdown().await;
        self.supervisor.begin_shutdown();
        self.supervisor.join(PATIENCE).await.unwrap();
        assert_eq!(self.supervisor.fatal(), None);
    }
}

/// Waits for a condition, with a deadline.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let looking = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(
        tokio::time::timeout(PATIENCE, looking).await.is_ok(),
        "never came: {what}"
    );
}

pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("never came: {what}"))
}

pub struct DecodeStream {
    commands: mpsc::Sender<Result<v1::DecodeCommand, Status>>,
    events: EventStream<v1::DecodeEvent>,
}

/// What a decode stream brought from its commit (or its start, where it prefilled itself) to its end.
#[derive(Debug, Default, PartialEq)]
pub struct Decoded {
    pub tokens: Vec<u32>,
    pub held_tokens: u32,
    pub cached_tokens: u32,
    pub finish: Option<v1::FinishReason>,
    pub handed_on: Vec<v1::HandedOn>,
}

impl DecodeStream {
    pub async fn next(&mut self) -> Option<Result<decode_event::Event, Status>> {
        let event = soon("a decode event", self.events.next()).await?;
        Some(event.map(|event| event.event.unwrap()))
    }

    pub async fn accepted(&mut self) -> v1::Accepted {
        match self.next().await {
            Some(Ok(decode_event::Event::Accepted(accepted))) => accepted,
            other => panic!("{other:?} instead of accepted"),
        }
    }

    pub fn command(&self, command: Command) {
        self.commands
            .try_send(Ok(v1::DecodeCommand { command: Some(command) }))
            .unwrap();
    }

    /// Reads until there are so many tokens; gives them.
    pub async fn tokens(&mut self, count: usize) -> Vec<u32> {
        let mut tokens = Vec::new();
        while tokens.len() < count {
            match self.next().await {
                Some(Ok(decode_event::Event::Tokens(frame))) => tokens.extend(frame.tokens),
                Some(Ok(decode_event::Event::Accepted(_))) => {}
                other => panic!("{other:?} instead of tokens"),
            }
        }
        tokens
    }

    /// Tells the sequence to go to `to`, which was opened with `known` generated tokens of `work` and `ahead` more.
    pub fn hand_on(&self, to: &v1::Accepted, work: &Work, known: usize, ahead: usize) {
        let context = u32::try_from(work.prompt.len() + known + ahead).unwrap();
        self.command(Command::HandOn(v1::HandOn {
            ticket: to.ticket.clone(),
            attempt: 1,
            decode: to.peer.clone(),
            context_tokens: context,
            known_tokens: u32::try_from(known).unwrap(),
        }));
    }

    /// Reads to the end; indexes must follow each other.
    pub async fn finish(&mut self) -> Decoded {
        self.finish_after(Vec::new()).await
    }

    /// The same behind these tokens.
    pub async fn finish_after(&mut self, tokens: Vec<u32>) -> Decoded {
        let mut decoded = Decoded {
            tokens,
            ..Decoded::default()
        };
        while let Some(event) = self.next().await {
            match event.unwrap() {
                decode_event::Event::Accepted(_) => {}
                decode_event::Event::Committed(committed) => {
                    assert_eq!(committed.index as usize, decoded.tokens.len());
                    decoded.tokens.push(committed.token);
                    decoded.held_tokens = committed.held_tokens;
                }
                decode_event::Event::Tokens(frame) => {
                    assert_eq!(frame.first_index as usize, decoded.tokens.len());
                    assert!(frame.tokens.len() <= 8);
                    decoded.tokens.extend(frame.tokens);
                    decoded.cached_tokens = frame.cached_tokens.unwrap_or(decoded.cached_tokens);
                }
                decode_event::Event::Finished(finished) => {
                    decoded.finish = Some(finished.finish_reason());
                }
                decode_event::Event::Leaving(_) => {}
                decode_event::Event::HandedOn(word) => decoded.handed_on.push(word),
                decode_event::Event::Failed(failed) => panic!("{failed:?}"),
            }
        }
        decoded
    }

    /// Reads until it fails.
    pub async fn failure(&mut self) -> v1::WorkFailed {
        while let Some(event) = self.next().await {
            if let decode_event::Event::Failed(failed) = event.unwrap() {
                return failed;
            }
        }
        panic!("the stream ended without a failure");
    }
}

pub struct PrefillStream(EventStream<v1::PrefillEvent>);

#[derive(Debug, Default)]
pub struct Prefilled {
    pub cached_tokens: u32,
    pub first: Option<v1::FirstToken>,
    pub handed_over: Option<v1::HandedOver>,
    pub failed: Option<v1::WorkFailed>,
}

impl PrefillStream {
    pub async fn next(&mut self) -> Option<prefill_event::Event> {
        let event = soon("a prefill event", self.0.next()).await?;
        Some(event.unwrap().event.unwrap())
    }

    pub async fn finish(&mut self) -> Prefilled {
        let mut prefilled = Prefilled::default();
        while let Some(event) = self.next().await {
            match event {
                prefill_event::Event::Started(started) => prefilled.cached_tokens = started.cached_tokens,
                prefill_event::Event::FirstToken(first) => prefilled.first = Some(first),
                prefill_event::Event::HandedOver(report) => prefilled.handed_over = Some(report),
                prefill_event::Event::Failed(failed) => prefilled.failed = Some(failed),
            }
        }
        prefilled
    }
}

/// Runs one request over a pair, as a coordinator would.
pub async fn run_pair(prefill: &TestNode, decode: &TestNode, work: &Work) -> (Prefilled, Decoded) {
    let mut stream = decode.open(work, false);
    stream.accepted().await;
    let mut prefilling = prefill.prefill(work, decode).unwrap();
    let prefilled = prefilling.finish().await;
    (prefilled, stream.finish().await)
}

/// Runs one request on one node.
pub async fn run_alone(decode: &TestNode, work: &Work) -> Decoded {
    let mut stream = decode.open(work, true);
    stream.accepted().await;
    stream.finish().await
}
