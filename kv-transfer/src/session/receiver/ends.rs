//! How attempts end: superseded, forgotten, failed, by time, or with their sender.

use super::epochs::EpochState;
use super::{Effect, Receiver, Stage};
use crate::TransferError;
use crate::session::message::{Header, ToSender};
use baton_types::{Attempt, Epoch, Instance, Ticket};
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
            Stage::Asking(pending) => Some(pending.path),
            Stage::Granted(epoch) => self.epochs.get(epoch).map(EpochState::path),
        };
        self.end_stage(now, ticket, attempt, stage, error.clone(), tell);
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
            Stage::Idle | Stage::Failed(_) => {}
            Stage::Asking(pending) => {
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
            Stage::Granted(epoch) => self.kill(now, epoch, error, tell),
        }
    }

    pub(super) fn peer_lost(&mut self, now: Duration, instance: Instance) {
        let reason = "its control connection was lost".to_owned();
        self.end_writer(now, instance, &TransferError::PeerGone { reason });
    }

    /// Ends all that a writer has here and has its connections destroyed, which proves all its epochs over.
    fn end_writer(&mut self, now: Duration, instance: Instance, error: &TransferError) {
        let asking = self.asks.of(instance);
        let live = self
            .epochs
            .values()
            .filter(|state| state.writer() == instance && state.is_live());
        let live: Vec<Ticket> = live.map(EpochState::ticket).collect();
        for ticket in asking.into_iter().chain(live) {
            self.fail_ticket(now, ticket, error.clone(), false);
        }
        for state in self.epochs.values_mut().filter(|state| state.writer() == instance) {
            state.await_disconnect();
        }
        let through = Epoch(self.next_epoch - 1);
        self.effects.push(Effect::Disconnect { instance, through });
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
                    Stage::Asking(pending) if pending.until <= now => TransferError::NoRoom {
                        reason: "no blocks became free in time".to_owned(),
                    },
                    Stage::Idle | Stage::Asking(_) | Stage::Granted(_) => return None,
                };
                Some((*ticket, error))
            })
            .collect();
        for (ticket, error) in due {
            self.fail_ticket(now, ticket, error, true);
        }
        let mut silent: Vec<Instance> = self
            .epochs
            .values()
            .filter(|state| state.fence_until().is_some_and(|at| at <= now))
            .map(EpochState::writer)
            .collect();
        silent.sort_unstable();
        silent.dedup();
        for instance in silent {
            let reason =
                "its connections were destroyed, because it did not fence another hand-over in time".to_owned();
            let path = "data".to_owned();
            self.end_writer(now, instance, &TransferError::PathFailed { path, reason });
        }
        self.earliest = self.next_deadline();
    }

    pub(super) fn next_deadline(&self) -> Duration {
        let tickets = self.tickets.values().filter_map(|expected| match &expected.stage {
            Stage::Failed(_) => None,
            Stage::Asking(pending) => Some(pending.until.min(expected.deadline)),
            Stage::Idle | Stage::Granted(_) => Some(expected.deadline),
        });
        let epochs = self
            .epochs
            .values()
            .filter_map(|state| state.lease_until().or(state.fence_until()));
        tickets.chain(epochs).min().unwrap_or(Duration::MAX)
    }
}
