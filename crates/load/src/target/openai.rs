//! OpenAI's interface over HTTP/1.1, streamed: Baton's own door, vLLM, llama.cpp's server and whatever else speaks it. Servers
//! differ in which additions they take and in how they say how many tokens a piece has, hence the dialects.

use super::ServedModel;
use super::events::Events;
use super::pick::pick;
use crate::error::cause;
use crate::{Failure, Frame, LoadError, Observed, Planned, Prompt};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use std::str::FromStr;
use std::time::Duration;
use tokio::time::Instant;

/// Which additions to OpenAI's form a server takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Baton: `ignore_eos`.
    Baton,
    /// vLLM: `ignore_eos`, `min_tokens`, and usage with every piece.
    Vllm,
    /// llama.cpp: `ignore_eos`, and counts with every piece.
    LlamaServer,
    /// Nothing beyond OpenAI's own fields: answers may end early, which counts as an error.
    Plain,
}

impl Dialect {
    const ALL: [(&'static str, Self); 4] = [
        ("baton", Self::Baton),
        ("vllm", Self::Vllm),
        ("llama-server", Self::LlamaServer),
        ("plain", Self::Plain),
    ];

    /// By what `/v1/models` says of the owner.
    fn of(owner: &str) -> Self {
        match owner {
            "baton" => Self::Baton,
            "vllm" => Self::Vllm,
            "llamacpp" => Self::LlamaServer,
            _ => Self::Plain,
        }
    }
}

impl FromStr for Dialect {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|(name, _)| *name == text);
        known
            .map(|(_, dialect)| dialect)
            .ok_or_else(|| format!("`{text}` is no dialect: expected baton, vllm, llama-server or plain"))
    }
}

/// A server that speaks OpenAI's HTTP interface.
#[derive(Debug, Clone)]
pub struct OpenAiTarget {
    client: Client<HttpConnector, Full<Bytes>>,
    /// Without a slash at its end, and without `/v1`.
    base: String,
    /// What it takes beyond OpenAI's fields; found from its list of models, to be set where that is wrong.
    pub dialect: Dialect,
    pub(super) model: ServedModel,
}

impl OpenAiTarget {
    /// Connects to `http://HOST:PORT`, with or without `/v1` behind it.
    ///
    /// # Errors
    /// Where nobody answers there, or the model is not served.
    pub async fn connect(url: &str, model: Option<&str>) -> Result<Self, LoadError> {
        if url.starts_with("https://") {
            return Err(LoadError::Encrypted { given: url.to_owned() });
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_secs(5)));
        let client = Client::builder(TokioExecutor::new()).build(connector);
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let request = Request::get(format!("{base}/v1/models"))
            .body(Full::default())
            .map_err(|_| LoadError::Address { given: url.to_owned() })?;
        let answer = client.request(request).await.map_err(|error| LoadError::Connect {
            address: base.clone(),
            reason: cause(&error),
        })?;
        let wrong = |reason: String| LoadError::Models {
            address: base.clone(),
            reason,
        };
        let status = answer.status();
        let body = answer.into_body().collect().await;
        let body = body.map_err(|error| wrong(error.to_string()))?.to_bytes();
        let listed: Value = serde_json::from_slice(&body).map_err(|error| wrong(format!("{status}, {error}")))?;
        let models = listed["data"]
            .as_array()
            .ok_or_else(|| wrong(format!("{status}, no `data`")))?;
        let owner = models
            .first()
            .map(|model| model["owned_by"].as_str().unwrap_or_default());
        let dialect = Dialect::of(owner.unwrap_or_default());
        let served = models.iter().map(|model| ServedModel {
            id: model["id"].as_str().unwrap_or_default().to_owned(),
            context_tokens: model["max_model_len"]
                .as_u64()
                .and_then(|tokens| tokens.try_into().ok()),
        });
        let model = pick(&base, served.collect(), model)?;
        Ok(Self {
            client,
            base,
            dialect,
            model,
        })
    }

    fn body(&self, prompt: Prompt, tokens: u32) -> Value {
        let mut body = json!({
            "model": self.model.id, "max_tokens": tokens, "temperature": 0.0, "stream": true,
            "stream_options": {"include_usage": true},
        });
        body["prompt"] = match prompt {
            Prompt::Tokens(ids) => json!(ids),
            Prompt::Text(text) => json!(text),
        };
        match self.dialect {
            Dialect::Plain => {}
            Dialect::Baton => body["ignore_eos"] = json!(true),
            Dialect::Vllm => {
                body["ignore_eos"] = json!(true);
                body["min_tokens"] = json!(tokens);
                body["stream_options"]["continuous_usage_stats"] = json!(true);
            }
            Dialect::LlamaServer => {
                body["ignore_eos"] = json!(true);
                body["timings_per_token"] = json!(true);
            }
        }
        body
    }

    /// Sends a request and reads its answer to the end; times are from `begun`.
    pub async fn send(self, planned: Planned, begun: Instant) -> Observed {
        let mut observed = Observed::of(&planned);
        let body = self.body(planned.prompt, planned.output).to_string();
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("{}/v1/completions", self.base))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::from(body));
        observed.dispatch_delay = begun.elapsed().saturating_sub(planned.at);
        let outcome = match request {
            Ok(request) => self.read(request, &mut observed, begun).await,
            Err(error) => Err(Failure::Error(error.to_string())),
        };
        observed.ends(begun.elapsed(), outcome.err());
        observed
    }

    async fn read(
        &self,
        request: Request<Full<Bytes>>,
        observed: &mut Observed,
        begun: Instant,
    ) -> Result<(), Failure> {
        let broken = |error: &dyn std::error::Error| Failure::Error(error.to_string());
        let answer = self.client.request(request).await;
        let answer = answer.map_err(|error| Failure::Error(cause(&error)))?;
        if !answer.status().is_success() {
            return Err(refusal(answer).await);
        }
        let (mut body, mut events, mut pieces) = (answer.into_body(), Events::default(), Pieces::default());
        while let Some(part) = body.frame().await {
            let part = part.map_err(|error| broken(&error))?;
            let Some(bytes) = part.data_ref() else { continue };
            let at = begun.elapsed();
            for data in events.take(bytes) {
                pieces.take(&data, at)?;
            }
        }
        pieces.close()?;
        if let Some(tokens) = pieces.prompt_tokens {
            observed.prompt_tokens = tokens;
        }
        observed.frames = pieces.frames();
        Ok(())
    }
}

