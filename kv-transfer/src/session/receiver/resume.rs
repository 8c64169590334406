//! Going on after a path broke, and taking over what an earlier attempt brought.
//!
//! When an epoch dies with its leading blocks whole, and its end casts no doubt on them, its reservation is kept aside: dead,
//! granted to nobody, held by nobody else. The ticket's next ask waits for the proof that the old writer is done, and is then
//! granted the rest of the same reservation under a new epoch. Bounds: without proof in time the reservation is quarantined as
//! any other and the ask gets fresh blocks; with proof but without an ask within the lease it is given back.
//!
//! Where a digest was promised, nothing is taken over from another attempt: no digest covers it.
//!
//! A broken path is destroyed as a whole, since that is the only proof left: all that is being written over that kind of path
//! by that process breaks with it, and goes on over another. While the proof is pending, nothing is granted there.

use super::asks::Pending;
use super::{Effect, Receiver, Stage};
use crate::session::message::{Header, ToSender};
use crate::{PathKind, TransferError};
use baton_types::{Epoch, Instance, Ticket};
use std::time::Duration;

/// The path broke under a sender, which looks for another.
#[derive(Debug, Clone)]
pub(super) struct Seeking {
    pub(super) writer: Instance,
    /// What was granted before, if it was.
    pub(super) epoch: Option<Epoch>,
    pub(super) path: PathKind,
    pub(super) until: Duration,
}

impl Receiver {
    /// The sender saw its path break, or cannot send the markers.
    pub(super) fn path_broken(&mut self, now: Duration, from: Instance, epoch: Epoch, error: &TransferError) {
        let Some(state) = self.epochs.get(&epoch).filter(|state| state.writer() == from) else {
            return;
        };
        if state.is_live() {
            self.break_epoch(now, epoch, error, false);
        } else {
            let path = state.path();
            self.condemn(now, from, path, error);
        }
    }

    /// The path of a live epoch is broken: the attempt may go on over another. Where `tell`, its sender hears so.
    pub(super) fn break_epoch(&mut self, now: Duration, epoch: Epoch, error: &TransferError, tell: bool) {
        let Some(state) = self.epochs.get(&epoch).filter(|state| state.is_live()) else {
            return;
        };
        let (writer, path) = (state.writer(), state.path());
        self.seek(now, epoch, error, tell);
        self.condemn(now, writer, path, error);
    }

    fn seek(&mut self, now: Duration, epoch: Epoch, error: &TransferError, tell: bool) {
        let until = now.saturating_add(self.limits.lease);
        let Some(state) = self.epochs.get(&epoch) else { return };
        let Some(expected) = self.tickets.get_mut(&state.ticket()) else {
            return;
        };
        let (writer, path) = (state.writer(), state.path());
        expected.broken = Some((path, error.to_string()));
        let epoch_before = Some(epoch);
        expected.stage = Stage::Seeking(Seeking {
            writer,
            epoch: epoch_before,
            path,
            until,
        });
        self.wake_at(until);
        self.kill(now, epoch, error.clone(), tell, true);
    }

    /// Has all that a process has on one kind of path destroyed, which proves its epochs there over.
    pub(super) fn condemn(&mut self, now: Duration, instance: Instance, path: PathKind, error: &TransferError) {
        let there = |writer: Instance, over: PathKind| writer == instance && over == path;
        for state in self
            .epochs
            .values_mut()
            .filter(|state| there(state.writer(), state.path()))
        {
            state.await_no_fence();
        }
        if !self.condemned.insert((instance, path)) {
            return;
        }
        let through = Epoch(self.next_epoch - 1);
        self.effects.push(Effect::Disconnect {
            instance,
            path,
            through,
        });
        let asking: Vec<(Ticket, Pending)> = self
            .tickets
            .iter()
            .filter_map(|(ticket, expected)| match &expected.stage {
                Stage::Asking(pending) | Stage::Awaiting(pending) if there(pending.from, pending.path) => {
                    Some((*ticket, pending.clone()))
                }
                Stage::Idle | Stage::Asking(_) | Stage::Awaiting(_) => None,
                Stage::Granted(_) | Stage::Seeking(_) | Stage::Failed(_) => None,
            })
            .collect();
        for (ticket, pending) in asking {
            self.asks.remove(&pending);
            if let Some(attempt) = self.tickets.get(&ticket).map(|expected| expected.attempt) {
                let header = Header {
                    ticket,
                    attempt,
                    epoch: pending.resumes,
                };
                self.refuse_path(now, header, instance, path);
            }
        }
        // What is all here needs its path no more.
        let broken: Vec<Epoch> = self
            .epochs
            .iter()
            .filter(|(_, state)| there(state.writer(), state.path()) && state.is_live() && !state.is_full())
            .map(|(epoch, _)| *epoch)
            .collect();
        for epoch in broken {
            self.seek(now, epoch, error, true);
            if let Some(state) = self.epochs.get_mut(&epoch) {
                state.await_no_fence();
            }
        }
        self.serve(now);
    }

