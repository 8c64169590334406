//! One request's task: it waits for whatever happens next, asks the core what follows, and does it. It owns the request's
//! state, legs, claims and text; when it ends, all of them are gone.

mod moving;

use super::decisions::Decisions;
use super::legs;
use super::placement::{PlaceRequest, Placed, Placer, Waiting};
use super::prepare::Prepared;
use super::registry::Entry;
use super::text::TextStage;
use crate::control::{Record, Recording};
use crate::core::{DecodeEvent, Effect, Event, Leg, Outcome, Peer, PrefillEvent, Request, RequestSpec, TokenBatch};
use crate::membership::{Candidate, Claim, Members, Model};
use crate::tenants::{Tenant, TenantEntry, TenantWait};
use crate::{ApiCode, Finished, GenerationEvent, Usage};
use baton_node_runtime::{CancellationToken, Clock, Moment};
use baton_proto::v1::{self, decode_command::Command};
use baton_types::{
    Attempt, BlockHash, BlockHashChain, Budget, FinishReason, Instance, NumericsId, RequestId, Ticket, Work,
};
use futures::future::BoxFuture;
use futures::stream::{BoxStream, StreamExt};
use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// How long the end of an answer may wait for the last figures of its timeline.
const GRACE: Duration = Duration::from_millis(100);

/// What every task uses.
pub(super) struct Shared {
    pub(super) members: Members,
    pub(super) placer: Placer,
    pub(super) decisions: Decisions,
    pub(super) record: Record,
    pub(super) clock: Clock,
    /// This coordinator.
    pub(super) instance: Instance,
}

/// A request that has been let in.
pub(super) struct Job {
    pub(super) request_id: RequestId,
    pub(super) model: Arc<Model>,
    pub(super) prepared: Prepared,
    pub(super) arrived: Moment,
    pub(super) events: mpsc::Sender<GenerationEvent>,
    pub(super) cancel: CancellationToken,
    pub(super) entry: Entry,
    pub(super) recording: Recording,
    /// Given up once the request has its first place.
    pub(super) waiting: Option<(Waiting, TenantWait)>,
    pub(super) tenant: Arc<Tenant>,
    /// Given up at the end.
    pub(super) tenant_entry: Option<TenantEntry>,
}

struct DecodeLeg {
    leg: Leg,
    instance: Instance,
    commands: mpsc::Sender<v1::DecodeCommand>,
    events: BoxStream<'static, DecodeEvent>,
    claim: Claim,
    /// Its arithmetic, and the one that the blocks which it was told of are named after.
    numerics: NumericsId,
    named_after: NumericsId,
}

struct PrefillLeg {
    leg: Leg,
    instance: Instance,
    /// Where it hands over to.
    decode: Instance,
    /// Tokens that it had in its cache.
    cached_tokens: u32,
    events: BoxStream<'static, PrefillEvent>,
    /// Until the first token is there.
    claim: Option<Claim>,
}

/// A ticket and the block hashes that go with it: the same for both nodes of a run.
struct Identity {
    numerics: NumericsId,
    tokens: usize,
    hashes: Vec<BlockHash>,
}

struct Task {
    shared: Arc<Shared>,
    job: Job,
    request: Request,
    text: TextStage,
    deadline: Moment,
    placing: Option<BoxFuture<'static, Result<Placed, crate::ApiError>>>,
    held_prefill: Option<(Candidate, Claim)>,
    held_decode: Option<(Candidate, Claim)>,
    decode: Option<DecodeLeg>,
    prefill: Option<PrefillLeg>,
    placing_move: Option<BoxFuture<'static, (Candidate, Claim)>>,
    held_move: Option<(Candidate, Claim)>,
    /// To the node that is to take the sequence over.
    moving: Option<DecodeLeg>,
    grace: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    identity: Option<Identity>,
    first_chunk_sent: bool,
    /// Tokens were delivered since the last event.
    delivered: bool,
}

