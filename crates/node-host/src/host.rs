//! What a node has, whatever its role: identity, model facts, blocks, engine, endpoint, and whether it takes work.

use crate::blocks::PoolBlocks;
use crate::engine::{self, Ending, EngineHandle, EngineParts, Lookout, Speculation};
use crate::errors::LastErrors;
use crate::phase::{Phase, RoleRefused};
use baton_engine::{Backend, BlockPool, ModelConfig};
use baton_kv_transfer::Endpoint;
use baton_node_runtime::{Clock, Supervisor, TaskHandle};
use baton_text::Grammars;
use baton_types::{ArenaView, CacheScope, Instance, KvGeometry, ModelFingerprint, NodeId, NodeRole, NumericsId};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Who a node is.
#[derive(Debug, Clone)]
pub struct NodeIdentity {
    /// Its name.
    pub node_id: NodeId,
    /// This life of its process.
    pub instance: Instance,
    /// What it does when it comes up; [`Host::role`] is what it does now.
    pub role: NodeRole,
}

/// What is bounded on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeLimits {
    /// Requests that may wait for blocks.
    pub queue_capacity: usize,
    /// Requests that may be computed at once.
    pub running_max: usize,
    /// Prompt tokens of one step.
    pub chunk_tokens: usize,
}

/// Everything that a node is made of, in a process of its own or in a test.
pub struct NodeParts {
    /// Who it is.
    pub identity: NodeIdentity,
    /// Its bounds.
    pub limits: NodeLimits,
    /// The model.
    pub backend: Box<dyn Backend>,
    /// Whether decoding sequences get drafts.
    pub speculation: Speculation,
    /// Tokens that end a text beside those that the model's own configuration names (a chat template's, for one).
    pub eos_tokens: Vec<u32>,
    /// What compiles the grammars of outputs.
    pub grammars: Grammars,
    /// Memory of its KV.
    pub arena: ArenaView,
    /// Owner of that memory's blocks, the same that the endpoint was given.
    pub blocks: Arc<PoolBlocks>,
    /// Its end of hand-overs.
    pub endpoint: Endpoint,
    /// Time.
    pub clock: Clock,
    /// Its tasks.
    pub supervisor: Supervisor,
}

/// What is known of the model that a node runs.
#[derive(Debug, Clone)]
pub struct ModelFacts {
    /// Hyperparameters.
    pub config: ModelConfig,
    /// Which weights.
    pub fingerprint: ModelFingerprint,
    /// Which arithmetic.
    pub numerics: NumericsId,
    /// Scripted tokens.
    pub stub: bool,
    /// Shape of its KV.
    pub geometry: KvGeometry,
}

/// A living node. Cheap to clone.
#[derive(Clone)]
pub struct Host(Arc<Inner>);

struct Inner {
    identity: NodeIdentity,
    limits: NodeLimits,
    model: ModelFacts,
    ending: Ending,
    grammars: Grammars,
    lookout: Lookout,
    blocks: Arc<PoolBlocks>,
    arena: ArenaView,
    endpoint: Endpoint,
    engine: EngineHandle,
    engine_task: Mutex<Option<TaskHandle>>,
    clock: Clock,
    supervisor: Supervisor,
    errors: LastErrors,
    phase: watch::Sender<Phase>,
    /// Requests from admission to their last word.
    requests: AtomicUsize,
}

