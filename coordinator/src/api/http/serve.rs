//! The life of one HTTP request: read, convert, wait for the first event, then answer whole or as a stream. Whoever drops
//! the handler or the response's body (hyper does, when the client goes away) drops the generation, which cancels it.

use super::body;
use super::error::HttpError;
use super::reply::{Reply, reason_word};
use super::request::{self, Kind};
use super::router::Door;
use crate::{ApiError, ApiKey, Finished, Generation, GenerationEvent};
use axum::Json;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use baton_types::RequestId;
use bytes::Bytes;
use futures::stream;
use http::header;
use serde_json::Value;
use std::convert::Infallible;
use std::sync::Arc;

pub(super) async fn answer(door: Arc<Door>, kind: Kind, request: Request) -> Result<Response, HttpError> {
    let request_id = request.extensions().get().copied().unwrap_or_else(RequestId::random);
    let authorization = request.headers().get(header::AUTHORIZATION);
    let api_key = authorization
        .and_then(|value| value.to_str().ok())
        .and_then(ApiKey::bearer);
    let body = body::read(request.into_body(), &door.options).await?;
    let mut asked = request::parse(kind, request_id, &body)?;
    asked.input.api_key = api_key;
    tracing::debug!(
        %request_id, model = asked.input.model, stream = asked.stream, max_tokens = asked.input.max_tokens, bytes = body.len(),
        "http request accepted"
    );
    drop(body);
    let renamed = |error: ApiError| asked.renamed(error.into());
    let mut generation = door.frontend.generate(asked.input.clone()).await.map_err(renamed)?;
    // Until something came, a failure can still be a status.
    let first = match generation.next().await {
        Some(GenerationEvent::Failed(error)) => return Err(renamed(error)),
        None => return Err(HttpError::broken_off()),
        Some(event) => event,
    };
    let reply = Reply::new(Arc::clone(&door.frontend), request_id, generation.model.clone(), &asked);
    if asked.stream {
        streamed(generation, reply, first)
    } else {
        whole(generation, reply, first).await
    }
}

fn reason_of(finished: &Finished) -> Result<&'static str, HttpError> {
    reason_word(finished.reason).ok_or_else(HttpError::cancelled)
}

async fn whole(mut generation: Generation, mut reply: Reply, first: GenerationEvent) -> Result<Response, HttpError> {
    let (mut text, mut entries) = (String::new(), Vec::new());
    let mut next = Some(first);
    while let Some(event) = next {
        match event {
            GenerationEvent::Chunk(chunk) => {
                text.push_str(&chunk.text);
                entries.extend(reply.entries(&chunk));
            }
            GenerationEvent::Finished(finished) => {
                let reason = reason_of(&finished)?;
                log_end(&generation, &finished);
                return Ok(Json(reply.whole(&text, &entries, reason, finished.usage)).into_response());
            }
            GenerationEvent::Failed(error) => return Err(error.into()),
        }
        next = generation.next().await;
    }
    Err(HttpError::broken_off())
}

fn streamed(generation: Generation, reply: Reply, first: GenerationEvent) -> Result<Response, HttpError> {
    if let GenerationEvent::Finished(finished) = &first {
        reason_of(finished)?;
    }
    let state = Streaming {
        generation,
        reply,
        first: Some(first),
        opened: false,
        over: false,
    };
    let events = stream::unfold(state, async |mut state| {
        let frames = state.next_frames().await?;
        Some((Ok::<Bytes, Infallible>(frames.into()), state))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    Ok((headers, Body::from_stream(events)).into_response())
}

struct Streaming {
    generation: Generation,
    reply: Reply,
    /// What was waited for before the status was sent.
    first: Option<GenerationEvent>,
    opened: bool,
    /// The last frame was given.
    over: bool,
}

impl Streaming {
    /// The SSE frames of the next event that has any; `None` after the last.
    async fn next_frames(&mut self) -> Option<String> {
        let mut frames = String::new();
        while frames.is_empty() {
            if self.over {
                return None;
            }
            let event = match self.first.take() {
                Some(event) => Some(event),
                None => self.generation.next().await,
            };
            self.convert(event, &mut frames);
        }
        Some(frames)
    }

    fn convert(&mut self, event: Option<GenerationEvent>, frames: &mut String) {
        if !self.opened {
            self.opened = true;
            frame(frames, self.reply.opening());
        }
        match event {
            Some(GenerationEvent::Chunk(chunk)) => {
                let entries = self.reply.entries(&chunk);
                if !chunk.text.is_empty() || !entries.is_empty() {
                    frame(frames, Some(self.reply.more(&chunk.text, &entries)));
                }
            }
            Some(GenerationEvent::Finished(finished)) => match reason_of(&finished) {
                Ok(reason) => {
                    self.over = true;
                    log_end(&self.generation, &finished);
                    frame(frames, Some(self.reply.end(reason)));
                    frame(frames, self.reply.usage(finished.usage));
                    frames.push_str("data: [DONE]\n\n");
                }
                Err(error) => self.fail(&error, frames),
            },
            Some(GenerationEvent::Failed(error)) => self.fail(&error.into(), frames),
            None => self.fail(&HttpError::broken_off(), frames),
        }
    }

    fn fail(&mut self, error: &HttpError, frames: &mut String) {
        self.over = true;
        metrics::counter!("baton_coordinator_http_broken_streams_total").increment(1);
        tracing::debug!(request_id = %self.generation.request_id, error = error.message, "http stream failed");
        frames.push_str("event: error\n");
        frame(frames, Some(error.to_json()));
    }
}

/// Appends one SSE frame. JSON has no line breaks in it.
fn frame(frames: &mut String, value: Option<Value>) {
    if let Some(value) = value {
        frames.push_str("data: ");
        frames.push_str(&value.to_string());
        frames.push_str("\n\n");
    }
}

fn log_end(generation: &Generation, finished: &Finished) {
    tracing::debug!(
        request_id = %generation.request_id,
        model = generation.model,
        prompt_tokens = finished.usage.prompt_tokens,
        completion_tokens = finished.usage.completion_tokens,
        cached_tokens = finished.usage.cached_tokens,
        ttft_us = finished.timeline.ttft_us,
        "http request answered"
    );
}
