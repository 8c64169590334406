//! Streams through the coordinator and straight from the node, and what the difference is.

use crate::arguments::Arguments;
use crate::echo_node::{EchoNode, prompt_of};
use anyhow::{Context, Result, ensure};
use baton_node_runtime::announce::Announcement;
use baton_proto::v1::inference_client::InferenceClient;
use baton_proto::v1::node_client::NodeClient;
use baton_proto::v1::{self, decode_command::Command, decode_event::Event, generate_request::Input};
use serde::Serialize;
use std::collections::HashMap;
use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// A coordinator process of the bench's own, with an embedded store.
pub struct Coordinator {
    child: Child,
    grpc: String,
    admin: String,
    /// As `--store` wants it.
    pub store: String,
}

impl Coordinator {
    /// Starts `baton coordinator`, built beside this program.
    pub async fn start() -> Result<Self> {
        let binary = std::env::current_exe()?.with_file_name("baton");
        ensure!(
            binary.exists(),
            "{} is missing: cargo build --release -p baton",
            binary.display()
        );
        let listen = [
            "--http-listen",
            "127.0.0.1:0",
            "--grpc-listen",
            "127.0.0.1:0",
            "--admin-listen",
            "127.0.0.1:0",
        ];
        let mut child = std::process::Command::new(binary)
            .args(["coordinator", "--exit-with-parent", "--log-filter", "warn"])
            .args(listen)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("stdout is piped")?).read_line(&mut line)?;
        let said: Announcement = serde_json::from_str(&line).context("the coordinator's announcement")?;
        let store = format!("etcd://{}", said.store.context("an embedded store's address")?);
        Ok(Self {
            child,
            grpc: said.grpc.context("a gRPC address")?,
            admin: said.admin.context("an admin address")?,
            store,
        })
    }

    /// Share of frames that took at most `bound` seconds inside the coordinator, from received to handed on, by its own
    /// histogram; `bound` as the bucket's label says it.
    fn frames_within(&self, bound: &str) -> Result<f64> {
        let mut stream = TcpStream::connect(&self.admin)?;
        write!(
            stream,
            "GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"
        )?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        let value = |bound: &str| -> Option<f64> {
            let start = format!("baton_coordinator_frame_seconds_bucket{{le=\"{bound}\"}} ");
            page.lines()
                .find_map(|line| line.strip_prefix(&start))?
                .trim()
                .parse()
                .ok()
        };
        let (within, all) = (
            value(bound).context("the bucket")?,
            value("+Inf").context("the histogram")?,
        );
        Ok(within / all)
    }

    /// User and system time so far.
    pub fn cpu(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let after = stat.rsplit_once(')').context("a command name in brackets")?.1;
        let ticks: u64 = after
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|t| t.parse::<u64>().ok())
            .sum();
        Ok(Duration::from_millis(10 * ticks))
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// What came out, microseconds.
#[derive(Serialize)]
pub struct Figures {
    streams: usize,
    tokens: usize,
    tokens_per_s: f64,
    through_coordinator_us_p50: f64,
    through_coordinator_us_p99: f64,
    straight_us_p50: f64,
    straight_us_p99: f64,
    added_us_p50: f64,
    added_us_p99: f64,
    coordinator_cpu_us_per_token: f64,
    frames_within_100_us: f64,
    frames_within_250_us: f64,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} streams, {} tokens, {:.0} tokens/s",
            self.streams, self.tokens, self.tokens_per_s
        )?;
        writeln!(f, "node to client, us         p50      p99")?;
        let (p50, p99) = (self.through_coordinator_us_p50, self.through_coordinator_us_p99);
        writeln!(f, "through the coordinator {p50:>7.1}  {p99:>7.1}")?;
        writeln!(
            f,
            "straight from the node  {:>7.1}  {:>7.1}",
            self.straight_us_p50, self.straight_us_p99
        )?;
        writeln!(
            f,
            "added (medians)         {:>7.1}  {:>7.1}",
            self.added_us_p50, self.added_us_p99
        )?;
        writeln!(
            f,
            "coordinator CPU: {:.1} us per token",
            self.coordinator_cpu_us_per_token
        )?;
        let (in_100, in_250) = (100.0 * self.frames_within_100_us, 100.0 * self.frames_within_250_us);
        write!(
            f,
            "inside the coordinator: {in_100:.2}% of frames within 100 us, {in_250:.2}% within 250 us"
        )
    }
}

pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    sorted
        .get(((sorted.len() as f64 - 1.0) * share).round() as usize)
        .copied()
        .unwrap_or(f64::NAN)
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    percentile(&values, 0.5)
}

pub type Received = Vec<(u32, u32, Instant)>;

pub async fn through(client: InferenceClient<Channel>, name: u32, tokens: u32) -> Result<Received> {
    let sampling = v1::SamplingParams {
        max_tokens: Some(tokens),
        temperature: Some(0.0),
        ignore_eos: true,
        ..v1::SamplingParams::default()
    };
    let input = Some(Input::PromptTokens(v1::TokenIds { ids: prompt_of(name) }));
    let request = v1::GenerateRequest {
        input,
        sampling: Some(sampling),
        ..v1::GenerateRequest::default()
    };
    let mut stream = client.clone().generate(request).await?.into_inner();
    let mut received = Received::new();
    while let Some(message) = stream.next().await {
        let (message, now) = (message?, Instant::now());
        received.extend((0..message.tokens.len() as u32).map(|i| (name, message.first_index + i, now)));
    }
    Ok(received)
}

