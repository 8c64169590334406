//! Requests in OpenAI's form, converted to [`GenerateInput`]. Baton's own additions: `top_k`, `min_p`,
//! `repetition_penalty`, `ignore_eos`, `cache_salt`, and vLLM's `structured_outputs`.

use super::error::HttpError;
use super::fields::{Fields, wrong};
use super::grammar;
use super::messages;
use crate::GenerateInput;
use baton_types::{InvalidSampling, RequestId, SamplingParams};
use serde_json::{Value, json};

/// OpenAI's fields of chats and completions that are not served yet.
const UNSERVED: [&str; 18] = [
    "audio",
    "best_of",
    "echo",
    "function_call",
    "functions",
    "modalities",
    "n",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "suffix",
    "tool_choice",
    "tools",
    "verbosity",
    "web_search_options",
];

/// What a completion is cut to where the client does not say, as OpenAI has it. A chat goes on to the context's end.
const COMPLETION_TOKENS: u32 = 16;

/// Which of the two endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Completion,
}

/// A request, and the form in which its client wants the answer.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) input: GenerateInput,
    pub(super) kind: Kind,
    pub(super) stream: bool,
    /// A last chunk of a stream tells the usage.
    pub(super) include_usage: bool,
    pub(super) logprobs: bool,
    /// What errors about the grammar name.
    pub(super) grammar_field: Option<&'static str>,
}

impl Asked {
    /// An error, under the name that the field has in this request.
    pub(super) fn renamed(&self, error: HttpError) -> HttpError {
        rename(error, self.grammar_field)
    }
}

/// Behind the door, grammars have fields of their own.
fn rename(mut error: HttpError, grammar_field: Option<&str>) -> HttpError {
    if let (Some(field), Some(own @ ("json_schema" | "regex"))) = (grammar_field, error.param.as_deref()) {
        let problem = error.message.strip_prefix(own).unwrap_or(&error.message);
        error.message = format!("`{field}`{problem}");
        error.param = Some(field.to_owned());
    }
    error
}

/// Converts a request's body.
pub(super) fn parse(kind: Kind, request_id: RequestId, body: &[u8]) -> Result<Asked, HttpError> {
    let mut fields = Fields::of_body(body)?;
    // OpenAI demands a name; here its absence means the only model that is served.
    let model = fields.text("model")?.unwrap_or_default();
    let mut sampling = sampling(&mut fields)?;
    let seed = fields.seed("seed")?;
    let stop = stop(fields.take("stop"))?;
    let cache_salt = fields.text("cache_salt")?.unwrap_or_default();
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let include_usage = stream_options(&mut fields, stream)?;
    fields.only("n", &json!(1))?;
    let asked_grammar = grammar::take(&mut fields)?;
    let grammar_field = asked_grammar.as_ref().map(|asked| asked.field);
    sampling.grammar = asked_grammar.map(|asked| asked.grammar);
    fields.ignore(&["user", "metadata", "store"]);
    let (prompt, max_tokens) = match kind {
        Kind::Chat => {
            sampling.logprobs = chat_logprobs(&mut fields)?;
            let value = fields.take("messages");
            let prompt = messages::chat(fields.required("messages", value)?)?;
            let (old, new) = (
                fields.count("max_tokens", 1)?,
                fields.count("max_completion_tokens", 1)?,
            );
            (prompt, new.or(old))
        }
        Kind::Completion => {
            fields.only("best_of", &json!(1))?;
            fields.only("echo", &json!(false))?;
            sampling.logprobs = fields.count("logprobs", 0)?;
            let value = fields.take("prompt");
            let prompt = messages::prompt(fields.required("prompt", value)?)?;
            (
                prompt,
                Some(fields.count("max_tokens", 1)?.unwrap_or(COMPLETION_TOKENS)),
            )
        }
    };
    fields.finish(&UNSERVED)?;
    sampling
        .validate()
        .map_err(|error| out_of_range(&error, kind, grammar_field))?;
    let logprobs = sampling.logprobs.is_some();
    let input = GenerateInput {
        request_id,
        model,
        prompt,
        sampling,
        seed,
        max_tokens,
        stop,
        timeout: None,
        cache_salt,
        api_key: None,
    };
    Ok(Asked {
        input,
        kind,
        stream,
        include_usage,
        logprobs,
        grammar_field,
    })
}

