//! Answers in OpenAI's form, whole and in pieces.

use super::request::Kind;
use crate::{Chunk, Frontend, Usage};
use baton_types::{FinishReason, RequestId};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// What OpenAI writes for a probability of zero; JSON has no infinity.
const LOGPROB_MIN: f32 = -9999.0;

/// What all pieces of one answer share.
pub(super) struct Reply {
    frontend: Arc<dyn Frontend>,
    kind: Kind,
    id: String,
    /// Seconds since 1970.
    created: u64,
    model: String,
    logprobs: bool,
    include_usage: bool,
    /// Characters of the tokens so far, for a completion's `text_offset`.
    characters: usize,
}

/// One token and its log probability.
struct Scored {
    text: String,
    bytes: Vec<u8>,
    logprob: f32,
}

/// A token, and its strongest rivals.
pub(super) struct Entry {
    token: Scored,
    top: Vec<Scored>,
    /// Where the token begins in the answer, in characters.
    offset: usize,
}

impl Reply {
    pub(super) fn new(
        frontend: Arc<dyn Frontend>,
        request_id: RequestId,
        model: String,
        asked: &super::request::Asked,
    ) -> Self {
        let prefix = match asked.kind {
            Kind::Chat => "chatcmpl",
            Kind::Completion => "cmpl",
        };
        Self {
            frontend,
            kind: asked.kind,
            id: format!("{prefix}-{request_id}"),
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            model,
            logprobs: asked.logprobs,
            include_usage: asked.include_usage,
            characters: 0,
        }
    }

    fn scored(&self, token: u32, logprob: f32) -> Scored {
        let bytes = self.frontend.token_bytes(&self.model, token);
        Scored {
            text: String::from_utf8_lossy(&bytes).into_owned(),
            bytes,
            logprob: logprob.max(LOGPROB_MIN),
        }
    }

    /// The log probabilities of a chunk's tokens; none where the client wants none.
    pub(super) fn entries(&mut self, chunk: &Chunk) -> Vec<Entry> {
        if !self.logprobs {
            return Vec::new();
        }
        let scores = chunk.tokens.iter().zip(&chunk.logprobs);
        let mut entries = Vec::with_capacity(chunk.tokens.len());
        for (token, logprobs) in scores {
            let top = logprobs
                .top
                .iter()
                .map(|(rival, logprob)| self.scored(*rival, *logprob))
                .collect();
            let token = self.scored(*token, logprobs.logprob);
            let offset = self.characters;
            // A character belongs to the token that has its first byte.
            self.characters += token.bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count();
            entries.push(Entry { token, top, offset });
        }
        entries
    }

    fn logprobs_form(&self, entries: &[Entry]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        match self.kind {
            Kind::Chat => {
                let scored = |s: &Scored| json!({"token": s.text, "logprob": s.logprob, "bytes": s.bytes});
                let content = entries.iter().map(|entry| {
                    let mut form = scored(&entry.token);
                    form["top_logprobs"] = entry.top.iter().map(scored).collect();
                    form
                });
                json!({"content": content.collect::<Value>(), "refusal": null})
            }
            Kind::Completion => {
                let top = |entry: &Entry| {
                    entry
                        .top
                        .iter()
                        .map(|s| (s.text.clone(), json!(s.logprob)))
                        .collect::<Value>()
                };
                json!({
                    "tokens": entries.iter().map(|e| json!(e.token.text)).collect::<Value>(),
                    "token_logprobs": entries.iter().map(|e| json!(e.token.logprob)).collect::<Value>(),
                    "top_logprobs": entries.iter().map(top).collect::<Value>(),
                    "text_offset": entries.iter().map(|e| json!(e.offset)).collect::<Value>(),
                })
            }
        }
    }

    fn envelope(&self, object: &'static str, choices: Value) -> Value {
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices})
    }

    /// A whole answer.
    pub(super) fn whole(&self, text: &str, entries: &[Entry], reason: &'static str, usage: Usage) -> Value {
        let logprobs = self.logprobs_form(entries);
        let mut answer = match self.kind {
            Kind::Chat => {
                let message = json!({"role": "assistant", "content": text, "refusal": null});
                let choice = json!({"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason});
                self.envelope("chat.completion", json!([choice]))
            }
            Kind::Completion => {
                let choice = json!({"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason});
                self.envelope("text_completion", json!([choice]))
            }
        };
        answer["usage"] = usage_form(usage);
        answer
    }

    fn piece(&self, choices: Value) -> Value {
        let object = match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Completion => "text_completion",
        };
        let mut piece = self.envelope(object, choices);
        if self.include_usage {
            piece["usage"] = Value::Null;
        }
        piece
    }

    /// What a stream begins with: a chat names the speaker.
    pub(super) fn opening(&self) -> Option<Value> {
        match self.kind {
            Kind::Chat => {
                let delta = json!({"role": "assistant", "content": "", "refusal": null});
                let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": null});
                Some(self.piece(json!([choice])))
            }
            Kind::Completion => None,
        }
    }

    /// More text of a stream.
    pub(super) fn more(&self, text: &str, entries: &[Entry]) -> Value {
        let logprobs = self.logprobs_form(entries);
        let choice = match self.kind {
            Kind::Chat => json!({"index": 0, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": null}),
            Kind::Completion => json!({"index": 0, "text": text, "logprobs": logprobs, "finish_reason": null}),
        };
        self.piece(json!([choice]))
    }

    /// The end of a stream's text.
    pub(super) fn end(&self, reason: &'static str) -> Value {
        let choice = match self.kind {
            Kind::Chat => json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": reason}),
            Kind::Completion => json!({"index": 0, "text": "", "logprobs": null, "finish_reason": reason}),
        };
        self.piece(json!([choice]))
    }

    /// The piece behind the end that tells the usage, where it is wanted.
    pub(super) fn usage(&self, usage: Usage) -> Option<Value> {
        self.include_usage.then(|| {
            let mut piece = self.piece(json!([]));
            piece["usage"] = usage_form(usage);
            piece
        })
    }
}

fn usage_form(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}

/// OpenAI's word; `None` for an answer that was cancelled, which is no answer.
pub(super) fn reason_word(reason: FinishReason) -> Option<&'static str> {
    match reason {
        FinishReason::Stop => Some("stop"),
        FinishReason::Length => Some("length"),
        FinishReason::Cancelled => None,
    }
}
