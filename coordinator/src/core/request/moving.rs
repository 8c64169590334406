//! A running sequence on its way to another decode node, because its own wants to be rid of it.
//!
//! The other node takes over from a snapshot that the present one sends while it goes on: whole blocks up to a border ahead,
//! then the token that follows. So nothing stands still, and nothing is lost where the move fails: tokens come from the
//! present node until the other one has committed *and* everything before the token that it goes on from was delivered. What
//! both drew is delivered once. A move that fails is tried again a few times; a request that cannot be moved stays until its
//! node gives it up, and is then done anew like any other that lost its node.

use super::{Request, RequestSpec, Run};
use crate::core::event::{DecodeEvent, Effect, Failure, FailureKind, Leg, Node, Peer};
use baton_types::{Attempt, Instance, Ticket};

/// How often a request is tried to be moved away from one node. Where many go at once, some find their turn at the other node
/// too late and have to come again.
const MOVES_MAX: u32 = 8;

/// The move of the present sequence.
#[derive(Debug)]
pub(super) struct Moving {
    stage: Stage,
    tries: u32,
    /// Nodes that it failed with.
    refused: Vec<Instance>,
}

#[derive(Debug)]
enum Stage {
    /// A node is looked for.
    Placing,
    Open(Open),
    /// It stays where it is.
    GivenUp,
}

/// A node that was asked.
#[derive(Debug)]
struct Open {
    leg: Leg,
    node: Node,
    ticket: Option<Ticket>,
    /// Tokens that it was told when it was asked.
    known: usize,
    /// Place of the token that it goes on from.
    index: usize,
    committed: bool,
    /// What it said since.
    said: Vec<DecodeEvent>,
}

impl RequestSpec {
    /// How many generated tokens there are at the first border of a block that lies far enough behind so many.
    fn border_behind(&self, generated: usize) -> usize {
        let context = self.prompt_tokens + generated + self.move_ahead.max(1);
        context.next_multiple_of(self.block_tokens.max(1)) - self.prompt_tokens
    }
}

impl Request {
    /// Nodes that the sequence must not be moved to.
    pub(crate) fn not_moved_to(&self) -> Vec<Instance> {
        let refused = self.moving.iter().flat_map(|moving| &moving.refused);
        let present = self.run.iter().map(|run| &run.decode_node.instance);
        self.excluded.iter().chain(refused).chain(present).copied().collect()
    }

    /// Its decode node wants to be rid of it.
    pub(super) fn leaving(&mut self) {
        let runs = self
            .run
            .as_ref()
            .is_some_and(|run| (run.committed || run.alone) && run.finished.is_none());
        if runs && self.moving.is_none() {
            self.moving = Some(Moving {
                stage: Stage::Placing,
                tries: 0,
                refused: Vec::new(),
            });
            self.effects.push(Effect::PlaceMove);
        }
    }

    pub(super) fn move_placed(&mut self, node: Node) {
        let known = self.generated.len();
        let index = self.spec.border_behind(known);
        let leg = Leg(self.legs);
        let Some(moving) = &mut self.moving else { return };
        if !matches!(moving.stage, Stage::Placing) {
            return;
        }
        if index + 1 >= self.spec.max_tokens {
            // It is as good as done.
            moving.stage = Stage::GivenUp;
            return;
        }
        self.legs += 1;
        moving.tries += 1;
        self.effects.push(Effect::OpenMove {
            leg,
            ahead: index - known,
        });
        moving.stage = Stage::Open(Open {
            leg,
            node,
            ticket: None,
            known,
            index,
            committed: false,
            said: Vec::new(),
        });
    }

    /// The stream to the node that is to take over.
    pub(super) fn is_move(&self, leg: Leg) -> bool {
        self.open_move().is_some_and(|open| open.leg == leg)
    }

    fn open_move(&self) -> Option<&Open> {
        match &self.moving {
            Some(Moving {
                stage: Stage::Open(open),
                ..
            }) => Some(open),
            _ => None,
        }
    }

