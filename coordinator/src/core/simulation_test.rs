//! A cluster in miniature whose nodes answer in any order, fail at any point, repeat themselves and fall silent. Whatever
//! happens, the client's stream has no gap and no repeat, and ends once.

use super::*;
use crate::{ApiCode, ApiError};
use baton_types::{Attempt, FinishReason, Instance, NodeId, Ticket, TokenLogprobs};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

const NODES: u64 = 3;

/// The token that every healthy node draws at an index.
fn token_at(index: usize) -> u32 {
    (index as u32) * 7 + 3
}

#[derive(Debug)]
struct Stream {
    coming: VecDeque<Event>,
    /// For a decode leg: what it opened with. For a prefill leg: whom it serves.
    ticket: Ticket,
    base: usize,
    committed: bool,
    attempt: Attempt,
    prefill: bool,
    started: bool,
}

struct World {
    request: Request,
    max_tokens: usize,
    logprobs: bool,
    streams: BTreeMap<Leg, Stream>,
    place: Option<Option<Instance>>,
    /// A decode node is wanted to move to.
    place_move: bool,
    /// Hand-overs that running decode nodes were told to make: who makes it, its name, the place of its last token.
    handing_on: Vec<(Leg, Ticket, usize)>,
    moves: usize,
    grace: bool,
    delivered: Vec<u32>,
    outcome: Option<Outcome>,
    opened: usize,
    legs: BTreeSet<Leg>,
}

fn failure(choice: u8) -> Failure {
    let kinds = [
        FailureKind::Died,
        FailureKind::Unreachable,
        FailureKind::Full { peer: false },
        FailureKind::Full { peer: true },
        FailureKind::Failed { peer: false },
        FailureKind::Failed { peer: true },
        FailureKind::Rejected,
        FailureKind::Deadline,
        FailureKind::Fatal,
    ];
    Failure {
        kind: kinds[choice as usize % kinds.len()],
        message: "simulated".into(),
    }
}

impl World {
    fn new(max_tokens: usize, logprobs: bool) -> Self {
        let (request, effects) = Request::new(RequestSpec {
            max_tokens,
            logprobs,
            eos_tokens: [].into(),
            prompt_tokens: 5,
            block_tokens: 2,
            move_ahead: 1,
        });
        let mut world = Self {
            request,
            max_tokens,
            logprobs,
            streams: BTreeMap::new(),
            place: None,
            place_move: false,
            handing_on: Vec::new(),
            moves: 0,
            grace: false,
            delivered: Vec::new(),
            outcome: None,
            opened: 0,
            legs: BTreeSet::new(),
        };
        world.perform(effects);
        world
    }

    fn logprobs_of(&self, tokens: usize) -> Vec<TokenLogprobs> {
        if self.logprobs {
            vec![TokenLogprobs::default(); tokens]
        } else {
            Vec::new()
        }
    }