/// Under the name that the field has at this endpoint.
fn out_of_range(error: &InvalidSampling, kind: Kind, grammar_field: Option<&'static str>) -> HttpError {
    let name = match error.field {
        "logprobs" if kind == Kind::Chat => "top_logprobs",
        "json_schema" | "regex" => grammar_field.unwrap_or(error.field),
        other => other,
    };
    HttpError::field(name, format!("is {}; it must be {}", error.value, error.range))
}

fn sampling(fields: &mut Fields) -> Result<SamplingParams, HttpError> {
    let default = SamplingParams::default();
    Ok(SamplingParams {
        temperature: fields.number("temperature")?.unwrap_or(default.temperature),
        top_p: fields.number("top_p")?.unwrap_or(default.top_p),
        top_k: fields.count("top_k", 0)?.unwrap_or(default.top_k),
        min_p: fields.number("min_p")?.unwrap_or(default.min_p),
        repetition_penalty: fields
            .number("repetition_penalty")?
            .unwrap_or(default.repetition_penalty),
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(default.presence_penalty),
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(default.frequency_penalty),
        logit_bias: logit_bias(fields.take("logit_bias"))?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(default.ignore_eos),
        ..default
    })
}

/// `{"token id": bias}`, in the order of ids.
fn logit_bias(value: Option<Value>) -> Result<Vec<(u32, f32)>, HttpError> {
    let Some(value) = value else { return Ok(Vec::new()) };
    let Value::Object(values) = value else {
        return Err(wrong("logit_bias", "an object", &value));
    };
    let mut biases = Vec::with_capacity(values.len());
    for (token, bias) in values {
        let path = format!("logit_bias.{token}");
        let id = token
            .parse()
            .map_err(|_| HttpError::field(&path, "must be named by a token id"))?;
        let bias = bias.as_f64().ok_or_else(|| wrong(&path, "a number", &bias))?;
        biases.push((id, bias as f32));
    }
    biases.sort_unstable_by_key(|(id, _)| *id);
    Ok(biases)
}

/// A text or several. Their number and length are bounded behind the door, for gRPC too.
fn stop(value: Option<Value>) -> Result<Vec<String>, HttpError> {
    match value {
        None => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![text]),
        Some(Value::Array(values)) => {
            let text = |(at, value)| match value {
                Value::String(text) => Ok(text),
                other => Err(wrong(&format!("stop[{at}]"), "text", &other)),
            };
            values.into_iter().enumerate().map(text).collect()
        }
        Some(other) => Err(wrong("stop", "text or an array of texts", &other)),
    }
}

fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool, HttpError> {
    let Some(value) = fields.take("stream_options") else {
        return Ok(false);
    };
    if !stream {
        return Err(HttpError::field(
            "stream_options",
            "is allowed only where `stream` is true",
        ));
    }
    let mut options = Fields::of_value("stream_options", value)?;
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    options.finish(&["include_obfuscation"])?;
    Ok(include_usage)
}

/// `logprobs` says whether, `top_logprobs` how many rivals.
fn chat_logprobs(fields: &mut Fields) -> Result<Option<u32>, HttpError> {
    let (wanted, rivals) = (
        fields.boolean("logprobs")?.unwrap_or(false),
        fields.count("top_logprobs", 0)?,
    );
    match (wanted, rivals) {
        (false, Some(_)) => Err(HttpError::field(
            "top_logprobs",
            "is allowed only where `logprobs` is true",
        )),
        (false, None) => Ok(None),
        (true, rivals) => Ok(Some(rivals.unwrap_or(0))),
    }
}