    /// The node that is to take over speaks.
    pub(super) fn move_said(&mut self, event: DecodeEvent) {
        let (Some(run), Some(moving)) = (&self.run, &mut self.moving) else {
            return;
        };
        let Stage::Open(open) = &mut moving.stage else { return };
        let known = self.generated.get(open.index);
        match event {
            DecodeEvent::Accepted { ticket, peer } => {
                if open.ticket.is_none() {
                    open.ticket = Some(ticket);
                    let effect = hand_on(run, open, ticket, peer, self.spec.prompt_tokens);
                    self.effects.push(effect);
                }
            }
            DecodeEvent::Committed {
                attempt, index, token, ..
            } => {
                let right = attempt == Attempt::FIRST && index == open.index && !open.committed;
                if right && known.is_none_or(|known| *known == token) {
                    open.committed = true;
                } else {
                    self.give_move_up(true, None);
                }
            }
            DecodeEvent::Failed(failure) => {
                let at_fault = !matches!(
                    failure.kind,
                    FailureKind::Full { peer: true } | FailureKind::Failed { peer: true }
                );
                self.give_move_up(at_fault, Some(failure));
            }
            said if open.committed => open.said.push(said),
            _ => self.give_move_up(true, None),
        }
    }

    /// The present node says that it could not hand the sequence on.
    pub(super) fn not_handed_on(&mut self, ticket: Ticket, failure: Failure) {
        let open = self.open_move();
        if open.is_some_and(|open| open.ticket == Some(ticket) && !open.committed) {
            let peer = matches!(
                failure.kind,
                FailureKind::Full { peer: true } | FailureKind::Failed { peer: true }
            );
            let told = matches!(failure.kind, FailureKind::Full { .. }).then_some(failure);
            self.give_move_up(peer, told);
        }
    }

    /// Asks another node, or the same where `at_fault` is not that one, as long as the bounds allow.
    fn give_move_up(&mut self, at_fault: bool, failure: Option<Failure>) {
        let Some(moving) = &mut self.moving else { return };
        let Stage::Open(open) = std::mem::replace(&mut moving.stage, Stage::GivenUp) else {
            return;
        };
        self.effects.push(Effect::Close(open.leg));
        let kind = failure.as_ref().map(|failure| failure.kind);
        match kind {
            Some(FailureKind::Full { .. }) if at_fault => self.effects.push(Effect::NodeFull(open.node)),
            Some(FailureKind::Died | FailureKind::Unreachable) => {
                moving.refused.push(open.node.instance);
                let message = failure.map(|failure| failure.message).unwrap_or_default();
                self.effects.push(Effect::NodeFailed {
                    node: open.node,
                    message,
                });
            }
            _ if at_fault => moving.refused.push(open.node.instance),
            _ => {}
        }
        if moving.tries < MOVES_MAX {
            moving.stage = Stage::Placing;
            self.effects.push(Effect::PlaceMove);
        }
    }

    /// Ends the move, because its sequence has ended.
    pub(super) fn close_move(&mut self) {
        if let Some(Moving {
            stage: Stage::Open(open),
            ..
        }) = self.moving.take()
        {
            self.effects.push(Effect::Close(open.leg));
        }
    }

    /// Goes over to the other node once it has committed and the client has the token that it goes on from.
    pub(super) fn take_over(&mut self) {
        let delivered = self.generated.len();
        let ready = self
            .open_move()
            .is_some_and(|open| open.committed && delivered > open.index);
        let idle = self
            .run
            .as_ref()
            .is_some_and(|run| run.held_back.is_empty() && run.finished.is_none());
        if !ready || !idle {
            return;
        }
        let Some(Moving {
            stage: Stage::Open(open),
            ..
        }) = self.moving.take()
        else {
            return;
        };
        self.close_prefill();
        let Some(before) = self.run.take() else { return };
        let (from, to, index) = (&before.decode_node.id, &open.node.id, open.index);
        self.times.moved(
            to.as_str(),
            format!("{from} is draining: {to} goes on from token {index}"),
        );
        self.effects.push(Effect::Close(before.decode));
        self.effects.push(Effect::Promote(open.leg));
        self.run = Some(Run {
            base: index,
            decode: open.leg,
            decode_node: open.node,
            attempt: Attempt::FIRST,
            alone: false,
            accepted: None,
            prefill_node: None,
            prefill: None,
            committed: true,
            held_back: Vec::new(),
            held_back_logprobs: Vec::new(),
            finished: None,
        });
        for event in open.said {
            if self.ended || self.run.as_ref().is_none_or(|run| run.decode != open.leg) {
                return;
            }
            self.decode(event);
        }
    }
}

fn hand_on(run: &Run, open: &Open, ticket: Ticket, peer: Peer, prompt_tokens: usize) -> Effect {
    Effect::HandOn {
        leg: run.decode,
        ticket,
        peer,
        context_tokens: prompt_tokens + open.index,
        known: open.known,
    }
}
