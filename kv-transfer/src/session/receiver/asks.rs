//! Reserving late: the queue of senders that want blocks, and what becomes of their asks.
//!
//! Order: by deadline, but an ask that has waited `ageing` goes before all that came later. The first that does not fit
//! holds up those behind it (all or nothing, and nobody starves); one that is over its writer's share is passed over.

use super::epochs::{EpochState, NewEpoch};
use super::{Effect, Expected, Receiver, Stage};
use crate::session::message::{Header, ToSender};
use crate::{Fallback, PathKind, TransferError};
use baton_types::{BlockId, Epoch, Instance, Ticket};
use std::collections::BTreeMap;
use std::time::Duration;

/// What a sender asks for.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) context_tokens: u64,
    pub(super) path: PathKind,
    pub(super) budget: Duration,
    pub(super) digest: bool,
}

/// An ask in the queue.
#[derive(Debug, Clone)]
pub(super) struct Pending {
    pub(super) from: Instance,
    pub(super) path: PathKind,
    /// When it is refused.
    pub(super) until: Duration,
    /// The epoch that broke before, if it goes on.
    pub(super) resumes: Option<Epoch>,
    /// A digest will come.
    pub(super) digest: bool,
    key: (Duration, u64),
}

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Asks {
    queue: BTreeMap<(Duration, u64), (Instance, Ticket)>,
    arrivals: u64,
    /// The allocation whose answer is awaited.
    allocating: Option<(Epoch, Ticket)>,
}

impl Asks {
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    pub(super) fn remove(&mut self, pending: &Pending) {
        self.queue.remove(&pending.key);
    }

    /// The first in the queue does not fit: all wait.
    pub(super) fn no_room(&mut self, epoch: Epoch) {
        self.allocating.take_if(|(awaited, _)| *awaited == epoch);
    }
}

impl Receiver {
    pub(super) fn reserve(&mut self, now: Duration, from: Instance, header: Header, ask: &Ask) {
        let Ask {
            context_tokens,
            path,
            budget,
            digest,
        } = *ask;
        let refused = |error| ToSender::Refused { error };
        if self.committed.contains_key(&header.ticket) {
            return self.send(from, header, refused(TransferError::AlreadyCommitted));
        }
        // Whoever knows the ticket and a later attempt has it from the coordinator: the earlier one is over.
        self.supersede(now, header.ticket, header.attempt);
        let Some(expected) = self.tickets.get(&header.ticket) else {
            return self.send(from, header, refused(TransferError::UnknownTicket));
        };
        if header.attempt < expected.attempt {
            return self.send(from, header, refused(TransferError::Fenced));
        }
        let by_another = || {
            let reason = "another process makes this attempt".to_owned();
            refused(TransferError::Protocol { reason })
        };
        match &expected.stage {
            Stage::Failed(error) => {
                let error = error.clone();
                return self.send(from, header, refused(error));
            }
            Stage::Asking(pending) | Stage::Awaiting(pending) if pending.from == from => return,
            Stage::Granted(epoch) if self.epochs.get(epoch).is_some_and(|state| state.writer() == from) => {
                let epoch = *epoch;
                if header.epoch != Some(epoch) {
                    return self.grant(epoch);
                }
                // It says by this that the path broke.
                let (path, reason) = (path.to_string(), "its writer went on over another".to_owned());
                self.break_epoch(now, epoch, &TransferError::PathFailed { path, reason }, false);
            }
            // A late ask of before the break is none.
            Stage::Seeking(seeking) if seeking.writer == from && header.epoch != seeking.epoch => return,
            Stage::Seeking(seeking) if seeking.writer == from => {}
            Stage::Asking(_) | Stage::Awaiting(_) | Stage::Granted(_) | Stage::Seeking(_) => {
                return self.send(from, header, by_another());
            }
            Stage::Idle if expected.context_tokens != context_tokens => {
                let expects = expected.context_tokens;
                let reason = format!("a context of {context_tokens} tokens was offered, {expects} are expected");
                let error = TransferError::Protocol { reason };
                self.send(from, header, refused(error.clone()));
                return self.fail_ticket(now, header.ticket, error, false);
            }
            Stage::Idle => {}
        }
        if self.condemned.contains(&(from, path)) {
            return self.refuse_path(now, header, from, path);
        }
        let Some(expected) = self.tickets.get(&header.ticket) else {
            return;
        };
        let until = expected.deadline.min(now.saturating_add(budget));
        let key = (until.min(now.saturating_add(self.limits.ageing)), self.asks.arrivals);
        self.asks.arrivals += 1;
        let pending = Pending {
            from,
            path,
            until,
            key,
            resumes: header.epoch,
            digest,
        };
        // What nobody has compared yet, and its writer will not, is not relied on where a digest was promised.
        let attempt = expected.attempt;
        let doubtful = |state: &EpochState| state.has_digest() && state.attempt() != attempt;
        let aside = expected.aside;
        if aside.and_then(|epoch| self.epochs.get(&epoch)).is_some_and(doubtful) {
            self.drop_aside(now, header.ticket);
            return self.enqueue(now, header.ticket, pending);
        }
        match aside {
            Some(epoch) => self.await_aside(now, header.ticket, epoch, pending),
            None => self.enqueue(now, header.ticket, pending),
        }
    }