/// Counts a request as long as it lives.
pub struct RequestGuard(Host);

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.0.0.requests.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Host {
    /// Starts the engine thread.
    pub fn start(parts: NodeParts) -> Self {
        let NodeParts {
            identity,
            limits,
            backend,
            speculation,
            eos_tokens,
            grammars,
            arena,
            blocks,
            endpoint,
            clock,
            supervisor,
        } = parts;
        let model = ModelFacts {
            config: backend.config().clone(),
            fingerprint: backend.fingerprint(),
            numerics: backend.numerics().clone(),
            stub: backend.is_stub(),
            geometry: *arena.geometry(),
        };
        let phase = watch::Sender::new(Phase::new(identity.role));
        let ending = Ending::new(backend.config(), &eos_tokens);
        let room = endpoint.clone();
        let engine_parts = EngineParts {
            backend,
            arena: arena.clone(),
            blocks: blocks.clone(),
            queue_capacity: limits.queue_capacity,
            running_max: limits.running_max,
            chunk_tokens: limits.chunk_tokens,
            speculation,
            ending: ending.clone(),
            room_changed: Box::new(move || room.room_changed()),
        };
        let (engine, task) = engine::start(engine_parts, clock, &supervisor);
        // However the node ends, its thread does too: nobody could abort it.
        let (closer, token) = (engine.clone(), supervisor.shutdown_token());
        supervisor.spawn("engine-closer", async move {
            token.cancelled().await;
            closer.close();
        });
        let lookout = Lookout::start(&supervisor);
        Self(Arc::new(Inner {
            identity,
            limits,
            model,
            ending,
            grammars,
            lookout,
            blocks,
            arena,
            endpoint,
            engine,
            engine_task: Mutex::new(Some(task)),
            clock,
            supervisor,
            errors: LastErrors::default(),
            phase,
            requests: AtomicUsize::new(0),
        }))
    }

    /// Who it is.
    pub fn identity(&self) -> &NodeIdentity {
        &self.0.identity
    }

    /// Its bounds.
    pub fn limits(&self) -> &NodeLimits {
        &self.0.limits
    }

    /// What it runs.
    pub fn model(&self) -> &ModelFacts {
        &self.0.model
    }

    /// What ends a sequence here.
    pub fn ending(&self) -> &Ending {
        &self.0.ending
    }

    /// What compiles the grammars of outputs.
    pub fn grammars(&self) -> &Grammars {
        &self.0.grammars
    }

    /// What looks into them while the engine computes.
    pub fn lookout(&self) -> &Lookout {
        &self.0.lookout
    }

    /// Owner of its blocks.
    pub fn pool(&self) -> &Arc<BlockPool> {
        self.0.blocks.pool()
    }

    /// Memory of its blocks.
    pub fn arena(&self) -> &ArenaView {
        &self.0.arena
    }

    /// Its end of hand-overs.
    pub fn endpoint(&self) -> &Endpoint {
        &self.0.endpoint
    }

    /// What computes.
    pub fn engine(&self) -> &EngineHandle {
        &self.0.engine
    }

    /// Time.
    pub fn clock(&self) -> Clock {
        self.0.clock
    }

    /// Its tasks.
    pub fn supervisor(&self) -> &Supervisor {
        &self.0.supervisor
    }

    /// Its last errors.
    pub fn errors(&self) -> &LastErrors {
        &self.0.errors
    }

    /// Remembers an error for the heartbeat.
    pub fn note_error(&self, error: &dyn std::fmt::Display) {
        self.0.errors.push(&self.0.clock, error);
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        *self.0.phase.borrow()
    }

    /// The role whose requests it has.
    pub fn role(&self) -> NodeRole {
        self.phase().role
    }

    /// Tells of every change of phase.
    pub fn phases(&self) -> watch::Receiver<Phase> {
        self.0.phase.subscribe()
    }

    /// Waits until the phase is such.
    pub async fn until_phase(&self, such: impl FnMut(&Phase) -> bool) -> Phase {
        let mut phases = self.phases();
        let found = phases.wait_for(such).await.ok().map(|phase| *phase);
        match found {
            Some(phase) => phase,
            // Never: the sender lives in this host.
            None => std::future::pending().await,
        }
    }

    /// Waits until it takes no new work.
    pub async fn stops(&self) {
        self.until_phase(|phase| !phase.takes_work()).await;
    }

    /// Waits until what still runs has had its time.
    pub async fn overdue(&self) {
        self.until_phase(|phase| phase.overdue).await;
    }

    /// Takes no new work from now on, and gives what runs so long to end. The first call counts.
    pub fn begin_drain(&self, within: Duration) {
        self.0.phase.send_if_modified(|phase| phase.leave(within));
    }

    /// Takes no new work from now on, and takes up this role once it is empty.
    ///
    /// # Errors
    /// Where it is on its way to something else.
    pub fn begin_role_change(&self, to: NodeRole, within: Duration) -> Result<(), RoleRefused> {
        let mut result = Ok(());
        self.0.phase.send_if_modified(|phase| {
            let changed = phase.change(self.identity().node_id.as_str(), to, within);
            let modified = changed == Ok(true);
            result = changed.map(drop);
            modified
        });
        result
    }

    /// It is empty and has taken up its new role; false where it is to leave instead.
    pub(crate) fn end_role_change(&self) -> bool {
        self.0.phase.send_if_modified(Phase::changed)
    }

    /// What still runs has had its time.
    pub(crate) fn expire(&self) {
        self.0.phase.send_modify(Phase::expire);
    }

    /// Nothing of a request is left: not one that lives, nor blocks that a hand-over reads.
    pub fn is_empty(&self) -> bool {
        self.requests() == 0 && self.endpoint().stats().handovers_out == 0
    }

    /// Counts a request until the guard is dropped.
    pub fn enter(&self) -> RequestGuard {
        self.0.requests.fetch_add(1, Ordering::AcqRel);
        RequestGuard(self.clone())
    }

    /// Requests that live.
    pub fn requests(&self) -> usize {
        self.0.requests.load(Ordering::Acquire)
    }

    /// Where the identities of what this node computes begin, for requests of one salt.
    pub fn cache_scope(&self, salt: &str) -> CacheScope {
        CacheScope {
            fingerprint: self.0.model.fingerprint,
            numerics: self.0.model.numerics.clone(),
            dtype: self.0.model.geometry.dtype,
            adapter: String::new(),
            salt: salt.to_owned(),
        }
    }

    /// Ends the engine thread and waits for it.
    pub async fn stop_engine(&self) {
        self.0.engine.close();
        let task = self.0.engine_task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            task.join().await;
        }
    }
}