/// Runs a request to its end.
pub(super) async fn run(shared: Arc<Shared>, job: Job) {
    let prepared = &job.prepared;
    let spec = RequestSpec {
        max_tokens: prepared.sampling.max_tokens as usize,
        logprobs: prepared.sampling.logprobs.is_some(),
        eos_tokens: if prepared.sampling.ignore_eos {
            Arc::default()
        } else {
            Arc::clone(&job.model.eos_tokens)
        },
        prompt_tokens: prepared.prompt.len(),
        block_tokens: job.model.card.block_tokens as usize,
        move_ahead: moving::AHEAD,
    };
    let (request, effects) = Request::new(spec);
    let task = Task {
        text: TextStage::new(job.model.tokenizer.detokenizer(), prepared.stop.clone()),
        deadline: job.arrived + prepared.timeout,
        shared,
        request,
        placing: None,
        held_prefill: None,
        held_decode: None,
        decode: None,
        prefill: None,
        placing_move: None,
        held_move: None,
        moving: None,
        grace: None,
        identity: None,
        first_chunk_sent: false,
        delivered: false,
        job,
    };
    task.run(effects).await;
}

/// The next thing that an optional stream yields; never where there is none. A stream here always ends with a failure,
/// upon which its leg is closed.
async fn next<E>(stream: Option<&mut BoxStream<'static, E>>) -> E {
    if let Some(stream) = stream
        && let Some(event) = stream.next().await
    {
        return event;
    }
    pending().await
}