/// What a stream's pieces said.
#[derive(Debug, Default)]
struct Pieces {
    /// When each came that may have tokens, and how many there were by then in all, where it says so.
    came: Vec<(Duration, Option<u32>)>,
    prompt_tokens: Option<u32>,
    completion_tokens: Option<u32>,
    finished: bool,
}

impl Pieces {
    fn take(&mut self, data: &str, at: Duration) -> Result<(), Failure> {
        if data == "[DONE]" {
            return Ok(());
        }
        let wrong = |_| {
            Failure::Error(format!(
                "a piece that is no JSON: {}",
                data.chars().take(200).collect::<String>()
            ))
        };
        let piece: Value = serde_json::from_str(data).map_err(wrong)?;
        if let Some(error) = piece.get("error").filter(|error| !error.is_null()) {
            return Err(Failure::Error(error["message"].as_str().unwrap_or(data).to_owned()));
        }
        let count = |value: &Value| value.as_u64().and_then(|count| u32::try_from(count).ok());
        let usage = &piece["usage"];
        self.prompt_tokens = count(&usage["prompt_tokens"]).or(self.prompt_tokens);
        let so_far = count(&usage["completion_tokens"]).or_else(|| count(&piece["timings"]["predicted_n"]));
        self.completion_tokens = so_far.or(self.completion_tokens);
        let Some(choice) = piece["choices"].get(0) else {
            return Ok(());
        };
        let ends = !choice["finish_reason"].is_null();
        self.finished |= ends;
        let is_empty = choice["text"].as_str().unwrap_or_default().is_empty();
        // A last piece without text only says why it ends, unless its count shows that tokens without text came with it.
        let told = self.came.last().and_then(|(_, before)| *before);
        let counts_more = matches!((told, so_far), (Some(before), Some(now)) if now > before);
        if !(ends && is_empty) || counts_more {
            self.came.push((at, so_far));
        }
        Ok(())
    }

    fn close(&self) -> Result<(), Failure> {
        match (self.finished, self.came.is_empty()) {
            (true, false) => Ok(()),
            (true, true) => Err(Failure::Error("the answer has no token".to_owned())),
            (false, _) => Err(Failure::Error("the stream ended without a finish reason".to_owned())),
        }
    }

    /// Counts that pieces do not tell themselves are dealt out evenly: one each, and what the usage says beyond that over all but
    /// the first.
    fn frames(&self) -> Vec<Frame> {
        let all = self.completion_tokens.unwrap_or(0).max(self.came.len() as u32);
        let told = self.came.iter().all(|(_, so_far)| so_far.is_some());
        let later = (self.came.len() as u32).saturating_sub(1).max(1);
        let mut before = 0;
        let frame = |(index, (at, so_far)): (usize, &(Duration, Option<u32>))| {
            let by_now = match so_far {
                Some(so_far) if told => *so_far,
                // The last piece has all that is left, also where it is the only one.
                Some(_) | None if index + 1 == self.came.len() => all,
                Some(_) | None => 1 + (u64::from(all - 1) * index as u64 / u64::from(later)) as u32,
            };
            let tokens = by_now.saturating_sub(before);
            before = before.max(by_now);
            Frame { at: *at, tokens }
        };
        let frames = self.came.iter().enumerate().map(frame);
        frames.filter(|frame| frame.tokens > 0).collect()
    }
}

async fn refusal<B: BodyExt>(answer: Response<B>) -> Failure {
    let status = answer.status();
    let hint = answer.headers().get(header::RETRY_AFTER);
    let hint = hint.and_then(|seconds| seconds.to_str().ok()?.parse().ok());
    let retry_after = hint.map(Duration::from_secs);
    let body = answer.into_body().collect().await.map(|body| body.to_bytes());
    let text = String::from_utf8_lossy(&body.unwrap_or_default()).into_owned();
    let message = serde_json::from_str::<Value>(&text).ok();
    let message = message.and_then(|value| Some(value["error"]["message"].as_str()?.to_owned()));
    let reason = format!("{} [{status}]", message.unwrap_or(text));
    match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Failure::Refused { reason, retry_after },
        _ => Failure::Error(reason),
    }
}
