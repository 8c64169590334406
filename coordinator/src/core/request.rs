//! One request: its nodes, its attempts and the one stream that the client sees.
//!
//! Invariants, whatever the order of events: tokens are delivered with indexes 0, 1, 2 ... without gap or repeat; there is
//! exactly one `End` and nothing after it; when it comes, every leg that was opened is closed or has ended by itself;
//! at most [`ATTEMPTS_MAX`] attempts are made, and none after two nodes died. A sequence that is moved because its node
//! drains (`moving`) is still the same attempt.
//!
//! This state is owned by the driver's task of the request.

mod moving;

use super::event::{
    DecodeEvent, Effect, Event, Failure, FailureKind, FirstToken, Leg, LocalPrefill, Node, Outcome, Peer, Placement,
    PrefillEvent, TokenBatch,
};
use super::times::Times;
use crate::{ApiCode, ApiError};
use baton_types::{Attempt, FinishReason, Instance, Ticket};
use moving::Moving;
use std::sync::Arc;
use std::time::Duration;

/// Pairs of nodes that one request may be tried on.
pub(crate) const ATTEMPTS_MAX: u32 = 3;
/// Nodes that may die under one request before it is taken for the cause.
const DEATHS_MAX: usize = 2;
/// When a client may ask again after its nodes failed.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The decode node repeats the first token, but only the prefill node knows its probability.
const LOST_LOGPROBS: &str = "the first token's probability was lost with its prefill node";

/// What the machine needs to know of a request.
#[derive(Debug, Clone)]
pub(crate) struct RequestSpec {
    /// At most so many tokens.
    pub(crate) max_tokens: usize,
    /// Each token comes with its probability.
    pub(crate) logprobs: bool,
    /// Tokens that end the generation; none where they are to be ignored.
    pub(crate) eos_tokens: Arc<[u32]>,
    /// Tokens of the prompt.
    pub(crate) prompt_tokens: usize,
    /// Tokens of a KV block.
    pub(crate) block_tokens: usize,
    /// A sequence that is moved is handed over up to a block's border at least so many tokens ahead: it gets there while
    /// the other node is asked.
    pub(crate) move_ahead: usize,
}

/// The present attempt.
#[derive(Debug)]
struct Run {
    /// Tokens that were delivered when the decode node was asked: the index of the first that this run draws.
    base: usize,
    decode: Leg,
    decode_node: Node,
    attempt: Attempt,
    alone: bool,
    accepted: Option<(Ticket, Peer)>,
    /// Chosen, and asked once the decode node has accepted.
    prefill_node: Option<Node>,
    prefill: Option<Leg>,
    committed: bool,
    /// Tokens of the decode node that wait for the first token's probability.
    held_back: Vec<u32>,
    held_back_logprobs: Vec<baton_types::TokenLogprobs>,
    /// The decode node is done; only figures are still waited for.
    finished: Option<FinishReason>,
}

/// The machine.
#[derive(Debug)]
pub(crate) struct Request {
    spec: RequestSpec,
    /// What the client has.
    generated: Vec<u32>,
    run: Option<Run>,
    moving: Option<Moving>,
    placing: bool,
    ended: bool,
    legs: u32,
    excluded: Vec<Instance>,
    died: Vec<Instance>,
    times: Times,
    now_us: u64,
    effects: Vec<Effect>,
}

impl Request {
    /// A request that wants nodes: the first effects ask for them.
    pub(crate) fn new(spec: RequestSpec) -> (Self, Vec<Effect>) {
        let this = Self {
            spec,
            generated: Vec::new(),
            run: None,
            moving: None,
            placing: true,
            ended: false,
            legs: 0,
            excluded: Vec::new(),
            died: Vec::new(),
            times: Times::default(),
            now_us: 0,
            effects: Vec::new(),
        };
        (this, vec![Effect::Place { keep_decode: None }])
    }

    /// Tokens that the client has.
    pub(crate) fn generated(&self) -> &[u32] {
        &self.generated
    }

    /// Nodes that failed under this request.
    pub(crate) fn excluded(&self) -> &[Instance] {
        &self.excluded
    }