    /// Nothing is granted on that path now: its sender is to take another.
    pub(super) fn refuse_path(&mut self, now: Duration, header: Header, from: Instance, path: PathKind) {
        let until = now.saturating_add(self.limits.lease);
        let reason = "what its writer had there before is being destroyed".to_owned();
        if let Some(expected) = self.tickets.get_mut(&header.ticket) {
            let epoch = header.epoch;
            expected.stage = Stage::Seeking(Seeking {
                writer: from,
                epoch,
                path,
                until,
            });
            expected.broken.get_or_insert_with(|| (path, reason.clone()));
            self.wake_at(until);
        }
        let path = path.to_string();
        let error = TransferError::PathFailed { path, reason };
        self.send(from, header, ToSender::Refused { error });
    }

    /// An ask of a ticket that something is kept aside for.
    pub(super) fn await_aside(&mut self, now: Duration, ticket: Ticket, epoch: Epoch, pending: Pending) {
        let until = pending.until;
        let Some(expected) = self.tickets.get_mut(&ticket) else {
            return;
        };
        expected.stage = Stage::Awaiting(pending);
        self.wake_at(until);
        self.try_release(now, epoch);
    }

    /// There is proof that nobody writes what is kept aside: it goes to who waits for it, or waits for the next ask.
    pub(super) fn proven_aside(&mut self, now: Duration, epoch: Epoch) {
        let Some(state) = self.epochs.get_mut(&epoch) else {
            return;
        };
        let ticket = state.ticket();
        let Some(expected) = self.tickets.get(&ticket) else {
            return;
        };
        let Stage::Awaiting(pending) = &expected.stage else {
            let until = now.saturating_add(self.limits.lease);
            state.keep_proven(until);
            self.wake_at(until);
            return;
        };
        let (pending, attempt) = (pending.clone(), expected.attempt);
        let Some(state) = self.drop_epoch(epoch) else { return };
        let new = Epoch(self.next_epoch);
        self.next_epoch += 1;
        let lease_until = now.saturating_add(self.limits.lease);
        let state = state.succeeded_by(attempt, &pending, lease_until);
        let held = state.wanted().start;
        let fresh = u32::try_from(state.fresh().len()).unwrap_or(u32::MAX) - (held - state.base());
        self.insert_epoch(new, state);
        if let Some(expected) = self.tickets.get_mut(&ticket) {
            expected.aside = None;
        }
        self.granted(ticket, new, pending.path);
        self.effects.push(Effect::Regrant { old: epoch, new });
        self.effects.push(Effect::Granted {
            ticket,
            epoch: new,
            held,
            fresh,
        });
        self.grant(new);
        self.serve(now);
    }

    /// Nothing is kept for the ticket any more. An ask that waits for it gets fresh blocks in its turn.
    pub(super) fn drop_aside(&mut self, now: Duration, ticket: Ticket) {
        let Some(expected) = self.tickets.get_mut(&ticket) else {
            return;
        };
        let Some(epoch) = expected.aside.take() else { return };
        let waits = match &expected.stage {
            Stage::Awaiting(pending) => Some(pending.clone()),
            Stage::Idle | Stage::Asking(_) | Stage::Granted(_) | Stage::Seeking(_) | Stage::Failed(_) => None,
        };
        self.let_go(now, epoch);
        match waits {
            Some(pending) => self.enqueue(now, ticket, pending),
            None => self.serve(now),
        }
    }

    /// What was kept aside goes the way of all dead epochs.
    pub(super) fn let_go(&mut self, _now: Duration, epoch: Epoch) {
        let Some(state) = self.epochs.get_mut(&epoch) else {
            return;
        };
        state.keep_no_more();
        if state.is_proven() {
            self.drop_epoch(epoch);
            self.effects.push(Effect::Discard { epoch });
        } else {
            self.effects.push(Effect::Quarantine { epoch });
        }
    }

    /// What was kept for as long as it may be.
    pub(super) fn asides_due(&mut self, now: Duration) {
        let due: Vec<Ticket> = self
            .epochs
            .values()
            .filter(|state| state.aside_until().is_some_and(|at| at <= now))
            .map(|state| state.ticket())
            .collect();
        for ticket in due {
            self.drop_aside(now, ticket);
        }
    }
}
