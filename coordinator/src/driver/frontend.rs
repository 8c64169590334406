//! The front end that serves: lets requests in, checks them, and starts a task for each.

use super::decisions::{Decisions, Explanation};
use super::placement::{Placer, RoutingOptions};
use super::prepare::{Bounds, Prepared, prepare, tokenize, unknown_model};
use super::registry::{Entry, Registry};
use super::task::{Job, Shared, code_label, run};
use crate::control::Record;
use crate::membership::{Members, Model};
use crate::tenants::Tenants;
use crate::{ApiCode, ApiError, Frontend, GenerateInput, Generation, ModelInfo, PromptInput};
use baton_node_runtime::{CancellationToken, Clock, Supervisor};
use baton_scheduling::{Admission, AdmissionLimits, AdmissionLoad, admit};
use baton_types::{Instance, RequestId};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// A text longer than this is tokenized where it does not hold up other requests; so is every grammar compiled.
const INLINE_TEXT_BYTES: usize = 32 * 1024;
/// Events beside one per token: held-back text, and the end.
const EVENTS_BESIDE_TOKENS: usize = 4;
/// When to ask again where no node is there yet.
const RETRY_NO_MODEL: Duration = Duration::from_secs(1);

/// What a coordinator is made of.
pub(crate) struct CoordinatorOptions {
    pub(crate) members: Members,
    pub(crate) instance: Instance,
    pub(crate) limits: AdmissionLimits,
    pub(crate) tenants: Tenants,
    pub(crate) routing: RoutingOptions,
    /// Requests of which decisions are kept.
    pub(crate) decisions_max: usize,
    /// Where the controller finds the last requests.
    pub(crate) record: Record,
    pub(crate) timeout_default: Duration,
    pub(crate) timeout_max: Duration,
    pub(crate) clock: Clock,
    pub(crate) supervisor: Supervisor,
}

/// The front end. Clones are one.
#[derive(Clone)]
pub(crate) struct Coordinator(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    registry: Registry,
    limits: AdmissionLimits,
    tenants: Tenants,
    timeout_default: Duration,
    timeout_max: Duration,
    supervisor: Supervisor,
    /// No request is let in any more.
    closed: AtomicBool,
    /// Ends the requests that a shutdown would otherwise wait for.
    cancel_all: CancellationToken,
}

impl Coordinator {
    pub(crate) fn new(options: CoordinatorOptions) -> Self {
        let CoordinatorOptions {
            members,
            instance,
            limits,
            tenants,
            routing,
            decisions_max,
            record,
            timeout_default,
            timeout_max,
            clock,
            supervisor,
        } = options;
        let decisions = Decisions::new(decisions_max);
        let placer = Placer::new(members.clone(), clock, routing, decisions.clone());
        Self(Arc::new(Inner {
            shared: Arc::new(Shared {
                members,
                placer,
                decisions,
                record,
                clock,
                instance,
            }),
            registry: Registry::default(),
            limits,
            tenants,
            timeout_default,
            timeout_max,
            supervisor,
            closed: AtomicBool::new(false),
            cancel_all: CancellationToken::new(),
        }))
    }

    /// Requests that are let in and not over.
    pub(crate) fn requests(&self) -> u32 {
        self.0.registry.len()
    }

    /// Of these, those that wait for a place.
    pub(crate) fn queued(&self) -> u32 {
        self.0.shared.placer.queued()
    }

    /// Who is in the cluster.
    pub(crate) fn members(&self) -> &Members {
        &self.0.shared.members
    }

    /// This process.
    pub(crate) fn instance(&self) -> Instance {
        self.0.shared.instance
    }

    /// The last requests, for the controller.
    pub(crate) fn record(&self) -> &Record {
        &self.0.shared.record
    }

    /// Why a request was placed where it was, if that is still kept.
    pub(crate) fn explain(&self, request_id: RequestId) -> Option<Explanation> {
        self.0.shared.decisions.explain(request_id)
    }

    /// Lets no more requests in.
    pub(crate) fn close(&self) {
        self.0.closed.store(true, Ordering::Relaxed);
    }

    /// Ends all requests as if their clients had asked.
    pub(crate) fn cancel_all(&self) {
        self.0.cancel_all.cancel();
    }

    async fn start(&self, input: GenerateInput) -> Result<Generation, ApiError> {
        let arrived = self.0.shared.clock.now();
        let tenant = self
            .0
            .tenants
            .of_key(input.api_key.as_ref().map(|key| key.0.as_str()))?;
        let model = self.model(&input.model)?;
        let (tenant_entry, tenant_wait) = self.0.tenants.admit(&tenant)?;
        let record = &self.0.shared.record;
        let recording = record.arrived(arrived, &model.card.name, || about_tokens(&input.prompt));
        let cancel = self.0.cancel_all.child_token();
        let entry = self
            .admit(input.request_id, cancel.clone())
            .inspect_err(|_| recording.lost())?;
        // From here on the request counts as waiting, and leaving by any way gives its place back.
        let waiting = self.0.shared.placer.enter();
        let request_id = input.request_id;
        let mut prepared = self.prepare(&model, input).await?;
        if tenant.salted {
            prepared.cache_salt = format!("{}\0{}", tenant.name, prepared.cache_salt);
        }
        let prompt_tokens = u32::try_from(prepared.prompt.len()).unwrap_or(u32::MAX);
        recording.prompt(prepared.prompt.len());
        let (events, receiver) = mpsc::channel(prepared.sampling.max_tokens as usize + EVENTS_BESIDE_TOKENS);
        let name = model.card.name.clone();
        let guard = cancel.clone().drop_guard();
        let job = Job {
            request_id,
            model,
            prepared,
            arrived,
            events,
            cancel,
            entry,
            recording,
            tenant,
            tenant_entry: Some(tenant_entry),
            waiting: Some((waiting, tenant_wait)),
        };
        self.0.supervisor.spawn("request", run(Arc::clone(&self.0.shared), job));
        Ok(Generation::new(request_id, name, prompt_tokens, receiver, Some(guard)))
    }