    /// Takes an event that happened `now_us` after the request's arrival; appends what is to be done, in order.
    pub(crate) fn on(&mut self, event: Event, now_us: u64, effects: &mut Vec<Effect>) {
        if self.ended {
            return;
        }
        self.now_us = now_us;
        match event {
            Event::Placed(placement) => self.placed(placement),
            Event::NotPlaced(error) => self.not_placed(error),
            Event::Decode(leg, event) if self.run.as_ref().is_some_and(|run| run.decode == leg) => self.decode(event),
            Event::Prefill(leg, event) if self.run.as_ref().is_some_and(|run| run.prefill == Some(leg)) => {
                self.prefill(event);
            }
            Event::Decode(leg, event) if self.is_move(leg) => self.move_said(event),
            Event::Decode(..) | Event::Prefill(..) => {}
            Event::MovePlaced(node) => self.move_placed(node),
            Event::Stopped { completion_tokens } => self.finish(FinishReason::Stop, completion_tokens),
            Event::Cancelled => self.finish(FinishReason::Cancelled, self.generated.len()),
            Event::DeadlinePassed => self.fail(ApiError::new(ApiCode::DeadlineExceeded, "the request's time is over")),
            Event::GraceOver => self.finish_if_done(true),
        }
        self.take_over();
        effects.append(&mut self.effects);
    }

    fn placed(&mut self, placement: Placement) {
        if !std::mem::take(&mut self.placing) {
            return;
        }
        self.times.attempt();
        match placement {
            Placement::Pair { prefill, decode } => {
                match self.run.as_mut().filter(|run| run.decode_node == decode) {
                    Some(kept) => kept.prefill_node = Some(prefill),
                    None => self.open_decode(decode, Some(prefill)),
                }
                self.open_prefill_when_accepted();
            }
            Placement::Alone { decode } => self.open_decode(decode, None),
        }
    }

    fn not_placed(&mut self, error: ApiError) {
        if !std::mem::take(&mut self.placing) {
            return;
        }
        let error = match self.times.last_fallback() {
            Some(why) => ApiError {
                message: format!("{why}; then: {}", error.message),
                ..error
            },
            None => error,
        };
        self.fail(error);
    }

    fn open_decode(&mut self, node: Node, prefill_node: Option<Node>) {
        self.close_run();
        let alone = prefill_node.is_none();
        let leg = self.next_leg();
        self.times.decode_chosen(node.id.as_str());
        if alone {
            self.times.prefill_asked(node.id.as_str(), self.now_us);
        }
        let attempt = Attempt::FIRST;
        self.effects.push(Effect::OpenDecode {
            leg,
            node: node.clone(),
            attempt,
            local_prefill: alone,
        });
        self.run = Some(Run {
            base: self.generated.len(),
            decode: leg,
            decode_node: node,
            attempt,
            alone,
            accepted: None,
            prefill_node,
            prefill: None,
            committed: false,
            held_back: Vec::new(),
            held_back_logprobs: Vec::new(),
            finished: None,
        });
    }

    fn open_prefill_when_accepted(&mut self) {
        let leg = Leg(self.legs);
        let Some(run) = &mut self.run else { return };
        let (Some(node), Some((ticket, peer)), None) = (&run.prefill_node, &run.accepted, run.prefill) else {
            return;
        };
        self.legs += 1;
        self.times.prefill_asked(node.id.as_str(), self.now_us);
        self.effects.push(Effect::OpenPrefill {
            leg,
            node: node.clone(),
            ticket: *ticket,
            attempt: run.attempt,
            peer: peer.clone(),
            base: run.base,
        });
        run.prefill = Some(leg);
    }

    fn decode(&mut self, event: DecodeEvent) {
        match event {
            DecodeEvent::Accepted { ticket, peer } => {
                if let Some(run) = self.run.as_mut().filter(|run| run.accepted.is_none()) {
                    run.accepted = Some((ticket, peer));
                    self.open_prefill_when_accepted();
                }
            }
            DecodeEvent::Committed {
                attempt,
                index,
                token,
                handover_bytes,
                held_tokens,
            } => {
                self.times.committed(handover_bytes, held_tokens);
                self.committed(attempt, index, token);
            }
            DecodeEvent::Tokens { batch, local } => self.tokens(batch, local),
            DecodeEvent::Finished {
                reason,
                decoded_tokens,
                decode_us,
            } => {
                self.times.decoded(decoded_tokens, decode_us);
                self.decode_finished(reason);
            }
            DecodeEvent::Leaving => self.leaving(),
            DecodeEvent::HandedOn { ticket, result } => {
                if let Err(failure) = result {
                    self.not_handed_on(ticket, failure);
                }
            }
            DecodeEvent::Failed(failure) => self.decode_failed(failure),
        }
    }

