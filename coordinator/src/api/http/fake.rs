//! A [`Frontend`] that says what a test wrote down for it.

use crate::{
    ApiCode, ApiError, Chunk, Finished, Frontend, GenerateInput, Generation, GenerationEvent, ModelInfo, PromptInput,
    Timeline, Usage,
};
use baton_types::{FinishReason, RequestId, TokenLogprobs};
use futures::future::BoxFuture;
use std::collections::VecDeque;
use std::sync::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// What becomes of one request.
pub(super) enum Script {
    Refuse(ApiError),
    /// These events; then the stream ends.
    Events(Vec<GenerationEvent>),
    /// These events; then nothing until the client goes away.
    Hang(Vec<GenerationEvent>),
}

#[derive(Default)]
pub(super) struct Fake {
    scripts: Mutex<VecDeque<Script>>,
    seen: Mutex<Vec<GenerateInput>>,
    held: Mutex<Vec<mpsc::Sender<GenerationEvent>>>,
    /// Cancelled when a generation is dropped.
    pub(super) dropped: CancellationToken,
    /// Cancelled when a request has come.
    pub(super) begun: CancellationToken,
}

impl Fake {
    pub(super) fn with(script: Script) -> Self {
        Self {
            scripts: Mutex::new(VecDeque::from([script])),
            ..Self::default()
        }
    }

    pub(super) fn seen(&self) -> Vec<GenerateInput> {
        self.seen.lock().unwrap().clone()
    }
}

impl Frontend for Fake {
    fn generate(&self, input: GenerateInput) -> BoxFuture<'_, Result<Generation, ApiError>> {
        self.seen.lock().unwrap().push(input.clone());
        self.begun.cancel();
        let script = self
            .scripts
            .lock()
            .unwrap()
            .pop_front()
            .expect("a test scripts each request");
        Box::pin(async move {
            let (events, hang) = match script {
                Script::Refuse(error) => return Err(error),
                Script::Events(events) => (events, false),
                Script::Hang(events) => (events, true),
            };
            let (sender, receiver) = mpsc::channel(events.len().max(1));
            for event in events {
                sender.try_send(event).expect("there is room for all");
            }
            if hang {
                self.held.lock().unwrap().push(sender);
            }
            let guard = self.dropped.clone().drop_guard();
            Ok(Generation::new(
                input.request_id,
                "full-name".into(),
                5,
                receiver,
                Some(guard),
            ))
        })
    }

    fn cancel(&self, _: RequestId) -> bool {
        false
    }

    fn tokenize(&self, _: &str, _: &PromptInput) -> Result<Vec<u32>, ApiError> {
        Err(ApiError::new(ApiCode::Internal, "the HTTP door does not tokenize"))
    }

    fn token_bytes(&self, _: &str, token: u32) -> Vec<u8> {
        vec![u8::try_from(token).unwrap_or(b'?')]
    }

    fn models(&self) -> Vec<ModelInfo> {
        vec![ModelInfo {
            id: "org/model".into(),
            context_tokens: 128,
            stub: true,
            created: 7,
        }]
    }
}

/// A chunk whose tokens are its bytes, each with a rival `?`.
pub(super) fn chunk(text: &str, first_index: u32) -> GenerationEvent {
    let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
    let logprobs = TokenLogprobs {
        logprob: -0.5,
        top: vec![(63, f32::NEG_INFINITY)],
    };
    GenerationEvent::Chunk(Chunk {
        text: text.into(),
        logprobs: vec![logprobs; tokens.len()],
        tokens,
        first_index,
    })
}

pub(super) fn finished(reason: FinishReason) -> GenerationEvent {
    let usage = Usage {
        prompt_tokens: 5,
        completion_tokens: 4,
        cached_tokens: 3,
    };
    GenerationEvent::Finished(Finished {
        reason,
        usage,
        timeline: Timeline::default(),
    })
}

pub(super) fn failed(code: ApiCode) -> GenerationEvent {
    GenerationEvent::Failed(ApiError::new(code, "it broke"))
}
