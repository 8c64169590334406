//! Requests, what became of each, and statistics over them.

use anyhow::{Context, Result};
use baton_proto::v1;
use baton_proto::v1::inference_client::InferenceClient;
use baton_tests::{Ask, stream_ask};
use std::time::{Duration, Instant};
use tokio_stream::StreamExt;
use tonic::Status;
use tonic::transport::Channel;

/// What became of one request.
#[derive(Debug)]
pub struct Done {
    /// When it was sent.
    pub sent: Instant,
    /// From then to the first token.
    pub first: Option<Duration>,
    /// From then to the end.
    pub end: Duration,
    /// Tokens that came.
    pub tokens: u32,
    /// Of the last message.
    pub timeline: v1::Timeline,
    /// How it failed, where it did.
    pub error: Option<Status>,
}

impl Done {
    /// Mean time between tokens after the first.
    pub fn between_tokens(&self) -> Duration {
        let decoding = self.end.saturating_sub(self.first.unwrap_or_default());
        decoding / self.tokens.saturating_sub(1).max(1)
    }

    /// The coordinator's hint when to ask again, where it gave one.
    pub fn retry_after(&self) -> Option<Duration> {
        let hint = self.error.as_ref()?.metadata().get("retry-after-ms")?;
        Some(Duration::from_millis(hint.to_str().ok()?.parse().ok()?))
    }
}

/// Sends a request and reads its answer to the end.
pub async fn send(client: InferenceClient<Channel>, ask: Ask) -> Done {
    let mut done = Done {
        sent: Instant::now(),
        first: None,
        end: Duration::ZERO,
        tokens: 0,
        timeline: v1::Timeline::default(),
        error: None,
    };
    match stream_ask(&client, &ask).await {
        Err(status) => done.error = Some(status),
        Ok(mut stream) => {
            while let Some(message) = stream.next().await {
                match message {
                    Ok(message) => {
                        if !message.tokens.is_empty() {
                            done.first.get_or_insert_with(|| done.sent.elapsed());
                            done.tokens += message.tokens.len() as u32;
                        }
                        if let Some(timeline) = message.timeline {
                            done.timeline = timeline;
                        }
                    }
                    Err(status) => done.error = Some(status),
                }
            }
        }
    }
    done.end = done.sent.elapsed();
    done
}

/// At this share of the sorted values; zero where there are none.
pub fn at(values: impl IntoIterator<Item = Duration>, share: f64) -> Duration {
    let mut sorted: Vec<Duration> = values.into_iter().collect();
    sorted.sort_unstable();
    let index = (sorted.len().saturating_sub(1) as f64 * share).round() as usize;
    sorted.get(index).copied().unwrap_or_default()
}

/// Milliseconds, to print.
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Resident memory of a process, in bytes.
pub fn resident(pid: u32) -> Result<u64> {
    let pages = std::fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages: u64 = pages.split_whitespace().nth(1).context("resident pages")?.parse()?;
    Ok(pages * rustix::param::page_size() as u64)
}

/// User and system time of a process so far.
pub fn cpu(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after = stat.rsplit_once(')').context("a command name in brackets")?.1;
    let ticks = after
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|t| t.parse::<u64>().ok());
    Ok(Duration::from_millis(
        ticks.sum::<u64>() * 1000 / rustix::param::clock_ticks_per_second(),
    ))
}