    /// The decode node owns the first token's context. An earlier attempt than the present one may have won the latch: the
    /// present one is not needed then.
    fn committed(&mut self, attempt: Attempt, index: usize, token: u32) {
        let Some(run) = &mut self.run else { return };
        if run.alone || run.committed || attempt > run.attempt || index != run.base {
            return self.decode_broke_the_rules(format!("it committed attempt {} at token {index}", attempt.0));
        }
        run.committed = true;
        self.placing = false;
        if attempt < run.attempt
            && let Some(leg) = run.prefill.take()
        {
            self.effects.push(Effect::Close(leg));
        }
        if self.generated.len() > index {
            if self.generated[index] != token {
                self.diverged(index);
            }
        } else if self.spec.logprobs {
            let prefill_may_tell = run.prefill.is_some();
            run.held_back.push(token);
            if !prefill_may_tell {
                self.retry(Some(LOST_LOGPROBS.to_owned()), false);
            }
        } else {
            self.deliver(TokenBatch {
                first_index: index,
                tokens: vec![token],
                logprobs: Vec::new(),
            });
        }
    }

    fn tokens(&mut self, batch: TokenBatch, local: Option<LocalPrefill>) {
        let Some(run) = &mut self.run else { return };
        if !run.alone && !run.committed {
            return self.decode_broke_the_rules("it sent tokens before it committed".to_owned());
        }
        if run.finished.is_some() {
            return self.decode_broke_the_rules("it sent tokens after the end".to_owned());
        }
        if self.spec.logprobs && batch.logprobs.len() != batch.tokens.len() {
            return self.decode_broke_the_rules("tokens came without their probabilities".to_owned());
        }
        if let Some(local) = local {
            self.times.prefilled_locally(local);
        }
        let (delivered, have) = (self.generated.len(), self.generated.len() + run.held_back.len());
        if batch.first_index > have {
            return self.decode_broke_the_rules(format!("after {have} tokens came number {}", batch.first_index));
        }
        if batch.first_index + batch.tokens.len() > self.spec.max_tokens {
            return self.decode_broke_the_rules("it sent more tokens than were asked for".to_owned());
        }
        let known = self.generated.iter().chain(&run.held_back).skip(batch.first_index);
        if let Some(at) = batch.tokens.iter().zip(known).position(|(came, known)| came != known) {
            return self.diverged(batch.first_index + at);
        }
        let repeated = (have - batch.first_index).min(batch.tokens.len());
        let (mut tokens, mut logprobs) = (batch.tokens, batch.logprobs);
        tokens.drain(..repeated);
        logprobs.drain(..repeated.min(logprobs.len()));
        if tokens.is_empty() {
            return;
        }
        if run.held_back.is_empty() {
            self.deliver(TokenBatch {
                first_index: delivered,
                tokens,
                logprobs,
            });
        } else {
            run.held_back.append(&mut tokens);
            run.held_back_logprobs.append(&mut logprobs);
        }
    }

    fn decode_finished(&mut self, reason: FinishReason) {
        let Some(run) = &mut self.run else { return };
        if run.finished.is_some() || !(run.alone || run.committed) {
            return self.decode_broke_the_rules("it ended before it had begun".to_owned());
        }
        if reason == FinishReason::Cancelled {
            return self.decode_broke_the_rules("it cancelled what nobody had asked it to cancel".to_owned());
        }
        run.finished = Some(reason);
        self.finish_if_done(false);
        if !self.ended {
            self.effects.push(Effect::StartGrace);
        }
    }

    /// Ends the request once the decode node has said so and the prefill node's last figures are in, or not waited for.
    fn finish_if_done(&mut self, no_more_waiting: bool) {
        let Some(run) = &self.run else { return };
        let Some(reason) = run.finished else { return };
        if run.prefill.is_none() || (no_more_waiting && run.held_back.is_empty()) {
            return self.finish(reason, self.generated.len());
        }
        if no_more_waiting {
            self.retry(Some(LOST_LOGPROBS.to_owned()), false);
        }
    }