pub async fn straight(client: NodeClient<Channel>, node: (String, String), name: u32, tokens: u32) -> Result<Received> {
    let sampling = v1::SamplingParams {
        max_tokens: Some(tokens),
        ..v1::SamplingParams::default()
    };
    let work = v1::Work {
        prompt: prompt_of(name),
        sampling: Some(sampling),
        model_fingerprint: node.1,
        ..v1::Work::default()
    };
    let open = v1::DecodeOpen {
        work: Some(work),
        local_prefill: true,
        instance: node.0,
        ahead: 0,
    };
    let (commands, stream) = mpsc::channel(1);
    commands
        .send(v1::DecodeCommand {
            command: Some(Command::Open(open)),
        })
        .await?;
    let mut events = client.clone().decode(ReceiverStream::new(stream)).await?.into_inner();
    let mut received = Received::new();
    while let Some(event) = events.next().await {
        let (event, now) = (event?, Instant::now());
        match event.event {
            Some(Event::Tokens(tokens)) => {
                received.extend((0..tokens.tokens.len() as u32).map(|i| (name, tokens.first_index + i, now)));
            }
            Some(Event::Finished(_)) => break,
            _ => {}
        }
    }
    Ok(received)
}

/// Time from the node's stamp to the client's, sorted, microseconds.
fn delays(node: &EchoNode, received: &[(u32, u32, Instant)]) -> Result<Vec<f64>> {
    let sent = std::mem::take(
        &mut *node
            .stamps
            .lock()
            .map_err(|_| anyhow::anyhow!("a stamping task panicked"))?,
    );
    let sent: HashMap<(u32, u32), Instant> = sent.into_iter().map(|(name, index, at)| ((name, index), at)).collect();
    ensure!(
        sent.len() == received.len(),
        "{} tokens sent, {} received",
        sent.len(),
        received.len()
    );
    let mut delays = Vec::with_capacity(received.len());
    for (name, index, at) in received {
        let from = sent.get(&(*name, *index)).context("a token that was never sent")?;
        delays.push(at.saturating_duration_since(*from).as_secs_f64() * 1e6);
    }
    delays.sort_by(f64::total_cmp);
    Ok(delays)
}

async fn gather(tasks: Vec<tokio::task::JoinHandle<Result<Received>>>) -> Result<Received> {
    let mut all = Received::new();
    for task in tasks {
        all.extend(task.await??);
    }
    Ok(all)
}

/// Connections to both, once the coordinator serves the node.
pub async fn connect(
    coordinator: &Coordinator,
    node: &EchoNode,
) -> Result<(InferenceClient<Channel>, NodeClient<Channel>)> {
    let front = InferenceClient::connect(format!("http://{}", coordinator.grpc)).await?;
    let direct = NodeClient::connect(format!("http://{}", node.address)).await?;
    let mut warm = through(front.clone(), 1, 4).await;
    for _ in 0..20 {
        if warm.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        warm = through(front.clone(), 1, 4).await;
    }
    warm.context("the coordinator does not serve the echo node")?;
    Ok((front, direct))
}

/// Runs the rounds.
pub async fn run(coordinator: &mut Coordinator, node: &EchoNode, arguments: &Arguments) -> Result<Figures> {
    let (front, direct) = connect(coordinator, node).await?;
    let identity = (node.instance.to_string(), node.fingerprint.to_string());
    delays(node, &[]).ok();
    let (mut front_p, mut direct_p, mut cpu, mut tokens, mut seconds) = (Vec::new(), Vec::new(), 0.0, 0, 0.0);
    for _ in 0..arguments.rounds {
        let (cpu_before, started) = (coordinator.cpu()?, Instant::now());
        let streams = 0..arguments.streams as u32;
        let all = streams
            .clone()
            .map(|s| tokio::spawn(through(front.clone(), 2 + s, arguments.tokens)))
            .collect();
        let received = gather(all).await?;
        cpu += (coordinator.cpu()? - cpu_before).as_secs_f64() * 1e6;
        seconds += started.elapsed().as_secs_f64();
        tokens += received.len();
        let sorted = delays(node, &received)?;
        front_p.push((percentile(&sorted, 0.5), percentile(&sorted, 0.99)));
        let all = streams
            .map(|s| tokio::spawn(straight(direct.clone(), identity.clone(), 2 + s, arguments.tokens)))
            .collect();
        let sorted = delays(node, &gather(all).await?)?;
        direct_p.push((percentile(&sorted, 0.5), percentile(&sorted, 0.99)));
    }
    let pick = |pairs: &[(f64, f64)], which: fn(&(f64, f64)) -> f64| median(pairs.iter().map(which).collect());
    let (f50, f99) = (pick(&front_p, |p| p.0), pick(&front_p, |p| p.1));
    let (d50, d99) = (pick(&direct_p, |p| p.0), pick(&direct_p, |p| p.1));
    Ok(Figures {
        streams: arguments.streams,
        tokens,
        tokens_per_s: tokens as f64 / seconds,
        through_coordinator_us_p50: f50,
        through_coordinator_us_p99: f99,
        straight_us_p50: d50,
        straight_us_p99: d99,
        added_us_p50: f50 - d50,
        added_us_p99: f99 - d99,
        coordinator_cpu_us_per_token: cpu / tokens as f64,
        frames_within_100_us: coordinator.frames_within("0.0001")?,
        frames_within_250_us: coordinator.frames_within("0.00025")?,
    })
}
