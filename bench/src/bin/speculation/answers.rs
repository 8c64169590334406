//! Engines that answer, and what they answered.

use crate::options::Options;
use anyhow::{Context, Result, bail};
use baton_engine::{Activations, BlockPool, LoadOptions, load};
use baton_node_host::PoolBlocks;
use baton_node_host::engine::{
    Beginning, Control, Ending, EngineHandle, EngineParts, SequenceEvent, SequenceSpec, Speculation, Until, start,
};
use baton_node_runtime::{Clock, Moment, Supervisor, TaskHandle};
use baton_text::{ChatTemplate, EngineFacts, Message, ModelCard, Tokenizer};
use baton_types::{ArenaView, KvDtype, ModelFingerprint, NumericsId, RequestId, SamplingParams};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

const BLOCK_TOKENS: u32 = 16;
/// Tokens of a prompt with its answer, at most.
const LONGEST: u32 = 2048;
/// A run of so many tokens that comes twice in an answer is a repetition.
const RUN: usize = 8;

/// The model's tokenizer and its template.
pub struct Text {
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl Text {
    pub fn new(options: &Options) -> Result<Self> {
        let facts = EngineFacts {
            fingerprint: ModelFingerprint([0; 32]),
            numerics: NumericsId(String::new()),
            block_tokens: BLOCK_TOKENS,
            kv_dtype: KvDtype::F16,
        };
        let card = ModelCard::new(ModelCard::text_of(&options.model)?, facts);
        let source = card
            .chat_template
            .as_deref()
            .context("--model: it has no chat template")?;
        Ok(Self {
            tokenizer: Tokenizer::new(&card)?,
            template: ChatTemplate::new(source, &card.bos_text, &card.eos_text)?,
        })
    }
}

/// An engine thread.
pub struct Node {
    engine: EngineHandle,
    thread: TaskHandle,
    clock: Clock,
}

/// One answer.
#[derive(Default)]
struct Answer {
    tokens: Vec<u32>,
    first: Option<Moment>,
    last: Option<Moment>,
    drafted: u32,
    accepted: u32,
}

impl Node {
    pub fn start(options: &Options, speculation: Speculation) -> Result<Self> {
        let load_options = LoadOptions {
            threads: options.threads,
            cpus: Vec::new(),
            kv_dtype: KvDtype::F16,
            isa: None,
            activations: Activations::Int8,
        };
        let backend = load(&options.model, &load_options, &mut |_, _| {})?;
        let geometry = backend.config().kv_geometry(BLOCK_TOKENS, KvDtype::F16);
        let blocks = u32::try_from(options.at_once)? * LONGEST / BLOCK_TOKENS;
        let clock = Clock::new();
        let parts = EngineParts {
            ending: Ending::new(backend.config(), &[]),
            backend,
            arena: ArenaView::on_heap(geometry, blocks as usize),
            blocks: PoolBlocks::new(BlockPool::new(blocks)),
            queue_capacity: options.at_once,
            running_max: options.at_once,
            chunk_tokens: 256,
            speculation,
            room_changed: Box::new(|| {}),
        };
        let (engine, thread) = start(parts, clock, &Supervisor::new());
        Ok(Self { engine, thread, clock })
    }

    pub async fn end(self) {
        self.engine.close();
        self.thread.join().await;
    }

    fn submit(&self, prompt: &[u32], options: &Options) -> Result<mpsc::Receiver<SequenceEvent>> {
        let (sender, events) = mpsc::channel(options.tokens as usize + 64);
        let sequence = SequenceSpec {
            request_id: RequestId::random(),
            prompt: prompt.to_vec(),
            generated: Vec::new(),
            sampling: SamplingParams {
                temperature: options.temperature,
                max_tokens: options.tokens,
                ..SamplingParams::default()
            },
            constraint: None,
            hashes: Vec::new(),
            chain: None,
            deadline: self.clock.now() + Duration::from_secs(600),
            beginning: Beginning::Compute,
            until: Until::End,
            layer_borders: Arc::default(),
            control: Control::new(true),
            events: sender,
        };
        self.engine.submit(sequence)?;
        Ok(events)
    }

