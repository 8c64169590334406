//! How attempts end: superseded, forgotten, failed, by time, or with their sender.

use super::epochs::EpochState;
use super::{Effect, Receiver, Stage};
use crate::session::message::{Header, ToSender};
use crate::{PathKind, TransferError};
use baton_types::{Attempt, Epoch, Instance, Ticket};
use std::collections::BTreeSet;
use std::time::Duration;

impl Receiver {
    pub(super) fn supersede(&mut self, now: Duration, ticket: Ticket, attempt: Attempt) {
        let Some(expected) = self.tickets.get_mut(&ticket) else {
            return;
        };
        if attempt <= expected.attempt {
            return;
        }
        let before = std::mem::replace(&mut expected.attempt, attempt);
        (expected.broken, expected.first_block) = (None, false);
        expected.fallbacks.clear();
        let stage = std::mem::replace(&mut expected.stage, Stage::Idle);
        let deadline = expected.deadline;
        self.wake_at(deadline);
        self.end_stage(now, ticket, before, stage, TransferError::Fenced, true);
        self.serve(now);
    }

    pub(super) fn forget(&mut self, now: Duration, ticket: Ticket) {
        let Some(expected) = self.tickets.remove(&ticket) else {
            return;
        };
        let error = TransferError::Aborted {
            reason: "the receiver gave the request up".to_owned(),
        };
        self.end_stage(now, ticket, expected.attempt, expected.stage, error, true);
        if let Some(epoch) = expected.aside {
            self.let_go(now, epoch);
        }
        self.serve(now);
    }

    /// The current attempt is over: the role hears it, and where `tell`, the sender.
    pub(super) fn fail_ticket(&mut self, now: Duration, ticket: Ticket, error: TransferError, tell: bool) {
        let Some(expected) = self.tickets.get_mut(&ticket) else {
            return;
        };
        if matches!(expected.stage, Stage::Failed(_)) {
            return;
        }
        let attempt = expected.attempt;
        let stage = std::mem::replace(&mut expected.stage, Stage::Failed(error.clone()));
        let path = match &stage {
            Stage::Idle | Stage::Failed(_) => None,
            Stage::Asking(pending) | Stage::Awaiting(pending) => Some(pending.path),
            Stage::Seeking(seeking) => Some(seeking.path),
            Stage::Granted(epoch) => self.epochs.get(epoch).map(EpochState::path),
        };
        self.end_stage(now, ticket, attempt, stage, error.clone(), tell);
        if !keeps(&error) {
            self.drop_aside(now, ticket);
        }
        self.effects.push(Effect::Failed {
            ticket,
            attempt,
            path,
            error,
        });
        self.serve(now);
    }

    fn end_stage(
        &mut self,
        now: Duration,
        ticket: Ticket,
        attempt: Attempt,
        stage: Stage,
        error: TransferError,
        tell: bool,
    ) {
        match stage {
            Stage::Idle | Stage::Failed(_) | Stage::Seeking(_) => {}
            Stage::Asking(pending) | Stage::Awaiting(pending) => {
                self.asks.remove(&pending);
                if tell {
                    let header = Header {
                        ticket,
                        attempt,
                        epoch: None,
                    };
                    self.send(pending.from, header, ToSender::Refused { error });
                }
            }
            Stage::Granted(epoch) => {
                let digest = self.epochs.get(&epoch).is_some_and(EpochState::has_digest);
                let keep = keeps(&error) && !digest;
                self.kill(now, epoch, error, tell, keep);
            }
        }
    }

