//! Requests over the gRPC door, with the checks that every stream must pass.

use anyhow::{Context, Result, bail, ensure};
use baton_proto::v1;
use baton_proto::v1::generate_request::Input;
use baton_proto::v1::inference_client::InferenceClient;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_stream::StreamExt;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

/// One request.
#[derive(Clone, Debug)]
pub struct Ask {
    /// What is sent.
    pub request: v1::GenerateRequest,
}

impl Ask {
    /// Greedy tokens after a prompt, end of sequence ignored.
    pub fn greedy(prompt: &str, tokens: u32) -> Self {
        let sampling = v1::SamplingParams {
            temperature: Some(0.0),
            max_tokens: Some(tokens),
            ignore_eos: true,
            ..v1::SamplingParams::default()
        };
        let input = Some(Input::Prompt(prompt.to_owned()));
        Self {
            request: v1::GenerateRequest {
                input,
                sampling: Some(sampling),
                ..v1::GenerateRequest::default()
            },
        }
    }

    /// Greedy tokens after token ids.
    pub fn greedy_ids(ids: Vec<u32>, tokens: u32) -> Self {
        let mut ask = Self::greedy("", tokens);
        ask.request.input = Some(Input::PromptTokens(v1::TokenIds { ids }));
        ask
    }

    /// Drawn at temperature 0.9 and top-p 0.95 with this seed.
    pub fn sampled(prompt: &str, tokens: u32, seed: u64) -> Self {
        let mut ask = Self::greedy(prompt, tokens);
        let sampling = ask.request.sampling.get_or_insert_default();
        (sampling.temperature, sampling.top_p, sampling.seed) = (Some(0.9), Some(0.95), Some(seed));
        ask
    }
}

/// A whole answer.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Generated token ids.
    pub tokens: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Why it ended.
    pub finish: i32,
    /// Token counts.
    pub usage: v1::Usage,
    /// What happened when and where.
    pub timeline: v1::Timeline,
    /// When each message with tokens came, and how many there were in it.
    pub arrivals: Vec<(Instant, usize)>,
}

impl Answer {
    /// The times between messages with tokens, of those that came after `since`.
    pub fn gaps(&self, since: Option<Instant>) -> impl Iterator<Item = Duration> {
        let later = move |pair: &&[(Instant, usize)]| since.is_none_or(|since| pair[1].0 > since);
        let pairs = self.arrivals.windows(2).filter(later);
        pairs.map(|pair| pair[1].0.saturating_duration_since(pair[0].0))
    }

    /// The time that each token but the first ones took; those of one message share its time.
    pub fn token_times(&self) -> impl Iterator<Item = Duration> {
        self.arrivals.windows(2).flat_map(|pair| {
            let (gap, tokens) = (pair[1].0.saturating_duration_since(pair[0].0), pair[1].1);
            let each = gap / u32::try_from(tokens.max(1)).unwrap_or(u32::MAX);
            std::iter::repeat_n(each, tokens)
        })
    }
}

/// Opens the stream.
pub async fn stream_ask(
    client: &InferenceClient<Channel>,
    ask: &Ask,
) -> Result<Streaming<v1::GenerateResponse>, Status> {
    Ok(client.clone().generate(ask.request.clone()).await?.into_inner())
}

/// What came of a stream up to its end.
#[derive(Debug)]
pub struct Followed {
    /// All that was received.
    pub answer: Answer,
    /// How it ended.
    pub end: Result<(), Status>,
    /// When it ended.
    pub ended: Instant,
}

/// Reads a stream to its end. One that breaks the rules (gap, repeat, end without a reason) is a test failure.
pub async fn follow(client: &InferenceClient<Channel>, ask: &Ask) -> Result<Followed> {
    let mut answer = Answer::default();
    let end = match stream_ask(client, ask).await {
        Ok(stream) => read(stream, &mut answer).await?,
        Err(status) => Err(status),
    };
    if end.is_ok() && answer.finish == 0 {
        bail!("the stream ended with neither a finish reason nor an error");
    }
    let ended = Instant::now();
    Ok(Followed { answer, end, ended })
}

async fn read(mut stream: Streaming<v1::GenerateResponse>, answer: &mut Answer) -> Result<Result<(), Status>> {
    while let Some(message) = stream.next().await {
        let message = match message {
            Ok(message) => message,
            Err(status) => return Ok(Err(status)),
        };
        ensure!(answer.finish == 0, "a message after the last one");
        if !message.tokens.is_empty() {
            let (have, first) = (answer.tokens.len(), message.first_index as usize);
            ensure!(
                have == first,
                "tokens {first}.. came after {have} tokens: a gap or a repeat"
            );
            answer.arrivals.push((Instant::now(), message.tokens.len()));
        }
        answer.tokens.extend(&message.tokens);
        answer.text.push_str(&message.text);
        answer.finish = message.finish_reason;
        if let Some(usage) = message.usage {
            answer.usage = usage;
        }
        if let Some(timeline) = message.timeline {
            answer.timeline = timeline;
        }
    }
    Ok(Ok(()))
}

/// Asks and reads to the end; a status is given back.
pub async fn ask(client: &InferenceClient<Channel>, ask: &Ask) -> Result<Result<Answer, Status>> {
    let followed = follow(client, ask).await?;
    Ok(followed.end.map(|()| followed.answer))
}

/// What a server says of a failure that may pass; or the connection itself broke, which this client's library gives a
/// source and the code `Unknown` (others say `UNAVAILABLE`).
pub fn retryable(status: &Status) -> bool {
    let connection_broke = status.code() == Code::Unknown && std::error::Error::source(status).is_some();
    matches!(status.code(), Code::Unavailable | Code::ResourceExhausted) || connection_broke
}

/// Fetches a page; gives status and the whole answer.
pub async fn http_get(base: &str, path: &str) -> Result<(u16, String)> {
    http(base, &format!("GET {path}"), &[]).await
}

/// Sends a body to the HTTP door as it is (it need not be JSON, nor UTF-8); gives status and the whole answer.
pub async fn http_post(base: &str, path: &str, body: &[u8]) -> Result<(u16, String)> {
    http(base, &format!("POST {path}"), body).await
}

async fn http(base: &str, request: &str, body: &[u8]) -> Result<(u16, String)> {
    let address = base.trim_start_matches("http://");
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let head = format!(
        "{request} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok((status.with_context(|| format!("no HTTP status in {answer}"))?, answer))
}