    fn decode_failed(&mut self, failure: Failure) {
        let Some(run) = &self.run else { return };
        if run.finished.is_some() {
            return; // its stream ends behind its last word, while the prefill node's figures are still waited for
        }
        let (node, prefill_node) = (run.decode_node.clone(), run.prefill_node.clone());
        let before_commit = !run.committed && !run.alone;
        let blamed = match failure.kind {
            FailureKind::Full { peer: true } | FailureKind::Failed { peer: true } if before_commit => prefill_node,
            _ => None,
        };
        self.node_failed(node, blamed, failure, false);
    }

    fn prefill(&mut self, event: PrefillEvent) {
        match event {
            PrefillEvent::Started {
                queue_us,
                cached_tokens,
            } => self.times.prefill_started(queue_us, cached_tokens),
            PrefillEvent::FirstToken(first) => self.first_token(first),
            PrefillEvent::HandedOver { .. }
                if self.run.as_ref().is_some_and(|run| self.generated.len() <= run.base) =>
            {
                let message = "it handed over before it told the first token".to_owned();
                self.prefill_failed(Failure {
                    kind: FailureKind::Failed { peer: false },
                    message,
                });
            }
            PrefillEvent::HandedOver(handover) => {
                self.times.handed_over(handover);
                self.close_prefill();
                self.finish_if_done(false);
            }
            PrefillEvent::Failed(failure) => self.prefill_failed(failure),
        }
    }

    fn first_token(&mut self, first: FirstToken) {
        let Some(run) = &mut self.run else { return };
        self.times.prefilled(first.prefill_us, first.prefill_tokens);
        if first.index != run.base || (self.spec.logprobs && first.logprobs.is_none()) {
            let message = format!(
                "it sent token {} where {} was due, or no probability",
                first.index, run.base
            );
            return self.prefill_failed(Failure {
                kind: FailureKind::Failed { peer: false },
                message,
            });
        }
        let known = self.generated.get(first.index).or(run.held_back.first());
        if known.is_some_and(|known| *known != first.token) {
            return self.diverged(first.index);
        }
        if self.generated.len() == first.index {
            let (mut tokens, mut logprobs) = (vec![first.token], Vec::from_iter(first.logprobs));
            tokens.extend(std::mem::take(&mut run.held_back).into_iter().skip(1));
            logprobs.append(&mut run.held_back_logprobs);
            self.deliver(TokenBatch {
                first_index: first.index,
                tokens,
                logprobs,
            });
        }
        match first.finish {
            Some(reason) => self.finish(reason, self.generated.len()),
            None => self.finish_if_done(false),
        }
    }

    fn prefill_failed(&mut self, failure: Failure) {
        let Some(run) = &self.run else { return };
        if run.committed && run.held_back.is_empty() {
            // Its work is done; only figures are lost.
            self.close_prefill();
            return self.finish_if_done(false);
        }
        let Some(node) = run.prefill_node.clone() else { return };
        let (decode_node, committed) = (run.decode_node.clone(), run.committed);
        let blamed = match failure.kind {
            FailureKind::Full { peer: true } | FailureKind::Failed { peer: true } => Some(decode_node),
            _ => None,
        };
        let keep_decode = blamed.is_none() && !committed;
        self.node_failed(node, blamed, failure, keep_decode);
    }

    /// `node` reported or suffered the failure; `blamed` is the other one where that is at fault.
    fn node_failed(&mut self, node: Node, blamed: Option<Node>, failure: Failure, keep_decode: bool) {
        let why = format!("{} failed: {}", node.id, failure.message);
        let at_fault = blamed.unwrap_or_else(|| node.clone());
        match failure.kind {
            FailureKind::Rejected => {
                return self.fail(ApiError::new(ApiCode::InvalidArgument, failure.message));
            }
            FailureKind::Fatal => return self.fail(ApiError::new(ApiCode::Internal, why)),
            FailureKind::Deadline => {
                return self.fail(ApiError::new(ApiCode::DeadlineExceeded, "the request's time is over"));
            }
            FailureKind::Full { .. } => {
                self.times.attempt_was_refused();
                self.effects.push(Effect::NodeFull(at_fault));
                return self.retry(None, keep_decode);
            }
            FailureKind::Died => {
                if !self.died.contains(&node.instance) {
                    self.died.push(node.instance);
                }
                self.exclude(at_fault, &failure.message);
            }
            FailureKind::Unreachable | FailureKind::Failed { .. } => self.exclude(at_fault, &failure.message),
        }
        self.retry(Some(why), keep_decode);
    }