impl Task {
    async fn run(mut self, mut effects: Vec<Effect>) {
        let cancel = self.job.cancel.clone();
        let mut cancelled = std::pin::pin!(cancel.cancelled());
        let clock = self.shared.clock;
        let mut deadline = std::pin::pin!(clock.sleep_until(self.deadline));
        let mut came = None;
        loop {
            let over = self.perform_all(&mut effects);
            if let Some(came) = came.filter(|_| std::mem::take(&mut self.delivered)) {
                metrics::histogram!("baton_coordinator_frame_seconds").record(clock.elapsed(came));
            }
            if over {
                return;
            }
            let event = tokio::select! {
                biased;
                () = &mut cancelled => Event::Cancelled,
                () = &mut deadline => Event::DeadlinePassed,
                event = next(self.decode.as_mut().map(|leg| &mut leg.events)) => self.decode_said(event),
                event = next(self.prefill.as_mut().map(|leg| &mut leg.events)) => self.prefill_said(event),
                event = next(self.moving.as_mut().map(|leg| &mut leg.events)) => self.move_said(event),
                placed = async {
                    match &mut self.placing_move {
                        Some(placing) => placing.await,
                        None => pending().await,
                    }
                } => self.move_placed(placed),
                placed = async {
                    match &mut self.placing {
                        Some(placing) => placing.await,
                        None => pending().await,
                    }
                } => self.placed(placed),
                () = async {
                    match &mut self.grace {
                        Some(grace) => grace.await,
                        None => pending().await,
                    }
                } => {
                    self.grace = None;
                    Event::GraceOver
                }
            };
            came = Some(clock.now());
            self.request.on(event, self.now_us(), &mut effects);
        }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.shared.clock.elapsed(self.job.arrived).as_micros()).unwrap_or(u64::MAX)
    }

    fn decode_said(&mut self, event: DecodeEvent) -> Event {
        let Some(leg) = &mut self.decode else {
            return Event::GraceOver;
        };
        if matches!(event, DecodeEvent::Committed { .. } | DecodeEvent::Tokens { .. }) {
            leg.claim.started();
        }
        if let DecodeEvent::Tokens { local: Some(local), .. } = &event {
            let took = Duration::from_micros(local.prefill_us);
            let members = &self.shared.members;
            members.prefilled(leg.instance, local.prefill_tokens, local.cached_tokens, took);
        }
        let (leg, instance) = (leg.leg, leg.instance);
        if let DecodeEvent::HandedOn {
            result: Ok(handover), ..
        } = &event
        {
            self.handed_on(instance, handover);
        }
        Event::Decode(leg, event)
    }

    fn prefill_said(&mut self, event: PrefillEvent) -> Event {
        let Some(leg) = &mut self.prefill else {
            return Event::GraceOver;
        };
        let members = &self.shared.members;
        match &event {
            PrefillEvent::Started { cached_tokens, .. } => leg.cached_tokens = *cached_tokens,
            PrefillEvent::FirstToken(first) => {
                leg.claim = None;
                let took = Duration::from_micros(first.prefill_us);
                members.prefilled(leg.instance, first.prefill_tokens, leg.cached_tokens, took);
            }
            PrefillEvent::HandedOver(handover) => {
                let exposed = Duration::from_micros(handover.exposed_us);
                members.handed_over(leg.instance, leg.decode, handover.bytes, exposed);
            }
            PrefillEvent::Failed(_) => {}
        }
        Event::Prefill(leg.leg, event)
    }

    fn placed(&mut self, placed: Result<Placed, crate::ApiError>) -> Event {
        self.placing = None;
        match placed {
            Ok(placed) => {
                self.job.waiting = None;
                let placement = placed.placement();
                self.held_prefill = placed.prefill;
                self.held_decode = Some(placed.decode);
                Event::Placed(placement)
            }
            Err(error) => Event::NotPlaced(error),
        }
    }

    /// True: the request is over.
    fn perform_all(&mut self, effects: &mut Vec<Effect>) -> bool {
        loop {
            for effect in effects.drain(..) {
                if let Effect::End(outcome) = effect {
                    self.end(outcome);
                    return true;
                }
                self.perform(effect);
            }
            let Some(completion_tokens) = self.text.stopped() else {
                return false;
            };
            self.request
                .on(Event::Stopped { completion_tokens }, self.now_us(), effects);
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Place { keep_decode } => self.place(keep_decode),
            Effect::OpenDecode {
                leg,
                attempt,
                local_prefill,
                ..
            } => self.open_decode(leg, attempt, local_prefill),
            Effect::OpenPrefill {
                leg,
                ticket,
                attempt,
                peer,
                base,
                ..
            } => {
                self.open_prefill(leg, ticket, attempt, peer, base);
            }
            Effect::Supersede { leg, attempt } => {
                self.command(leg, Command::Supersede(v1::Supersede { attempt: attempt.0 }));
            }
            Effect::PlaceMove => self.place_move(),
            Effect::OpenMove { leg, ahead } => self.open_move(leg, ahead),
            Effect::HandOn {
                leg,
                ticket,
                peer,
                context_tokens,
                known,
            } => self.hand_on(leg, ticket, peer, context_tokens, known),
            Effect::Promote(leg) => self.decode = self.moving.take_if(|open| open.leg == leg),
            Effect::Close(leg) => {
                self.moving.take_if(|open| open.leg == leg);
                self.decode.take_if(|open| open.leg == leg);
                self.prefill.take_if(|open| open.leg == leg);
            }
            Effect::Deliver(batch) => self.deliver(batch),
            Effect::NodeFailed { node, message } => {
                let request_id = self.job.request_id;
                tracing::warn!(%request_id, node_id = %node.id, error = message, "node failed a request");
                metrics::counter!("baton_coordinator_node_failures_total").increment(1);
                self.shared.members.inhibit(&node, &message);
            }
            Effect::NodeFull(node) => self.shared.members.full(&node),
            Effect::StartGrace => {
                let clock = self.shared.clock;
                self.grace = Some(Box::pin(async move { clock.sleep(GRACE).await }));
            }
            Effect::End(outcome) => self.end(outcome),
        }
    }

    fn place(&mut self, keep_decode: Option<Instance>) {
        (self.held_prefill, self.held_decode) = (None, None);
        let generated = self.request.generated();
        let context = self.job.prepared.prompt.len() + generated.len();
        let model = self.job.model.card.name.clone();
        let numerics = self.shared.members.numerics_with_known_blocks(&model);
        let base = generated.len();
        let request = PlaceRequest {
            request_id: self.job.request_id,
            tenant: Arc::clone(&self.job.tenant),
            arrived: self.job.arrived,
            model,
            chains: numerics.iter().map(|numerics| self.hashes(base, numerics)).collect(),
            context_tokens: u32::try_from(context).unwrap_or(u32::MAX),
            excluded: self.request.excluded().to_vec(),
            keep_decode,
            again: self.job.waiting.is_none(),
            begun: base > 0,
        };
        let shared = Arc::clone(&self.shared);
        self.placing = Some(Box::pin(async move { shared.placer.place(request).await }));
    }

    fn open_decode(&mut self, leg: Leg, attempt: Attempt, local_prefill: bool) {
        let (candidate, claim) = self
            .held_decode
            .take()
            .expect("nodes are opened only as placement chose them");
        // Blocks are named after the arithmetic of the node that computes them.
        let numerics = self
            .held_prefill
            .as_ref()
            .map_or(&candidate.numerics, |(prefill, _)| &prefill.numerics)
            .clone();
        let base = self.request.generated().len();
        let open = v1::DecodeOpen {
            work: Some(self.work(Ticket::random(), attempt, base, &numerics)),
            local_prefill,
            instance: candidate.node.instance.to_string(),
            ahead: 0,
        };
        let (commands, events) = legs::decode(candidate.channel.clone(), open);
        self.decode = Some(DecodeLeg {
            leg,
            instance: candidate.node.instance,
            commands,
            events,
            claim,
            numerics: candidate.numerics,
            named_after: numerics,
        });
    }

    fn open_prefill(&mut self, leg: Leg, ticket: Ticket, attempt: Attempt, peer: Peer, base: usize) {
        let (candidate, claim) = self
            .held_prefill
            .take()
            .expect("nodes are opened only as placement chose them");
        self.held_decode = None;
        let decode = peer.instance;
        let request = v1::PrefillRequest {
            work: Some(self.work(ticket, attempt, base, &candidate.numerics)),
            decode: Some(transfer_peer(peer)),
            instance: candidate.node.instance.to_string(),
        };
        let events = legs::prefill(candidate.channel, request);
        self.prefill = Some(PrefillLeg {
            leg,
            instance: candidate.node.instance,
            decode,
            cached_tokens: 0,
            events,
            claim: Some(claim),
        });
    }

    fn command(&mut self, leg: Leg, command: Command) {
        let Some(open) = self.decode.as_ref().filter(|open| open.leg == leg) else {
            return;
        };
        // A stream that takes no command is broken, and says so by itself.
        let _ = open.commands.try_send(v1::DecodeCommand { command: Some(command) });
    }

    /// The identities of the full blocks of the prompt and of `base` tokens behind it, by this arithmetic.
    fn hashes(&mut self, base: usize, numerics: &NumericsId) -> Vec<BlockHash> {
        let (prompt, tokens) = (&self.job.prepared.prompt, self.job.prepared.prompt.len() + base);
        let known = self.identity.as_ref();
        if let Some(known) = known.filter(|known| known.tokens == tokens && known.numerics == *numerics) {
            return known.hashes.clone();
        }
        let mut scope = self.job.model.card.cache_scope(&self.job.prepared.cache_salt);
        scope.numerics = numerics.clone();
        let block_tokens = self.job.model.card.block_tokens as usize;
        let hashes = if base == 0 {
            BlockHashChain::full_blocks(&scope, prompt, block_tokens)
        } else {
            let all = [prompt.as_slice(), &self.request.generated()[..base]].concat();
            BlockHashChain::full_blocks(&scope, &all, block_tokens)
        };
        self.identity = Some(Identity {
            numerics: numerics.clone(),
            tokens,
            hashes: hashes.clone(),
        });
        hashes
    }

    fn work(&mut self, ticket: Ticket, attempt: Attempt, base: usize, numerics: &NumericsId) -> v1::Work {
        let block_hashes = self.hashes(base, numerics);
        self.job.recording.blocks(&block_hashes);
        let generated = self.request.generated()[..base].to_vec();
        let prompt = &self.job.prepared.prompt;
        let left = self.deadline.saturating_since(self.shared.clock.now());
        let work = Work {
            request_id: self.job.request_id,
            ticket,
            attempt,
            prompt: prompt.clone(),
            generated,
            sampling: self.job.prepared.sampling.clone(),
            block_hashes,
            cache_salt: self.job.prepared.cache_salt.clone(),
            budget: Budget(left),
            coordinator: self.shared.instance,
            fingerprint: self.job.model.card.fingerprint,
        };
        work.into()
    }

    fn deliver(&mut self, batch: TokenBatch) {
        if !std::mem::replace(&mut self.first_chunk_sent, true) {
            let ttft = self.shared.clock.elapsed(self.job.arrived);
            metrics::histogram!("baton_coordinator_ttft_seconds").record(ttft);
        }
        self.delivered = true;
        let (now, record) = (self.shared.clock.now(), &self.shared.record);
        self.job.recording.delivered(batch.tokens.len(), now, record);
        metrics::counter!("baton_coordinator_tokens_total").increment(batch.tokens.len() as u64);
        if let Some(chunk) = self.text.push(batch) {
            self.send(GenerationEvent::Chunk(chunk));
        }
    }

    /// There is room for a chunk per token and the end; a client that is gone cancels by itself.
    fn send(&self, event: GenerationEvent) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.job.events.try_send(event) {
            tracing::error!(request_id = %self.job.request_id, "event channel is full");
            self.job.cancel.cancel();
        }
    }

    fn end(&mut self, outcome: Outcome) {
        let request_id = self.job.request_id;
        let elapsed_us = self.now_us();
        let (label, event) = match outcome {
            Outcome::Finished {
                reason,
                completion_tokens,
                cached_tokens,
                timeline,
            } => {
                if let Some(rest) = self.text.finish() {
                    self.send(GenerationEvent::Chunk(rest));
                }
                // A stop string may stand in the very tokens that came with another end.
                let (reason, completion_tokens) = match self.text.stopped() {
                    Some(counted) => (FinishReason::Stop, counted),
                    None => (reason, completion_tokens),
                };
                let prompt_tokens = u32::try_from(self.job.prepared.prompt.len()).unwrap_or(u32::MAX);
                let usage = Usage {
                    prompt_tokens,
                    completion_tokens: u32::try_from(completion_tokens).unwrap_or(u32::MAX),
                    // After a fault the tokens generated so far are prefilled too, and some of them may be cached.
                    cached_tokens: cached_tokens.min(prompt_tokens),
                };
                tracing::debug!(%request_id, ?reason, completion_tokens, elapsed_us, ?timeline, "request finished");
                self.job.recording.done();
                self.shared
                    .decisions
                    .ended(request_id, reason_label(reason), Some(&timeline));
                (
                    reason_label(reason),
                    GenerationEvent::Finished(Finished {
                        reason,
                        usage,
                        timeline,
                    }),
                )
            }
            Outcome::Failed(error) => {
                tracing::debug!(%request_id, elapsed_us, %error, "request failed");
                if error.code != ApiCode::InvalidArgument {
                    self.job.recording.lost();
                }
                self.shared.decisions.ended(request_id, code_label(error.code), None);
                (code_label(error.code), GenerationEvent::Failed(error))
            }
        };
        metrics::counter!("baton_coordinator_requests_total", "outcome" => label).increment(1);
        // The request is off the books before the client learns of its end, so that who counts afterwards counts right.
        (self.decode, self.prefill, self.held_decode, self.held_prefill) = (None, None, None, None);
        (self.moving, self.held_move, self.placing_move) = (None, None, None);
        self.job.entry.leave();
        (self.job.tenant_entry, self.job.waiting) = (None, None);
        self.send(event);
    }
}

fn transfer_peer(peer: Peer) -> v1::TransferPeer {
    v1::TransferPeer {
        node_id: peer.node.to_string(),
        instance: peer.instance.to_string(),
        addresses: peer.addresses,
    }
}

fn reason_label(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
    }
}

/// An error's kind, as metrics show it.
pub(super) fn code_label(code: ApiCode) -> &'static str {
    match code {
        ApiCode::InvalidArgument => "invalid_argument",
        ApiCode::Unauthenticated => "unauthenticated",
        ApiCode::NotFound => "not_found",
        ApiCode::ResourceExhausted => "resource_exhausted",
        ApiCode::Unavailable => "unavailable",
        ApiCode::DeadlineExceeded => "deadline_exceeded",
        ApiCode::Internal => "internal",
    }
}