    fn model(&self, name: &str) -> Result<Arc<Model>, ApiError> {
        let members = &self.0.shared.members;
        if let Some(model) = members.model(name) {
            return Ok(model);
        }
        let served: Vec<String> = members.served().into_iter().map(|model| model.id).collect();
        match served.as_slice() {
            [] => Err(
                ApiError::new(ApiCode::Unavailable, "no model is served: no decode node is ready")
                    .retry_after(RETRY_NO_MODEL),
            ),
            [only] if name.is_empty() => members.model(only).ok_or_else(|| unknown_model(only, &served)),
            several if name.is_empty() => {
                let message = format!("several models are served; name one of: {}", several.join(", "));
                Err(ApiError::invalid("model", message))
            }
            _ => Err(unknown_model(name, &served)),
        }
    }

    fn admit(&self, request_id: RequestId, cancel: CancellationToken) -> Result<Entry, ApiError> {
        let inner = &self.0;
        if inner.closed.load(Ordering::Relaxed) {
            return Err(ApiError::new(ApiCode::Unavailable, "this coordinator is shutting down"));
        }
        let load = AdmissionLoad {
            requests: inner.registry.len(),
            queued: inner.shared.placer.queued(),
            wait_per_place: inner.shared.placer.wait_per_place(),
        };
        let refused = match admit(&inner.limits, &load) {
            Admission::Admit => match inner.registry.enter(request_id, inner.limits.requests_max, cancel) {
                Some(entry) => return Ok(entry),
                None => ApiError::new(ApiCode::ResourceExhausted, "all places were taken just now")
                    .retry_after(RETRY_NO_MODEL),
            },
            Admission::Refuse { refusal, retry_after } => {
                ApiError::new(ApiCode::ResourceExhausted, refusal.to_string()).retry_after(retry_after)
            }
        };
        Err(refused)
    }

    async fn prepare(&self, model: &Arc<Model>, input: GenerateInput) -> Result<Prepared, ApiError> {
        let bounds = Bounds {
            context_tokens: self.0.shared.members.context_tokens(model),
            timeout_default: self.0.timeout_default,
            timeout_max: self.0.timeout_max,
        };
        let bytes = match &input.prompt {
            PromptInput::Text(text) => text.len(),
            PromptInput::Tokens(_) => 0,
            PromptInput::Chat(messages) => messages.iter().map(|message| message.content.len()).sum(),
        };
        let grammar = input.sampling.grammar.is_some();
        let work = {
            let model = Arc::clone(model);
            move || {
                let prompt = tokenize(&model, &input.prompt)?;
                prepare(&model, input, prompt, bounds)
            }
        };
        if bytes <= INLINE_TEXT_BYTES && !grammar {
            return work();
        }
        let (answer, wait) = oneshot::channel();
        // Nobody waits any more where the client has gone.
        self.0
            .supervisor
            .spawn_blocking("tokenize", move || drop(answer.send(work())));
        wait.await
            .unwrap_or_else(|_| Err(ApiError::new(ApiCode::Internal, "the tokenizer failed")))
    }
}

/// Tokens of a prompt that nobody has tokenized, for a request that is refused before that.
fn about_tokens(prompt: &PromptInput) -> u32 {
    const BYTES_PER_TOKEN: usize = 4;
    let tokens = match prompt {
        PromptInput::Tokens(tokens) => tokens.len(),
        PromptInput::Text(text) => text.len() / BYTES_PER_TOKEN + 1,
        PromptInput::Chat(messages) => {
            let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
            bytes / BYTES_PER_TOKEN + 1
        }
    };
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

impl Frontend for Coordinator {
    fn generate(&self, input: GenerateInput) -> BoxFuture<'_, Result<Generation, ApiError>> {
        async move {
            let request_id = input.request_id;
            let started = self.start(input).await;
            if let Err(error) = &started {
                tracing::debug!(%request_id, %error, "request refused");
                metrics::counter!("baton_coordinator_requests_total", "outcome" => code_label(error.code)).increment(1);
            }
            started
        }
        .boxed()
    }

    fn cancel(&self, request_id: RequestId) -> bool {
        self.0.registry.cancel(request_id)
    }

    fn tokenize(&self, model: &str, input: &PromptInput) -> Result<Vec<u32>, ApiError> {
        tokenize(&*self.model(model)?, input)
    }

    fn token_bytes(&self, model: &str, token: u32) -> Vec<u8> {
        self.model(model)
            .map(|model| model.tokenizer.token_bytes(token).to_vec())
            .unwrap_or_default()
    }

    fn models(&self) -> Vec<ModelInfo> {
        self.0.shared.members.served()
    }
}