    /// What a decode leg says once it owns the context, in two batches that overlap.
    fn rest(&self, leg: Leg, from: usize) -> VecDeque<Event> {
        let mut events = VecDeque::new();
        let batch = |first_index: usize, end: usize| TokenBatch {
            first_index,
            tokens: (first_index..end).map(token_at).collect(),
            logprobs: self.logprobs_of(end - first_index),
        };
        for index in (from..self.max_tokens).step_by(2) {
            let end = (index + 2).min(self.max_tokens);
            let first = index.saturating_sub(1).max(from);
            events.push_back(Event::Decode(
                leg,
                DecodeEvent::Tokens {
                    batch: batch(first, end),
                    local: None,
                },
            ));
        }
        let reason = FinishReason::Length;
        events.push_back(Event::Decode(
            leg,
            DecodeEvent::Finished {
                reason,
                decoded_tokens: 1,
                decode_us: 1,
            },
        ));
        events
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            assert!(self.outcome.is_none(), "{effect:?} after the end");
            match effect {
                Effect::Place { keep_decode } => self.place = Some(keep_decode),
                Effect::OpenDecode {
                    leg,
                    attempt,
                    local_prefill,
                    ..
                } => {
                    self.opened += 1;
                    self.legs.insert(leg);
                    let ticket = Ticket(u128::from(leg.0));
                    let base = self.request.generated().len();
                    let peer = Peer {
                        node: NodeId::new("d"),
                        instance: Instance(9),
                        addresses: Vec::new(),
                    };
                    let accepted = Event::Decode(leg, DecodeEvent::Accepted { ticket, peer });
                    let mut coming = VecDeque::from([accepted]);
                    if local_prefill {
                        coming.extend(self.rest(leg, base));
                    }
                    let stream = Stream {
                        coming,
                        ticket,
                        base,
                        committed: local_prefill,
                        attempt,
                        prefill: false,
                        started: false,
                    };
                    assert!(self.streams.insert(leg, stream).is_none());
                }
                Effect::OpenPrefill {
                    leg,
                    ticket,
                    attempt,
                    base,
                    ..
                } => {
                    self.legs.insert(leg);
                    let last = base + 1 == self.max_tokens;
                    let first = FirstToken {
                        index: base,
                        token: token_at(base),
                        logprobs: self.logprobs.then(TokenLogprobs::default),
                        finish: last.then_some(FinishReason::Length),
                        prefill_us: 1,
                        prefill_tokens: 1,
                    };
                    let started = PrefillEvent::Started {
                        queue_us: 1,
                        cached_tokens: 0,
                    };
                    let over = PrefillEvent::HandedOver(Handover {
                        path: "x".into(),
                        bytes: 1,
                        exposed_us: 1,
                        reserve_us: 1,
                        ..Handover::default()
                    });
                    let coming = [started, PrefillEvent::FirstToken(first), over].map(|e| Event::Prefill(leg, e));
                    let stream = Stream {
                        coming: coming.into(),
                        ticket,
                        base,
                        committed: false,
                        attempt,
                        prefill: true,
                        started: false,
                    };
                    assert!(self.streams.insert(leg, stream).is_none());
                }
                Effect::Supersede { leg, attempt } => {
                    self.streams.get_mut(&leg).expect("the leg is open").attempt = attempt;
                }
                Effect::PlaceMove => self.place_move = true,
                Effect::OpenMove { leg, ahead } => {
                    self.legs.insert(leg);
                    let ticket = Ticket(u128::from(leg.0));
                    let peer = Peer {
                        node: NodeId::new("d"),
                        instance: Instance(9),
                        addresses: Vec::new(),
                    };
                    let stream = Stream {
                        coming: [Event::Decode(leg, DecodeEvent::Accepted { ticket, peer })].into(),
                        ticket,
                        base: self.request.generated().len() + ahead,
                        committed: false,
                        attempt: Attempt::FIRST,
                        prefill: false,
                        started: false,
                    };
                    assert!(self.streams.insert(leg, stream).is_none());
                }
                Effect::HandOn {
                    leg,
                    ticket,
                    context_tokens,
                    known,
                    ..
                } => {
                    assert_eq!(context_tokens % 2, 0, "whole blocks");
                    let next = context_tokens - 5;
                    assert!(known < next && next + 1 < self.max_tokens);
                    assert!(self.streams.contains_key(&leg), "its node runs the sequence");
                    self.handing_on.push((leg, ticket, next));
                }
                Effect::Promote(leg) => {
                    self.moves += 1;
                    assert!(self.streams.contains_key(&leg));
                }
                Effect::Close(leg) => {
                    // It may have ended by itself, but no leg is closed that was never opened.
                    self.streams.remove(&leg);
                    assert!(self.legs.contains(&leg), "{leg:?} was never opened");
                }
                Effect::Deliver(batch) => {
                    assert_eq!(batch.first_index, self.delivered.len(), "gap or repeat");
                    assert!(!batch.tokens.is_empty());
                    assert_eq!(batch.logprobs.len(), if self.logprobs { batch.tokens.len() } else { 0 });
                    self.delivered.extend(batch.tokens);
                }
                Effect::NodeFailed { .. } | Effect::NodeFull(_) => {}
                Effect::StartGrace => self.grace = true,
                Effect::End(outcome) => self.outcome = Some(outcome),
            }
        }
    }

    fn tell(&mut self, event: Event) {
        let mut effects = Vec::new();
        self.request.on(event, 1, &mut effects);
        self.perform(effects);
    }

    /// A writer whose attempt the receiver still wants has everything there once its second event is out.
    fn commits(&mut self) {
        let writers: Vec<(Ticket, Attempt)> = self
            .streams
            .values()
            .filter(|s| s.prefill && s.started)
            .map(|s| (s.ticket, s.attempt))
            .collect();
        let mut committed = Vec::new();
        for (leg, stream) in &mut self.streams {
            let ready = !stream.prefill && !stream.committed && writers.contains(&(stream.ticket, stream.attempt));
            if ready {
                stream.committed = true;
                committed.push((*leg, stream.base, stream.attempt));
            }
        }
        for (leg, base, attempt) in committed {
            let index = base;
            let event = DecodeEvent::Committed {
                attempt,
                index,
                token: token_at(base),
                handover_bytes: 5,
                held_tokens: 0,
            };
            let mut events = VecDeque::from([Event::Decode(leg, event)]);
            events.extend(self.rest(leg, base + 1));
            if let Some(stream) = self.streams.get_mut(&leg) {
                stream.coming.extend(events);
            }
        }
    }

    /// A node that hands its sequence on says how that ended; where it went well, the other one has everything, whatever of
    /// the tokens before is still on its way to the coordinator.
    fn hand_on(&mut self, choice: u8) {
        let Some((from, ticket, next)) = self.handing_on.pop() else {
            return;
        };
        let to = self
            .streams
            .iter()
            .find(|(_, s)| s.ticket == ticket && !s.prefill && !s.committed);
        let to = to.map(|(leg, _)| *leg).filter(|_| self.streams.contains_key(&from));
        let went_well = choice.is_multiple_of(2) && to.is_some();
        if let (true, Some(to)) = (went_well, to) {
            let committed = DecodeEvent::Committed {
                attempt: Attempt::FIRST,
                index: next,
                token: token_at(next),
                handover_bytes: 5,
                held_tokens: 0,
            };
            let mut events = VecDeque::from([Event::Decode(to, committed)]);
            events.extend(self.rest(to, next + 1));
            let stream = self.streams.get_mut(&to).expect("found");
            stream.committed = true;
            stream.coming.extend(events);
        }
        let result = if went_well {
            Ok(Handover::default())
        } else {
            Err(failure(choice / 2))
        };
        if self.streams.contains_key(&from) {
            self.tell(Event::Decode(from, DecodeEvent::HandedOn { ticket, result }));
        }
    }

    fn place_to_move(&mut self, choice: u8) {
        if std::mem::take(&mut self.place_move) {
            let refused = self.request.not_moved_to();
            let mut nodes = (10..10 + NODES).filter(|id| !refused.contains(&Instance(*id)));
            match nodes.nth(usize::from(choice) % 2) {
                Some(id) => self.tell(Event::MovePlaced(Node {
                    id: NodeId::new(format!("n{id}")),
                    instance: Instance(id),
                })),
                None => self.place_move = true,
            }
        }
    }

    /// A decode node that runs a sequence is told to drain.
    fn drain(&mut self, choice: u8) {
        let running = |s: &&Stream| !s.prefill && s.committed && s.started;
        let legs: Vec<Leg> = self
            .streams
            .iter()
            .filter(|(_, s)| running(s))
            .map(|(leg, _)| *leg)
            .collect();
        if let Some(leg) = legs.get(usize::from(choice) % legs.len().max(1)) {
            self.tell(Event::Decode(*leg, DecodeEvent::Leaving));
        }
    }

    fn place(&mut self, choice: u8) {
        let Some(keep) = self.place.take() else { return };
        let free = |id: &u64| !self.request.excluded().contains(&Instance(*id));
        let node = |id: u64| Node {
            id: NodeId::new(format!("n{id}")),
            instance: Instance(id),
        };
        let prefill: Vec<u64> = (0..NODES).filter(free).collect();
        let decode: Vec<u64> = (10..10 + NODES).filter(free).collect();
        let kept = keep.map(|instance| instance.0).filter(|id| decode.contains(id));
        let decode = kept.or_else(|| decode.get(choice as usize % decode.len().max(1)).copied());
        let event = match (prefill.get(choice as usize % prefill.len().max(1)), decode) {
            (_, None) => Event::NotPlaced(ApiError::new(ApiCode::Unavailable, "no decode node is ready")),
            (None, Some(decode)) => Event::Placed(Placement::Alone { decode: node(decode) }),
            (Some(prefill), Some(decode)) => Event::Placed(Placement::Pair {
                prefill: node(*prefill),
                decode: node(decode),
            }),
        };
        self.tell(event);
    }

    fn step(&mut self, (what, choice): (u8, u8)) {
        self.commits();
        let legs: Vec<Leg> = self.streams.keys().copied().collect();
        let leg = (!legs.is_empty()).then(|| legs[choice as usize % legs.len()]);
        match (what, leg) {
            (0..=1, Some(leg)) => {
                let prefill = self.streams.remove(&leg).expect("listed").prefill;
                let failure = failure(choice / 8);
                self.tell(if prefill {
                    Event::Prefill(leg, PrefillEvent::Failed(failure))
                } else {
                    Event::Decode(leg, DecodeEvent::Failed(failure))
                });
            }
            (2, _) if std::mem::take(&mut self.grace) => self.tell(Event::GraceOver),
            (3, _) if choice < 8 => self.tell(Event::Cancelled),
            (3, _) if choice < 16 => self.tell(Event::DeadlinePassed),
            (4..=30, _) => self.place(choice),
            (31..=36, _) => self.drain(choice),
            (37..=44, _) => self.place_to_move(choice),
            (45..=52, _) => self.hand_on(choice),
            (_, Some(leg)) => {
                let stream = self.streams.get_mut(&leg).expect("listed");
                let Some(event) = stream.coming.pop_front() else { return };
                stream.started = true;
                self.tell(event);
            }
            (_, None) => {}
        }
    }

    /// Lets everything that is still coming come, in order; nothing fails any more.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.outcome.is_some() {
                return;
            }
            self.commits();
            self.place(0);
            self.hand_on(0);
            let next = self
                .streams
                .iter()
                .find(|(_, s)| !s.coming.is_empty())
                .map(|(leg, _)| *leg);
            match next {
                Some(leg) => {
                    let stream = self.streams.get_mut(&leg).expect("found");
                    stream.started = true;
                    let event = stream.coming.pop_front().expect("not empty");
                    self.tell(event);
                }
                None if std::mem::take(&mut self.grace) => self.tell(Event::GraceOver),
                None => {}
            }
        }
        panic!("it hangs: {:?} with {:?}", self.request, self.streams);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn every_stream_is_whole_and_ends_once(
        max_tokens in 1usize..16,
        logprobs: bool,
        steps in proptest::collection::vec((0u8..120, any::<u8>()), 0..80),
    ) {
        let mut world = World::new(max_tokens, logprobs);
        for step in steps {
            if world.outcome.is_none() {
                world.step(step);
            }
        }
        world.settle();
        let expected: Vec<u32> = (0..world.delivered.len()).map(token_at).collect();
        prop_assert_eq!(&world.delivered, &expected);
        prop_assert!(world.streams.is_empty(), "left open: {:?}", world.streams);
        match world.outcome.as_ref().expect("settled") {
            Outcome::Finished { reason: FinishReason::Length, completion_tokens, timeline, .. } => {
                prop_assert_eq!(world.delivered.len(), max_tokens);
                prop_assert_eq!(*completion_tokens, max_tokens);
                prop_assert!(timeline.attempts <= 3);
            }
            Outcome::Finished { reason, completion_tokens, .. } => {
                prop_assert_eq!(*reason, FinishReason::Cancelled);
                prop_assert_eq!(*completion_tokens, world.delivered.len());
            }
            Outcome::Failed(_) => {}
        }
    }

    /// Draining node after node under a request costs it nothing: not a token, not an attempt.
    #[test]
    fn moves_alone_cost_no_attempt(max_tokens in 6usize..40, logprobs: bool, order in proptest::collection::vec(any::<u8>(), 0..120)) {
        let mut world = World::new(max_tokens, logprobs);
        for choice in order {
            if world.outcome.is_none() {
                let what = match choice % 8 {
                    0 => 31,
                    1 | 2 => 37,
                    3 | 4 => 45,
                    5 => 4,
                    _ => 100,
                };
                // Even choices hand on well.
                world.step((what, choice / 8 * 2));
            }
        }
        world.settle();
        prop_assert_eq!(world.delivered.len(), max_tokens);
        prop_assert_eq!(world.opened, 1);
        let Some(Outcome::Finished { timeline, .. }) = &world.outcome else { panic!("{:?}", world.outcome) };
        prop_assert_eq!(timeline.attempts, 1);
        prop_assert_eq!(timeline.fallbacks.len(), world.moves);
    }

    /// Whatever happened before, what nobody touches any more ends well.
    #[test]
    fn without_faults_it_finishes(max_tokens in 1usize..9, logprobs: bool, order in proptest::collection::vec(any::<u8>(), 0..60)) {
        let mut world = World::new(max_tokens, logprobs);
        for choice in order {
            if world.outcome.is_none() {
                world.step((if choice % 3 == 0 { 4 } else { 100 }, choice));
            }
        }
        world.settle();
        prop_assert_eq!(world.delivered.len(), max_tokens);
        prop_assert_eq!(world.opened, 1);
    }
}
