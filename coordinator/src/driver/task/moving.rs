//! What the task does for a sequence that is moved to another decode node.

use super::{DecodeLeg, Task, transfer_peer};
use crate::core::{DecodeEvent, Event, Handover, Leg, Peer};
use crate::driver::legs;
use crate::driver::placement::MoveRequest;
use crate::membership::{Candidate, Claim};
use baton_proto::convert::ticket_bytes;
use baton_proto::v1::{self, decode_command::Command};
use baton_types::{Attempt, Instance, Ticket};
use std::sync::Arc;
use std::time::Duration;

/// A sequence that is moved is handed over up to a block's border at least so many tokens ahead: what asking the other node
/// takes, at a few milliseconds a token.
pub(super) const AHEAD: usize = 8;

fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

impl Task {
    pub(super) fn place_move(&mut self) {
        self.held_move = None;
        let Some(present) = &self.decode else { return };
        let request = MoveRequest {
            model: self.job.model.card.name.clone(),
            numerics: present.numerics.clone(),
            context_tokens: count(self.job.prepared.prompt.len() + self.request.generated().len()),
            excluded: self.request.not_moved_to(),
        };
        let shared = Arc::clone(&self.shared);
        self.placing_move = Some(Box::pin(async move { shared.placer.place_move(request).await }));
    }

    pub(super) fn open_move(&mut self, leg: Leg, ahead: usize) {
        let (candidate, claim) = self
            .held_move
            .take()
            .expect("nodes are opened only as placement chose them");
        let base = self.request.generated().len();
        // Blocks that another arithmetic named cannot be named after this one: the node is told of none then.
        let named_after = self.decode.as_ref().map(|present| present.named_after.clone());
        let mut work = self.work(Ticket::random(), Attempt::FIRST, base, &candidate.numerics);
        if named_after.as_ref() != Some(&candidate.numerics) {
            work.block_hashes.clear();
        }
        let open = v1::DecodeOpen {
            work: Some(work),
            local_prefill: false,
            instance: candidate.node.instance.to_string(),
            ahead: count(ahead),
        };
        let (commands, events) = legs::decode(candidate.channel.clone(), open);
        self.moving = Some(DecodeLeg {
            leg,
            instance: candidate.node.instance,
            commands,
            events,
            claim,
            named_after: candidate.numerics.clone(),
            numerics: candidate.numerics,
        });
    }

    pub(super) fn move_placed(&mut self, placed: (Candidate, Claim)) -> Event {
        self.placing_move = None;
        let node = placed.0.node.clone();
        self.held_move = Some(placed);
        Event::MovePlaced(node)
    }

    pub(super) fn hand_on(&mut self, leg: Leg, ticket: Ticket, peer: Peer, context_tokens: usize, known: usize) {
        let command = v1::HandOn {
            ticket: ticket_bytes(ticket),
            attempt: Attempt::FIRST.0,
            decode: Some(transfer_peer(peer)),
            context_tokens: count(context_tokens),
            known_tokens: count(known),
        };
        self.command(leg, Command::HandOn(command));
    }

    /// The present node has handed the sequence on.
    pub(super) fn handed_on(&self, from: Instance, handover: &Handover) {
        let Some(moving) = &self.moving else { return };
        let exposed = Duration::from_micros(handover.exposed_us);
        let members = &self.shared.members;
        members.handed_over(from, moving.instance, handover.bytes, exposed);
    }

    pub(super) fn move_said(&mut self, event: DecodeEvent) -> Event {
        let Some(leg) = &mut self.moving else {
            return Event::GraceOver;
        };
        if matches!(event, DecodeEvent::Committed { .. }) {
            leg.claim.started();
        }
        Event::Decode(leg.leg, event)
    }
}
