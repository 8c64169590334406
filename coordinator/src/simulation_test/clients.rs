//! Clients, each of which knows what it must be told.

use super::{Sim, draw};
use crate::driver::Coordinator;
use crate::{ApiCode, ApiError, Frontend, GenerateInput, Generation, GenerationEvent, PromptInput};
use baton_types::{RequestId, SamplingParams};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

const CLIENTS: usize = 24;
/// All of them come within this time.
const COME_WITHIN_MS: usize = 5_000;
const LONG: Duration = Duration::from_secs(20);
/// How long after its deadline a request may still end.
const GRACE: Duration = Duration::from_secs(1);

struct Ask {
    number: u64,
    prompt: Vec<u32>,
    max_tokens: usize,
    timeout: Duration,
    /// The client leaves after so long.
    leaves: Option<Duration>,
}

pub(super) fn start(sim: &Arc<Sim>, coordinator: &Coordinator) -> JoinSet<()> {
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS as u64 {
        let come = Duration::from_millis(sim.throw(COME_WITHIN_MS) as u64);
        // Some begin alike, so that caches matter.
        let (family, shared, own) = (sim.throw(4) as u32, sim.throw(80), 1 + sim.throw(40) as u32);
        let prompt = (0..shared as u32)
            .map(|i| (i * 7 + family * 31) % 250)
            .chain((0..own).map(|i| (i * 13 + number as u32 * 17) % 250))
            .collect();
        let hurry = Duration::from_millis(20 + sim.throw(500) as u64);
        let timeout = if sim.one_in(8) { hurry } else { LONG };
        let ask = Ask {
            number,
            prompt,
            max_tokens: 1 + sim.throw(150),
            timeout,
            leaves: sim.one_in(6).then(|| Duration::from_millis(sim.throw(400) as u64)),
        };
        let (sim, coordinator) = (Arc::clone(sim), coordinator.clone());
        clients.spawn(async move {
            tokio::time::sleep(come).await;
            ask.follow(&sim, &coordinator).await;
        });
    }
    clients
}

impl Ask {
    async fn follow(&self, sim: &Sim, coordinator: &Coordinator) {
        let begun = Instant::now();
        let input = GenerateInput {
            request_id: RequestId(self.number.into()),
            model: "m".into(),
            prompt: PromptInput::Tokens(self.prompt.clone()),
            sampling: SamplingParams {
                ignore_eos: true,
                ..SamplingParams::default()
            },
            seed: Some(self.number),
            max_tokens: Some(self.max_tokens as u32),
            stop: Vec::new(),
            timeout: Some(self.timeout),
            cache_salt: String::new(),
            api_key: None,
        };
        match coordinator.generate(input).await {
            Ok(generation) => {
                let leaves = self.leaves.unwrap_or(Duration::MAX);
                if tokio::time::timeout(leaves, self.read(sim, generation)).await.is_err() {
                    sim.told.lock().unwrap().left += 1;
                    sim.note("left", self.number);
                }
            }
            Err(error) => {
                sim.note("refused", self.number);
                self.failed(sim, &error);
            }
        }
        let took = begun.elapsed();
        if took > self.timeout + GRACE {
            let number = self.number;
            sim.complain(format!("request {number} took {took:?} of {:?}", self.timeout));
        }
    }

    /// Only where something goes wrong, or the request is in a hurry.
    fn failed(&self, sim: &Sim, error: &ApiError) {
        sim.told.lock().unwrap().failed += 1;
        let may = match error.code {
            ApiCode::DeadlineExceeded => self.timeout < LONG || !sim.is_calm(),
            // The last one: two nodes died under it.
            ApiCode::Unavailable | ApiCode::ResourceExhausted | ApiCode::Internal => !sim.is_calm(),
            _ => false,
        };
        if !may {
            sim.complain(format!("request {} failed: {error:?}", self.number));
        }
    }

    async fn read(&self, sim: &Sim, mut generation: Generation) {
        let (mut context, prompt) = (self.prompt.clone(), self.prompt.len());
        let mut ends = 0;
        while let Some(event) = generation.next().await {
            if ends > 0 {
                sim.complain(format!("request {} goes on after its end: {event:?}", self.number));
            }
            match event {
                GenerationEvent::Chunk(chunk) => {
                    sim.note("chunk", self.number << 32 | context.len() as u64);
                    if !chunk.tokens.is_empty() && chunk.first_index as usize != context.len() - prompt {
                        sim.complain(format!("request {}: a gap or a repeat: {chunk:?}", self.number));
                    }
                    for token in chunk.tokens {
                        if token != draw(&context) {
                            sim.complain(format!("request {}: a wrong token", self.number));
                        }
                        context.push(token);
                    }
                }
                GenerationEvent::Finished(finished) => {
                    ends += 1;
                    sim.note("finished", self.number);
                    let drawn = context.len() - prompt;
                    if drawn != self.max_tokens {
                        let (number, wanted) = (self.number, self.max_tokens);
                        sim.complain(format!("request {number} finished with {drawn} tokens of {wanted}"));
                    }
                    let mut told = sim.told.lock().unwrap();
                    told.finished += 1;
                    told.again += u64::from(finished.timeline.attempts > 1);
                    let moves = finished.timeline.fallbacks.iter();
                    told.moved += moves.filter(|why| why.contains("goes on from token")).count() as u64;
                }
                GenerationEvent::Failed(error) => {
                    ends += 1;
                    sim.note("failed", self.number);
                    self.failed(sim, &error);
                }
            }
        }
        if ends != 1 {
            sim.complain(format!("request {} ended {ends} times", self.number));
        }
    }
}