    pub(super) fn peer_lost(&mut self, now: Duration, instance: Instance) {
        let reason = "its control connection was lost".to_owned();
        let error = TransferError::PeerGone { reason };
        let its = |stage: &Stage| match stage {
            Stage::Idle | Stage::Failed(_) => false,
            Stage::Asking(pending) | Stage::Awaiting(pending) => pending.from == instance,
            Stage::Granted(epoch) => self.epochs.get(epoch).is_some_and(|state| state.writer() == instance),
            Stage::Seeking(seeking) => seeking.writer == instance,
        };
        let its: Vec<Ticket> = self
            .tickets
            .iter()
            .filter(|(_, expected)| its(&expected.stage))
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in its {
            self.fail_ticket(now, ticket, error.clone(), false);
        }
        for path in self.limits.paths.clone() {
            self.condemn(now, instance, path, &error);
        }
    }

    pub(super) fn tick(&mut self, now: Duration) {
        let leases: Vec<Epoch> = self
            .epochs
            .iter()
            .filter(|(_, s)| s.lease_until().is_some_and(|at| at <= now))
            .map(|(e, _)| *e)
            .collect();
        for epoch in leases {
            self.fail_epoch(now, epoch, TransferError::LeaseExpired, true);
        }
        let due: Vec<(Ticket, TransferError)> = self
            .tickets
            .iter()
            .filter_map(|(ticket, expected)| {
                let error = match &expected.stage {
                    Stage::Failed(_) => return None,
                    _ if expected.deadline <= now => TransferError::Deadline,
                    Stage::Asking(pending) | Stage::Awaiting(pending) if pending.until <= now => {
                        TransferError::NoRoom {
                            reason: "no blocks became free in time".to_owned(),
                        }
                    }
                    Stage::Seeking(seeking) if seeking.until <= now => TransferError::PathFailed {
                        path: seeking.path.to_string(),
                        reason: "its sender found no other in time".to_owned(),
                    },
                    Stage::Idle | Stage::Asking(_) | Stage::Awaiting(_) | Stage::Granted(_) | Stage::Seeking(_) => {
                        return None;
                    }
                };
                Some((*ticket, error))
            })
            .collect();
        for (ticket, error) in due {
            self.fail_ticket(now, ticket, error, true);
        }
        let silent: BTreeSet<(Instance, PathKind)> = self
            .epochs
            .values()
            .filter(|state| state.fence_until().is_some_and(|at| at <= now))
            .map(|state| (state.writer(), state.path()))
            .collect();
        for (instance, path) in silent {
            let reason = "it was closed, because its writer did not fence another hand-over in time".to_owned();
            let error = TransferError::PathFailed {
                path: path.to_string(),
                reason,
            };
            self.condemn(now, instance, path, &error);
        }
        self.asides_due(now);
        self.earliest = self.next_deadline();
    }

    pub(super) fn next_deadline(&self) -> Duration {
        let tickets = self.tickets.values().filter_map(|expected| match &expected.stage {
            Stage::Failed(_) => None,
            Stage::Asking(pending) | Stage::Awaiting(pending) => Some(pending.until.min(expected.deadline)),
            Stage::Seeking(seeking) => Some(seeking.until.min(expected.deadline)),
            Stage::Idle | Stage::Granted(_) => Some(expected.deadline),
        });
        let epochs = self
            .epochs
            .values()
            .flat_map(|state| [state.lease_until(), state.fence_until(), state.aside_until()])
            .flatten();
        tickets.chain(epochs).min().unwrap_or(Duration::MAX)
    }
}

/// Whether what arrived whole before such an end is to be relied on by the next attempt.
fn keeps(error: &TransferError) -> bool {
    match error {
        TransferError::PathFailed { .. }
        | TransferError::PeerGone { .. }
        | TransferError::LeaseExpired
        | TransferError::Fenced
        | TransferError::Aborted { .. } => true,
        TransferError::Refused { .. }
        | TransferError::NoPath { .. }
        | TransferError::NoRoom { .. }
        | TransferError::AlreadyCommitted
        | TransferError::UnknownTicket
        | TransferError::Deadline
        | TransferError::Corrupt { .. }
        | TransferError::Protocol { .. }
        | TransferError::ShuttingDown
        | TransferError::TooMany { .. } => false,
    }
}