    pub(super) fn enqueue(&mut self, now: Duration, ticket: Ticket, pending: Pending) {
        let Some(expected) = self.tickets.get_mut(&ticket) else {
            return;
        };
        let until = pending.until;
        self.asks.queue.insert(pending.key, (pending.from, ticket));
        expected.stage = Stage::Asking(pending);
        self.wake_at(until);
        self.serve(now);
    }

    /// Asks for the blocks of the first in the queue that is within its writer's share. The answer serves the next.
    pub(super) fn serve(&mut self, _now: Duration) {
        if self.asks.allocating.is_some() {
            return;
        }
        let within_share = self.asks.queue.values().find_map(|(from, ticket)| {
            let wanted = self.tickets.get(ticket)?.blocks as usize;
            let outstanding = self.outstanding.get(from).copied().unwrap_or(0);
            (outstanding == 0 || outstanding + wanted <= self.limits.peer_blocks).then_some(*ticket)
        });
        if let Some(ticket) = within_share {
            let epoch = Epoch(self.next_epoch);
            self.next_epoch += 1;
            self.asks.allocating = Some((epoch, ticket));
            self.effects.push(Effect::Allocate { epoch, ticket });
        }
    }

    pub(super) fn allocated(&mut self, now: Duration, epoch: Epoch, held: u32, fresh: Vec<BlockId>) {
        let Some((_, ticket)) = self.asks.allocating.take_if(|(awaited, _)| *awaited == epoch) else {
            self.effects.push(Effect::Discard { epoch });
            return;
        };
        let Some(Expected {
            stage: Stage::Asking(pending),
            context_tokens,
            attempt,
            blocks,
            ..
        }) = self.tickets.get(&ticket)
        else {
            // Given up between the two.
            self.effects.push(Effect::Discard { epoch });
            return self.serve(now);
        };
        let context_blocks = context_tokens.div_ceil(u64::from(self.limits.block_tokens));
        let context_blocks = u32::try_from(context_blocks).unwrap_or(u32::MAX);
        let complete =
            held as usize + fresh.len() == *blocks as usize && held <= context_blocks && context_blocks <= *blocks;
        if !complete || fresh.iter().any(|block| self.owners.contains_key(block)) {
            // A block that a past writer may still write, or too few of them: fail closed, whatever the pool says.
            self.effects.push(Effect::Discard { epoch });
            let reason = "the block pool gave blocks that are not free".to_owned();
            return self.fail_ticket(now, ticket, TransferError::Corrupt { reason }, true);
        }
        let pending = pending.clone();
        let fresh_blocks = u32::try_from(fresh.len()).unwrap_or(u32::MAX);
        let wanted = held..context_blocks;
        let lease_until = now.saturating_add(self.limits.lease);
        let state = EpochState::new(NewEpoch {
            ticket,
            attempt: *attempt,
            writer: pending.from,
            path: pending.path,
            base: held,
            wanted,
            digest_from: held,
            fresh,
            has_digest: pending.digest,
            bytes: 0,
            layers: self.limits.layers,
            lease_until,
        });
        self.asks.remove(&pending);
        self.insert_epoch(epoch, state);
        self.granted(ticket, epoch, pending.path);
        self.effects.push(Effect::Granted {
            ticket,
            epoch,
            held,
            fresh: fresh_blocks,
        });
        self.grant(epoch);
        self.serve(now);
    }

    /// The ticket's attempt goes on under this epoch.
    pub(super) fn granted(&mut self, ticket: Ticket, epoch: Epoch, path: PathKind) {
        if let Some(expected) = self.tickets.get_mut(&ticket) {
            expected.stage = Stage::Granted(epoch);
            if let Some((from, reason)) = expected.broken.take() {
                expected.fallbacks.push(Fallback { from, to: path, reason });
            }
        }
    }

    /// Tells the writer of its grant, once more where it asks once more.
    pub(super) fn grant(&mut self, epoch: Epoch) {
        let Some(state) = self.epochs.get(&epoch) else { return };
        let wanted = state.wanted();
        let first = (wanted.start - state.base()) as usize;
        let destinations = state.fresh()[first..first + wanted.len()].to_vec();
        let (ticket, attempt) = (state.ticket(), state.attempt());
        let header = Header {
            ticket,
            attempt,
            epoch: Some(epoch),
        };
        let (to, held, lease) = (state.writer(), wanted.start, self.limits.lease);
        let digest_from = state.digest_from();
        self.send(
            to,
            header,
            ToSender::Grant {
                held,
                digest_from,
                wanted,
                destinations,
                lease,
            },
        );
    }
}
