//! The seam between the doors (gRPC, HTTP) and what serves them. A door converts; whatever is behind this trait decides.
//! Dropping a [`Generation`] cancels its request: both nodes know within 100 ms.

use baton_text::Message;
use baton_types::{FinishReason, RequestId, SamplingParams, TokenLogprobs};
use futures::future::BoxFuture;
use serde::Serialize;
use std::borrow::Cow;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::DropGuard;

/// Serves the doors.
pub trait Frontend: Send + Sync + 'static {
    /// Starts a request. Resolves once it is let in and its input is checked; before a node has seen it.
    ///
    /// # Errors
    /// Bad input, no such model, no place.
    fn generate(&self, input: GenerateInput) -> BoxFuture<'_, Result<Generation, ApiError>>;

    /// Stops a running request; false where there is none of that name.
    fn cancel(&self, request_id: RequestId) -> bool;

    /// Token ids of a text or a chat. An empty `model` means the only one served.
    ///
    /// # Errors
    /// No such model, or an input that its tokenizer or template refuses.
    fn tokenize(&self, model: &str, input: &PromptInput) -> Result<Vec<u32>, ApiError>;

    /// The bytes that one token stands for (maybe not whole characters), as log probabilities show it.
    /// Empty where there is no such model or token.
    fn token_bytes(&self, model: &str, token: u32) -> Vec<u8>;

    /// The models for which a request would be taken now, by name.
    fn models(&self) -> Vec<ModelInfo>;
}

/// What a request works on.
#[derive(Debug, Clone, PartialEq)]
pub enum PromptInput {
    /// Plain text.
    Text(String),
    /// Token ids as they are.
    Tokens(Vec<u32>),
    /// A chat that the model's template renders.
    Chat(Vec<Message>),
}

/// One request, as a door hands it over.
#[derive(Debug, Clone)]
pub struct GenerateInput {
    /// Drawn by the door, so that refusals carry it too.
    pub request_id: RequestId,
    /// As the client named it; empty: the only one served.
    pub model: String,
    /// What to go on from.
    pub prompt: PromptInput,
    /// How tokens are drawn. Its `seed` and `max_tokens` are set from the two fields below.
    pub sampling: SamplingParams,
    /// `None`: drawn at random.
    pub seed: Option<u64>,
    /// `None`: what is left of the context.
    pub max_tokens: Option<u32>,
    /// Generation ends before the first of these in the text. At most 16 of at most 256 bytes.
    pub stop: Vec<String>,
    /// Time budget; `None`: the coordinator's default.
    pub timeout: Option<Duration>,
    /// Cached blocks are shared among requests of equal salt only. At most 256 bytes.
    pub cache_salt: String,
    /// As the client showed it.
    pub api_key: Option<ApiKey>,
}

/// A client's key. It is never logged.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(pub String);

impl ApiKey {
    /// The key in an `authorization` header: `Bearer KEY`, the scheme in any case.
    pub fn bearer(header: &str) -> Option<Self> {
        let (scheme, key) = header.split_once(' ')?;
        let is_bearer = scheme.eq_ignore_ascii_case("bearer");
        is_bearer.then(|| Self(key.trim().to_owned()))
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// A request that runs. Dropping it cancels.
#[derive(Debug)]
pub struct Generation {
    /// Its name.
    pub request_id: RequestId,
    /// The model's full name.
    pub model: String,
    /// Length of the tokenized prompt.
    pub prompt_tokens: u32,
    events: mpsc::Receiver<GenerationEvent>,
    _cancel: Option<DropGuard>,
}

impl Generation {
    /// Wraps the receiving end of a request's events. `cancel` is dropped with the generation.
    pub fn new(
        request_id: RequestId,
        model: String,
        prompt_tokens: u32,
        events: mpsc::Receiver<GenerationEvent>,
        cancel: Option<DropGuard>,
    ) -> Self {
        Self {
            request_id,
            model,
            prompt_tokens,
            events,
            _cancel: cancel,
        }
    }

    /// The next event. After `Finished` or `Failed`, and only then, there is none.
    pub async fn next(&mut self) -> Option<GenerationEvent> {
        self.events.recv().await
    }

    /// As [`Self::next`], for streams.
    pub fn poll_next(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Option<GenerationEvent>> {
        self.events.poll_recv(context)
    }
}

/// What comes of a request, in order: chunks, then one `Finished` or one `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum GenerationEvent {
    /// More of the answer.
    Chunk(Chunk),
    /// The end of a good answer.
    Finished(Finished),
    /// The end of a bad one.
    Failed(ApiError),
}

/// Consecutive tokens and the text that became safe to show with them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chunk {
    /// Whole characters; may be empty, and may belong to earlier tokens.
    pub text: String,
    /// May be empty where only held-back text is left to show.
    pub tokens: Vec<u32>,
    /// One per token where asked for, else empty.
    pub logprobs: Vec<TokenLogprobs>,
    /// Index of `tokens[0]` among the generated tokens.
    pub first_index: u32,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// What it used.
    pub usage: Usage,
    /// When and where.
    pub timeline: Timeline,
}

/// Tokens counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u32,
    /// Generated, and not dropped behind a stop string.
    pub completion_tokens: u32,
    /// Prompt tokens whose KV came from a prefix cache.
    pub cached_tokens: u32,
}