    /// Answers to these prompts, computed together.
    async fn answer(&self, prompts: &[Vec<u32>], options: &Options) -> Result<Vec<Answer>> {
        let begun: Vec<_> = prompts
            .iter()
            .map(|prompt| self.submit(prompt, options))
            .collect::<Result<_>>()?;
        let mut answers = Vec::new();
        for events in begun {
            answers.push(finish(events).await?);
        }
        Ok(answers)
    }
}

async fn finish(mut events: mpsc::Receiver<SequenceEvent>) -> Result<Answer> {
    let mut answer = Answer::default();
    while let Some(event) = events.recv().await {
        match event {
            SequenceEvent::Token {
                drawn,
                at,
                drafted,
                extra,
                ..
            } => {
                answer.tokens.push(drawn.token);
                answer.first.get_or_insert(at);
                answer.last = Some(at);
                answer.drafted += drafted;
                answer.accepted += u32::from(extra);
                if drawn.finish.is_some() {
                    return Ok(answer);
                }
            }
            SequenceEvent::Started { .. } | SequenceEvent::Computed { .. } | SequenceEvent::Layers { .. } => {}
            SequenceEvent::Failed { error } => return Err(error.into()),
        }
    }
    bail!("the engine ended in the middle of an answer")
}

/// Prompts of one kind, and what both engines answered.
pub struct Set {
    pub name: &'static str,
    prompts: Vec<Vec<u32>>,
    /// First answers of the engine without drafts: what all others must be.
    reference: Vec<Vec<u32>>,
    identical: bool,
    /// Tokens per second of each round, without drafts and with them.
    rates: [Vec<f64>; 2],
    drafted: u32,
    accepted: u32,
}

impl Set {
    pub fn new(name: &'static str, text: &Text, prompts: &[&str]) -> Result<Self> {
        let tokens = |prompt: &&str| {
            let message = Message {
                role: "user".to_owned(),
                content: (*prompt).to_owned(),
            };
            text.tokenizer.encode_chat(&text.template, &[message], true)
        };
        Ok(Self {
            name,
            prompts: prompts.iter().map(tokens).collect::<Result<_, _>>()?,
            reference: Vec::new(),
            identical: true,
            rates: Default::default(),
            drafted: 0,
            accepted: 0,
        })
    }

    /// Both engines answer each prompt, by turns.
    pub async fn round(&mut self, nodes: &[Node; 2], options: &Options) -> Result<()> {
        let mut sums = [(0, 0.0); 2];
        let mut answered = [const { Vec::new() }; 2];
        for (turn, prompts) in self.prompts.chunks(options.at_once).enumerate() {
            for engine in [turn % 2, 1 - turn % 2] {
                let answers = nodes[engine].answer(prompts, options).await?;
                let first = answers.iter().filter_map(|a| a.first).min();
                let last = answers.iter().filter_map(|a| a.last).max();
                let (first, last) = first.zip(last).context("no tokens")?;
                let drawn = answers.iter().map(|a| a.tokens.len()).sum::<usize>();
                // What the first moment brought took no decoding.
                sums[engine].0 += drawn - 1;
                sums[engine].1 += last.saturating_since(first).as_secs_f64();
                for answer in answers {
                    self.drafted += answer.drafted;
                    self.accepted += answer.accepted;
                    answered[engine].push(answer.tokens);
                }
            }
        }
        for (rates, (tokens, seconds)) in self.rates.iter_mut().zip(sums) {
            rates.push(tokens as f64 / seconds.max(1e-9));
        }
        let [without, with] = answered;
        if self.reference.is_empty() {
            self.reference = without;
        } else {
            self.identical &= without == self.reference;
        }
        self.identical &= with == self.reference;
        Ok(())
    }

    pub fn rates(&self, engine: usize) -> Vec<f64> {
        self.rates[engine].clone()
    }

    pub fn drafts(&self) -> (u32, u32) {
        (self.drafted, self.accepted)
    }

    pub fn prompts(&self) -> usize {
        self.prompts.len()
    }

    pub fn tokens(&self) -> usize {
        self.reference.iter().map(Vec::len).sum()
    }

    pub fn is_identical(&self) -> bool {
        self.identical
    }

    /// The least share of runs of eight tokens that are the first of their kind in their answer.
    pub fn distinct(&self) -> f64 {
        self.reference.iter().map(|tokens| distinct(tokens)).fold(1.0, f64::min)
    }

    pub fn show(&self, text: &Text) {
        for tokens in &self.reference {
            println!(
                "--- {} tokens, {:.0}% distinct\n{}",
                tokens.len(),
                100.0 * distinct(tokens),
                text.tokenizer.decode(tokens)
            );
        }
    }
}

fn distinct(tokens: &[u32]) -> f64 {
    let runs = tokens.windows(RUN);
    let count = runs.len().max(1) as f64;
    let kinds = runs.collect::<HashSet<_>>().len();
    if tokens.len() < RUN { 1.0 } else { kinds as f64 / count }
}