    fn exclude(&mut self, node: Node, message: &str) {
        if !self.excluded.contains(&node.instance) {
            self.excluded.push(node.instance);
            self.effects.push(Effect::NodeFailed {
                node,
                message: message.to_owned(),
            });
        }
    }

    /// Two nodes drew different tokens for one place: the attempt is given up rather than spliced, and another goes on from
    /// what the client has. Nobody is at fault where their numerics differ, so nobody is excluded.
    fn diverged(&mut self, index: usize) {
        self.retry(
            Some(format!("token {index} came out different on the decode node")),
            false,
        );
    }

    fn decode_broke_the_rules(&mut self, message: String) {
        self.decode_failed(Failure {
            kind: FailureKind::Failed { peer: false },
            message,
        });
    }

    /// Looks for other nodes, where the bounds allow. `why`: none where a node only had no place, which is no failure.
    fn retry(&mut self, why: Option<String>, keep_decode: bool) {
        // The last token may have been the end, and only the word that it was is missing.
        if self.generated.len() >= self.spec.max_tokens {
            return self.finish(FinishReason::Length, self.generated.len());
        }
        if self
            .generated
            .last()
            .is_some_and(|last| self.spec.eos_tokens.contains(last))
        {
            return self.finish(FinishReason::Stop, self.generated.len());
        }
        if let Some(why) = why {
            if self.died.len() >= DEATHS_MAX {
                let message = format!("{} nodes died under this request; {why}", self.died.len());
                return self.fail(ApiError::new(ApiCode::Internal, message));
            }
            if self.times.attempts() >= ATTEMPTS_MAX {
                let message = format!("{ATTEMPTS_MAX} attempts failed; {why}");
                return self.fail(ApiError::new(ApiCode::Unavailable, message).retry_after(RETRY_AFTER));
            }
            self.times.fallback(why);
        }
        if keep_decode && let Some(run) = &mut self.run {
            run.prefill_node = None;
            run.attempt = run.attempt.next();
            let (leg, attempt, instance) = (run.decode, run.attempt, run.decode_node.instance);
            self.close_prefill();
            self.effects.push(Effect::Supersede { leg, attempt });
            self.effects.push(Effect::Place {
                keep_decode: Some(instance),
            });
        } else {
            self.close_run();
            self.effects.push(Effect::Place { keep_decode: None });
        }
        self.placing = true;
    }

    fn deliver(&mut self, batch: TokenBatch) {
        self.generated.extend_from_slice(&batch.tokens);
        self.times.delivered(self.now_us);
        self.effects.push(Effect::Deliver(batch));
    }

    fn finish(&mut self, reason: FinishReason, completion_tokens: usize) {
        let cached_tokens = self.times.cached_tokens();
        let timeline = self.times.finish(self.generated.len());
        self.end(Outcome::Finished {
            reason,
            completion_tokens,
            cached_tokens,
            timeline,
        });
    }

    fn fail(&mut self, error: ApiError) {
        self.end(Outcome::Failed(error));
    }

    fn end(&mut self, outcome: Outcome) {
        self.close_run();
        self.ended = true;
        self.effects.push(Effect::End(outcome));
    }

    fn close_run(&mut self) {
        self.close_prefill();
        self.close_move();
        if let Some(run) = self.run.take() {
            self.effects.push(Effect::Close(run.decode));
        }
    }

    fn close_prefill(&mut self) {
        if let Some(leg) = self.run.as_mut().and_then(|run| run.prefill.take()) {
            self.effects.push(Effect::Close(leg));
        }
    }

    fn next_leg(&mut self) -> Leg {
        let leg = Leg(self.legs);
        self.legs += 1;
        leg
    }
}
