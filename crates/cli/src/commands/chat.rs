//! `baton chat`: a conversation with a running cluster. Each line of standard input is a turn; the answers stream to
//! standard output. Works from a pipe too, without prompts.

use super::signals::{INTERRUPTED, Signals};
use crate::endpoint::{EndpointOptions, explain};
use crate::timeline::finish_reason;
use anyhow::{Context, Result, anyhow, bail};
use baton_proto::v1::generate_request::Input;
use baton_proto::v1::inference_client::InferenceClient;
use baton_proto::v1::{ChatMessage, ChatMessages, FinishReason, GenerateRequest, ListModelsRequest, SamplingParams};
use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;
use tokio::sync::mpsc;
use tonic::transport::Channel;

/// Talks to a running cluster.
///
/// Ctrl-C stops an answer, Ctrl-D ends. From a pipe, each line is a turn.
#[derive(Debug, clap::Args)]
pub struct Chat {
    #[command(flatten)]
    endpoint: EndpointOptions,
    /// As the cluster lists it [default: the only one]
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    model: String,
    /// What the model is told before the first turn
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Randomness, 0 (none) to 2
    #[arg(long, default_value_t = 0.7)]
    temperature: f32,
    /// Makes equal conversations have equal answers
    #[arg(long)]
    seed: Option<u64>,
    /// Tokens of an answer at most [default: what is left of the context]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
}

/// How a turn went.
enum Turn {
    Answered(String),
    Cancelled(&'static str),
}

impl Chat {
    /// Talks until the input ends.
    pub async fn run(self) -> Result<ExitCode> {
        let (channel, address) = self.endpoint.connect().await?;
        let mut client = InferenceClient::new(channel);
        let models = client.list_models(ListModelsRequest {}).await;
        let models = models
            .map_err(|status| anyhow!("{address}: {}", explain(&status)))?
            .into_inner()
            .models;
        let interactive = std::io::stdin().is_terminal();
        if interactive {
            let names: Vec<String> = models
                .iter()
                .map(|model| format!("{}{}", model.id, if model.stub { " (stub)" } else { "" }))
                .collect();
            eprintln!(
                "{} at {address}. Ctrl-C stops an answer, Ctrl-D ends.",
                names.join(", ")
            );
        }
        let mut signals = Signals::install()?;
        let mut lines = read_lines();
        let mut messages: Vec<ChatMessage> = self.system.iter().map(|text| message("system", text)).collect();
        let mut idle_interrupts = 0;
        loop {
            if interactive {
                eprint!("\n> ");
            }
            let line = tokio::select! {
                line = lines.recv() => line,
                signal = signals.next() => {
                    idle_interrupts += 1;
                    if signal == "SIGTERM" || idle_interrupts > 1 || !interactive {
                        return Ok(ExitCode::from(INTERRUPTED));
                    }
                    eprint!("\n(Ctrl-D, or Ctrl-C once more, ends)");
                    continue;
                }
            };
            idle_interrupts = 0;
            let Some(line) = line else {
                if interactive {
                    eprintln!();
                }
                return Ok(ExitCode::SUCCESS);
            };
            if line.trim().is_empty() {
                continue;
            }
            messages.push(message("user", &line));
            match self.turn(&mut client, &messages, &mut signals).await {
                Ok(Turn::Answered(text)) => messages.push(message("assistant", &text)),
                Ok(Turn::Cancelled(signal)) if signal == "SIGTERM" || !interactive => {
                    return Ok(ExitCode::from(INTERRUPTED));
                }
                Ok(Turn::Cancelled(_)) => {
                    // The conversation goes on as though the question had not been asked.
                    messages.pop();
                    eprintln!("\n(stopped)");
                }
                Err(error) if interactive => {
                    messages.pop();
                    eprintln!("\nbaton: {error:#}");
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn turn(
        &self,
        client: &mut InferenceClient<Channel>,
        messages: &[ChatMessage],
        signals: &mut Signals,
    ) -> Result<Turn> {
        let sampling = SamplingParams {
            temperature: Some(self.temperature),
            seed: self.seed,
            max_tokens: self.max_tokens,
            ..SamplingParams::default()
        };
        let request = GenerateRequest {
            model: self.model.clone(),
            input: Some(Input::Messages(ChatMessages {
                messages: messages.to_vec(),
            })),
            sampling: Some(sampling),
            ..GenerateRequest::default()
        };
        let answer = stream_answer(client, request);
        tokio::select! {
            text = answer => text.map(Turn::Answered),
            // The stream is dropped, which cancels the request.
            signal = signals.next() => Ok(Turn::Cancelled(signal)),
        }
    }
}

/// Streams one answer to standard output; gives its text.
async fn stream_answer(client: &mut InferenceClient<Channel>, request: GenerateRequest) -> Result<String> {
    let failed = |status: tonic::Status| anyhow!(explain(&status));
    let mut stream = client.generate(request).await.map_err(failed)?.into_inner();
    let mut text = String::new();
    while let Some(chunk) = stream.message().await.map_err(failed)? {
        text.push_str(&chunk.text);
        let mut stdout = std::io::stdout().lock();
        stdout
            .write_all(chunk.text.as_bytes())
            .and_then(|()| stdout.flush())
            .context("write the answer")?;
        match chunk.finish_reason() {
            FinishReason::Unspecified => continue,
            FinishReason::Stop => writeln!(stdout),
            reason @ (FinishReason::Length | FinishReason::Cancelled) => {
                writeln!(stdout).and_then(|()| writeln!(std::io::stderr(), "({})", finish_reason(reason)))
            }
        }
        .context("write the answer")?;
        return Ok(text);
    }
    bail!("the answer broke off")
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
    }
}

/// Lines of standard input, from a thread that may block in it for ever.
fn read_lines() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
