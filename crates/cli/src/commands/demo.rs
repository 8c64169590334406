//! `baton demo`: one prompt, one answer, through three processes; then what happened when, and where.

use super::signals::{INTERRUPTED, unless_interrupted};
use crate::cluster::{Cluster, ClusterOptions, Shape};
use crate::endpoint::explain;
use crate::timeline::{self, Answer};
use anyhow::{Context, Result, anyhow, bail, ensure};
use baton_node_runtime::{ConfigOptions, Supervisor, process};
use baton_proto::v1::generate_request::Input;
use baton_proto::v1::inference_client::InferenceClient;
use baton_proto::v1::{ChatMessage, ChatMessages, FinishReason, GenerateRequest, Model, SamplingParams};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;
use tonic::transport::Channel;

/// KV memory of a demo's node: several whole contexts of a small model, claimed in a moment.
const KV_BYTES_PER_NODE: u64 = 256 << 20;

/// Answers one prompt through a cluster of its own and shows what happened when.
///
/// Fetches the model where it is missing, starts a coordinator, a prefill node and a decode node as separate processes,
/// streams the answer, prints the request's timeline, and stops them all. The most likely token is taken each time
/// (temperature 0), so that the answer is the same each time.
#[derive(Debug, clap::Args)]
pub struct Demo {
    /// What to ask
    #[arg(default_value = "Why is the sky blue?")]
    prompt: String,
    /// Tokens of the answer at most
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Prints one line of JSON instead: the text, the processes, and the timeline in milliseconds and bytes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    shape: Shape,
    #[command(flatten)]
    config: ConfigOptions,
}

impl Demo {
    /// Shows it.
    pub async fn run(self) -> Result<ExitCode> {
        if self.shape.model.is_stub() {
            bail!(
                "the demo shows a real model; a stub answers with scripted tokens: try it with `baton up --model stub`"
            );
        }
        match unless_interrupted(self.show()).await? {
            Some(shown) => shown.map(|()| ExitCode::SUCCESS),
            // What ran was dropped, and its processes with it.
            None => Ok(ExitCode::from(INTERRUPTED)),
        }
    }

    async fn show(&self) -> Result<()> {
        let model = self.shape.model.resolve().await?;
        let supervisor = Supervisor::new();
        let mut cluster = self.start(model, &supervisor).await?;
        let (channel, model) = (cluster.channel(), cluster.model().clone());
        let result = tokio::select! {
            result = self.ask(channel, &model) => result,
            ended = watch(&mut cluster) => Err(ended),
        };
        let pids = cluster.pids();
        let stopped = cluster.stop().await;
        let answer = result?;
        stopped?;
        let text = if self.json {
            timeline::json(&answer, &pids)?
        } else {
            timeline::picture(&answer, &pids)
        };
        writeln!(std::io::stdout(), "{text}").context("write the timeline")
    }

    async fn start(&self, model: String, supervisor: &Supervisor) -> Result<Cluster> {
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let nodes = self.shape.prefill + self.shape.decode;
        let available = process::available_memory() / 2;
        let options = ClusterOptions {
            shape: self.shape.clone(),
            model,
            kv_bytes: Some(available.min(KV_BYTES_PER_NODE * nodes as u64)),
            // One request at a time: prefill and decode do not compute at once, so each may have every core.
            threads: Some(0),
            cpus: Vec::new(),
            store: "embedded".to_owned(),
            name: "default".to_owned(),
            http_listen: any_port,
            grpc_listen: any_port,
            coordinator_flags: Vec::new(),
            node_flags: Vec::new(),
            log_filter: "info".to_owned(),
            show_logs: false,
        };
        let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}").context("the template is sound")?;
        let spinner = ProgressBar::new_spinner().with_style(style);
        spinner.set_message(format!("starting a coordinator and {nodes} nodes, loading the model"));
        spinner.enable_steady_tick(Duration::from_millis(100));
        let started = Cluster::start(&options, supervisor).await;
        spinner.finish_and_clear();
        started
    }

    async fn ask(&self, channel: Channel, model: &Model) -> Result<Answer> {
        ensure!(
            !model.stub,
            "{} is served by a stub: the demo shows a real model",
            model.id
        );
        if !self.json && std::io::stderr().is_terminal() {
            eprintln!("> {}\n", self.prompt);
        }
        let message = ChatMessage {
            role: "user".to_owned(),
            content: self.prompt.clone(),
        };
        let sampling = SamplingParams {
            temperature: Some(0.0),
            max_tokens: Some(self.max_tokens),
            ..SamplingParams::default()
        };
        let request = GenerateRequest {
            input: Some(Input::Messages(ChatMessages {
                messages: vec![message],
            })),
            sampling: Some(sampling),
            ..GenerateRequest::default()
        };
        let failed = |status: tonic::Status| anyhow!("the request failed: {}", explain(&status));
        let mut client = InferenceClient::new(channel);
        let mut stream = client.generate(request).await.map_err(failed)?.into_inner();
        let mut answer = Answer::default();
        while let Some(chunk) = stream.message().await.map_err(failed)? {
            if !self.json {
                let mut stdout = std::io::stdout().lock();
                stdout
                    .write_all(chunk.text.as_bytes())
                    .and_then(|()| stdout.flush())
                    .context("write the answer")?;
            }
            answer.text.push_str(&chunk.text);
            if chunk.finish_reason() != FinishReason::Unspecified {
                answer.finish_reason = chunk.finish_reason();
                answer.usage = chunk.usage.unwrap_or_default();
                answer.timeline = chunk.timeline.unwrap_or_default();
                return Ok(answer);
            }
        }
        bail!("the answer broke off")
    }
}

/// Waits until the cluster cannot go on.
async fn watch(cluster: &mut Cluster) -> anyhow::Error {
    loop {
        let ended = cluster.next_end().await;
        if ended.fatal {
            return anyhow!(ended.report);
        }
    }
}
