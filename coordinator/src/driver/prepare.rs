//! From what a client sent to what nodes compute: template, tokens, limits, defaults. Every refusal names the field.

use crate::membership::Model;
use crate::{ApiCode, ApiError, GenerateInput, PromptInput};
use baton_types::{SamplingParams, fill_random};
use std::time::Duration;

const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;
const SALT_BYTES_MAX: usize = 256;

/// A request that nodes can compute.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) prompt: Vec<u32>,
    pub(super) sampling: SamplingParams,
    pub(super) stop: Vec<String>,
    pub(super) timeout: Duration,
    pub(super) cache_salt: String,
}

/// Bounds on what clients may ask for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Prompt and answer together.
    pub(super) context_tokens: u32,
    pub(super) timeout_default: Duration,
    pub(super) timeout_max: Duration,
}

/// Checks everything and fills in defaults. `prompt` is `input.prompt` tokenized.
pub(super) fn prepare(
    model: &Model,
    input: GenerateInput,
    prompt: Vec<u32>,
    bounds: Bounds,
) -> Result<Prepared, ApiError> {
    let field = prompt_field(&input.prompt);
    let (name, context) = (&model.card.name, bounds.context_tokens as usize);
    if prompt.is_empty() {
        return Err(ApiError::invalid(
            field,
            format!("{field} is empty: it must have at least one token"),
        ));
    }
    if prompt.len() >= context {
        let message = format!(
            "{field} has {} tokens, but the context of {name} holds {context}, of which the answer needs at least one",
            prompt.len()
        );
        return Err(ApiError::invalid(field, message));
    }
    let left = u32::try_from(context - prompt.len()).unwrap_or(u32::MAX);
    if let Some(asked) = input.max_tokens.filter(|asked| *asked > left) {
        let message = format!(
            "max_tokens is {asked}, but {left} are left of the context of {context} tokens after a prompt of {}",
            prompt.len()
        );
        return Err(ApiError::invalid("max_tokens", message));
    }
    let sampling = SamplingParams {
        seed: input.seed.unwrap_or_else(random_seed),
        max_tokens: input.max_tokens.unwrap_or(left),
        ..input.sampling
    };
    sampling
        .validate()
        .map_err(|error| ApiError::invalid(error.field, error.to_string()))?;
    if let Some((token, _)) = sampling.logit_bias.iter().find(|(token, _)| *token >= model.card.vocab) {
        let message = format!(
            "logit_bias names token {token}, but {name} has {} tokens",
            model.card.vocab
        );
        return Err(ApiError::invalid("logit_bias", message));
    }
    check_grammar(model, &sampling)?;
    check_stops(&input.stop)?;
    if input.cache_salt.len() > SALT_BYTES_MAX {
        let message = format!(
            "cache_salt has {} bytes; at most {SALT_BYTES_MAX} are allowed",
            input.cache_salt.len()
        );
        return Err(ApiError::invalid("cache_salt", message));
    }
    let timeout = input.timeout.unwrap_or(bounds.timeout_default);
    if timeout.is_zero() || timeout > bounds.timeout_max {
        let message = format!(
            "timeout_ms must be above 0 and at most {}",
            bounds.timeout_max.as_millis()
        );
        return Err(ApiError::invalid("timeout_ms", message));
    }
    Ok(Prepared {
        prompt,
        sampling,
        stop: input.stop,
        timeout,
        cache_salt: input.cache_salt,
    })
}

/// Token ids of an input.
pub(super) fn tokenize(model: &Model, input: &PromptInput) -> Result<Vec<u32>, ApiError> {
    let field = prompt_field(input);
    let refused = |error: &dyn std::fmt::Display| ApiError::invalid(field, error.to_string());
    match input {
        PromptInput::Text(text) => model.tokenizer.encode(text, true).map_err(|error| refused(&error)),
        PromptInput::Tokens(tokens) => match tokens.iter().find(|token| **token >= model.card.vocab) {
            None => Ok(tokens.clone()),
            Some(token) => {
                let (name, vocab) = (&model.card.name, model.card.vocab);
                Err(ApiError::invalid(
                    field,
                    format!("{field} has id {token}, but {name} has {vocab} tokens"),
                ))
            }
        },
        PromptInput::Chat(messages) => {
            if messages.is_empty() {
                return Err(ApiError::invalid(
                    field,
                    "messages is empty: it must have at least one message",
                ));
            }
            let Some(template) = &model.template else {
                let message = format!("{} has no chat template; use a plain prompt", model.card.name);
                return Err(ApiError::invalid(field, message));
            };
            model
                .tokenizer
                .encode_chat(template, messages, true)
                .map_err(|error| refused(&error))
        }
    }
}

fn prompt_field(input: &PromptInput) -> &'static str {
    match input {
        PromptInput::Text(_) => "prompt",
        PromptInput::Tokens(_) => "prompt_tokens",
        PromptInput::Chat(_) => "messages",
    }
}

/// Compiles it as nodes will. Takes its time: not for a thread that others' streams run on.
fn check_grammar(model: &Model, sampling: &SamplingParams) -> Result<(), ApiError> {
    let Some(grammar) = &sampling.grammar else {
        return Ok(());
    };
    let checked = model.grammars.matcher(grammar, &[]);
    let field = grammar.field();
    checked
        .and_then(|mut matcher| matcher.allowed())
        .map(drop)
        .map_err(|error| ApiError::invalid(field, format!("{field}: {error}")))
}

fn check_stops(stops: &[String]) -> Result<(), ApiError> {
    if stops.len() > STOPS_MAX {
        let message = format!("stop has {} strings; at most {STOPS_MAX} are allowed", stops.len());
        return Err(ApiError::invalid("stop", message));
    }
    match stops.iter().find(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX) {
        None => Ok(()),
        Some(stop) => {
            let message = format!(
                "stop has a string of {} bytes; each must have 1 to {STOP_BYTES_MAX}",
                stop.len()
            );
            Err(ApiError::invalid("stop", message))
        }
    }
}

fn random_seed() -> u64 {
    let mut bytes = [0; 8];
    fill_random(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// No such model; says which there are.
pub(super) fn unknown_model(name: &str, served: &[String]) -> ApiError {
    let there_are = if served.is_empty() {
        "none is".to_owned()
    } else {
        format!("served: {}", served.join(", "))
    };
    let mut error = ApiError::new(ApiCode::NotFound, format!("model `{name}` is not served; {there_are}"));
    error.field = Some("model".into());
    error
}
