//! Between the wire and [`crate::Frontend`].

use crate::{ApiCode, ApiError, Chunk, Finished, GenerateInput, PathFallback, PromptInput, Timeline};
use baton_proto::v1;
use baton_text::Message;
use baton_types::{RequestId, SamplingParams};
use std::time::Duration;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// A failure as a status: code, message, the field or the time to wait as standard error details, and the latter also as
/// `retry-after-ms` metadata for clients without them.
pub(super) fn status(error: ApiError) -> Status {
    let code = match error.code {
        ApiCode::InvalidArgument => Code::InvalidArgument,
        ApiCode::Unauthenticated => Code::Unauthenticated,
        ApiCode::NotFound => Code::NotFound,
        ApiCode::ResourceExhausted => Code::ResourceExhausted,
        ApiCode::Unavailable => Code::Unavailable,
        ApiCode::DeadlineExceeded => Code::DeadlineExceeded,
        ApiCode::Internal => Code::Internal,
    };
    let mut details = ErrorDetails::new();
    if let Some(field) = &error.field {
        details.add_bad_request_violation(field.as_ref(), error.message.as_str());
    }
    if let Some(wait) = error.retry_after {
        details.set_retry_info(Some(wait));
    }
    let mut status = Status::with_error_details(code, error.message, details);
    if let Some(wait) = error.retry_after {
        let ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        status.metadata_mut().insert("retry-after-ms", MetadataValue::from(ms));
    }
    status
}

/// Reads a request.
pub(super) fn generate_input(request_id: RequestId, wire: v1::GenerateRequest) -> Result<GenerateInput, ApiError> {
    use v1::generate_request::Input;
    let prompt = match wire.input {
        Some(Input::Prompt(text)) => PromptInput::Text(text),
        Some(Input::PromptTokens(tokens)) => PromptInput::Tokens(tokens.ids),
        Some(Input::Messages(messages)) => PromptInput::Chat(chat(messages)),
        None => {
            return Err(ApiError::invalid(
                "prompt",
                "one of prompt, prompt_tokens and messages must be set",
            ));
        }
    };
    let sampling = wire.sampling.unwrap_or_default();
    let (seed, max_tokens) = (sampling.seed, sampling.max_tokens);
    let sampling =
        SamplingParams::try_from(sampling).map_err(|error| ApiError::invalid(error.field(), error.to_string()))?;
    let timeout = wire.timeout_ms.map(Duration::from_millis);
    Ok(GenerateInput {
        request_id,
        model: wire.model,
        prompt,
        sampling,
        seed,
        max_tokens,
        stop: wire.stop,
        timeout,
        cache_salt: wire.cache_salt,
        api_key: None,
    })
}

/// Reads what is to be tokenized.
pub(super) fn tokenize_input(input: Option<v1::tokenize_request::Input>) -> Result<PromptInput, ApiError> {
    use v1::tokenize_request::Input;
    match input {
        Some(Input::Text(text)) => Ok(PromptInput::Text(text)),
        Some(Input::Messages(messages)) => Ok(PromptInput::Chat(chat(messages))),
        None => Err(ApiError::invalid("text", "one of text and messages must be set")),
    }
}

fn chat(messages: v1::ChatMessages) -> Vec<Message> {
    let messages = messages.messages.into_iter();
    messages
        .map(|message| Message {
            role: message.role,
            content: message.content,
        })
        .collect()
}

/// A chunk as a message.
pub(super) fn chunk(request_id: &str, chunk: Chunk) -> v1::GenerateResponse {
    v1::GenerateResponse {
        request_id: request_id.to_owned(),
        text: chunk.text,
        tokens: chunk.tokens,
        logprobs: chunk.logprobs.into_iter().map(Into::into).collect(),
        first_index: chunk.first_index,
        ..v1::GenerateResponse::default()
    }
}

/// The end as a message.
pub(super) fn finished(request_id: &str, finished: Finished) -> v1::GenerateResponse {
    v1::GenerateResponse {
        request_id: request_id.to_owned(),
        first_index: finished.usage.completion_tokens,
        finish_reason: v1::FinishReason::from(finished.reason).into(),
        usage: Some(v1::Usage {
            prompt_tokens: finished.usage.prompt_tokens,
            completion_tokens: finished.usage.completion_tokens,
            cached_tokens: finished.usage.cached_tokens,
        }),
        timeline: Some(timeline(finished.timeline)),
        ..v1::GenerateResponse::default()
    }
}

/// Figures of a request that ended as a message.
pub(super) fn timeline(timeline: Timeline) -> v1::Timeline {
    v1::Timeline {
        queue_us: timeline.queue_us,
        prefill_us: timeline.prefill_us,
        prefill_tokens: timeline.prefill_tokens,
        cached_tokens: timeline.cached_tokens,
        held_tokens: timeline.held_tokens,
        handover_bytes: timeline.handover_bytes,
        handover_path: timeline.handover_path,
        exposed_us: timeline.exposed_us,
        ttft_us: timeline.ttft_us,
        decode_us_per_token: timeline.decode_us_per_token,
        prefill_node: timeline.prefill_node,
        decode_node: timeline.decode_node,
        attempts: timeline.attempts,
        reserve_us: timeline.reserve_us,
        fallbacks: timeline.fallbacks,
        path_fallbacks: timeline.path_fallbacks.into_iter().map(path_fallback).collect(),
        handover_bytes_per_second: timeline.handover_bytes_per_second,
    }
}

fn path_fallback(fallback: PathFallback) -> v1::PathFallback {
    let PathFallback { from, to, reason } = fallback;
    v1::PathFallback { from, to, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_says_what_and_when() {
        let full = ApiError::new(ApiCode::ResourceExhausted, "full").retry_after(Duration::from_millis(250));
        let full = status(full);
        assert_eq!(full.code(), Code::ResourceExhausted);
        assert_eq!(full.metadata().get("retry-after-ms").unwrap(), "250");
        assert_eq!(
            full.get_details_retry_info().unwrap().retry_delay,
            Some(Duration::from_millis(250))
        );
        let bad = status(ApiError::invalid("max_tokens", "max_tokens is too large"));
        assert_eq!(
            bad.get_details_bad_request().unwrap().field_violations[0].field,
            "max_tokens"
        );
    }

    #[test]
    fn a_request_without_input_or_out_of_range_is_refused_by_field() {
        let refused = |wire| generate_input(RequestId(1), wire).unwrap_err();
        assert_eq!(refused(v1::GenerateRequest::default()).field.as_deref(), Some("prompt"));
        let sampling = v1::SamplingParams {
            temperature: Some(-1.0),
            ..Default::default()
        };
        let input = Some(v1::generate_request::Input::Prompt("x".into()));
        let wire = v1::GenerateRequest {
            input,
            sampling: Some(sampling),
            ..Default::default()
        };
        let error = refused(wire);
        assert_eq!(error.field.as_deref(), Some("temperature"));
        assert!(error.message.contains("-1"), "{error}");
    }

    #[test]
    fn absent_seed_and_limit_stay_absent() {
        let input = Some(v1::generate_request::Input::Prompt("x".into()));
        let wire = v1::GenerateRequest {
            input,
            timeout_ms: Some(70),
            cache_salt: "mine".into(),
            ..Default::default()
        };
        let read = generate_input(RequestId(1), wire).unwrap();
        assert_eq!(
            (read.seed, read.max_tokens, read.timeout, read.cache_salt.as_str()),
            (None, None, Some(Duration::from_millis(70)), "mine")
        );
    }
}