/// What became of a request, and when. Times are of the machine that measured them; see `Timeline` in `common.proto`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Timeline {
    /// Coordinator admission to the first chunk's compute, microseconds.
    pub queue_us: u64,
    /// First chunk's start to the first token, microseconds.
    pub prefill_us: u64,
    /// Prompt tokens computed.
    pub prefill_tokens: u32,
    /// Prompt tokens from a prefix cache.
    pub cached_tokens: u32,
    /// Prompt tokens that the decode node held, so that they were not handed over.
    pub held_tokens: u32,
    /// Bytes of KV that crossed between nodes.
    pub handover_bytes: u64,
    /// `tcp`, `memory` ..., or `local` where nothing was handed over.
    pub handover_path: String,
    /// Hand-over time that compute did not hide, microseconds.
    pub exposed_us: u64,
    /// Arrival to the first token, microseconds.
    pub ttft_us: u64,
    /// Mean time between tokens after the first, microseconds.
    pub decode_us_per_token: u64,
    /// Who prefilled.
    pub prefill_node: String,
    /// Who decoded last.
    pub decode_node: String,
    /// Pairs of nodes tried.
    pub attempts: u32,
    /// Wait for the reservation, microseconds.
    pub reserve_us: u64,
    /// Each change of nodes, and why.
    pub fallbacks: Vec<String>,
    /// Paths that failed under the hand-over, in order.
    pub path_fallbacks: Vec<PathFallback>,
    /// What the path carried while it was at work for this hand-over; 0 where that was not measured.
    pub handover_bytes_per_second: u64,
}

/// A hand-over went on over another path, because the one that it used failed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct PathFallback {
    /// What failed.
    pub from: String,
    /// What it went on over.
    pub to: String,
    /// What was seen.
    pub reason: String,
}

/// A model that is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// As clients name it.
    pub id: String,
    /// Longest context.
    pub context_tokens: u32,
    /// A stub engine serves it.
    pub stub: bool,
    /// Seconds since 1970 at which it was first listed.
    pub created: u64,
}

/// The kinds of failure that a client can tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ApiCode {
    /// The request is at fault; `field` says where.
    InvalidArgument,
    /// No key, or one that is nobody's.
    Unauthenticated,
    /// No such model.
    NotFound,
    /// No place now; `retry_after` says when to come again.
    ResourceExhausted,
    /// It may work if asked again.
    Unavailable,
    /// Its time is over.
    DeadlineExceeded,
    /// A bug, or a request that kills nodes.
    Internal,
}

/// A failure, as both doors convert it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Of which kind.
    pub code: ApiCode,
    /// For people, with the remedy where there is one.
    pub message: String,
    /// The request's field at fault, as the gRPC door calls it (`max_tokens`, `prompt`, `messages`, ...).
    pub field: Option<Cow<'static, str>>,
    /// When to ask again.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    /// One without field and hint.
    pub fn new(code: ApiCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            field: None,
            retry_after: None,
        }
    }

    /// A request at fault in this field.
    pub fn invalid(field: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self {
            field: Some(field.into()),
            ..Self::new(ApiCode::InvalidArgument, message)
        }
    }

    /// Adds when to ask again.
    pub fn retry_after(self, retry_after: Duration) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..self
        }
    }

    /// The same request may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self.code {
            ApiCode::ResourceExhausted | ApiCode::Unavailable => true,
            ApiCode::InvalidArgument
            | ApiCode::Unauthenticated
            | ApiCode::NotFound
            | ApiCode::DeadlineExceeded
            | ApiCode::Internal => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bearer_key_is_read_and_never_shown() {
        let key = |header| ApiKey::bearer(header).map(|key| key.0);
        assert_eq!(key("bearer  abc "), Some("abc".to_owned()));
        assert_eq!((key("Basic abc"), key("abc")), (None, None));
        assert!(!format!("{:?}", ApiKey("abc".to_owned())).contains("abc"));
    }
}
