//! The life of a grant: claims and arrivals while it lives, quarantine and proof once it does not.
//!
//! Proof that nobody can write the blocks of a dead epoch any more is, with no claim outstanding, either
//! - the writer's `Fenced` on the control connection *and* the in-band marker on every connection it names (a marker comes
//!   behind all data of its connection); connections that carried the epoch must be among those; or
//! - that all data connections of the writer were destroyed and their tasks joined after the epoch died.

use super::{ClaimTicket, Connection, Effect, Receiver, Stage};
use crate::session::arrival::{Arrival, Misfit};
use crate::session::message::{Header, ToSender};
use crate::transport::Reject;
use crate::{PathKind, TransferError};
use baton_types::{Attempt, BlockId, Epoch, Instance, Ticket};
use bytes::Bytes;
use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

#[derive(Debug)]
enum Phase {
    Live {
        lease_until: Duration,
        complete: Option<Bytes>,
    },
    /// `fence_until`: none once destruction of the connections was asked for.
    Dead {
        fence_until: Option<Duration>,
        disconnected: bool,
    },
}

#[derive(Debug)]
pub(super) struct EpochState {
    ticket: Ticket,
    attempt: Attempt,
    writer: Instance,
    path: PathKind,
    /// Ordinals to be written; `fresh` begins with their blocks.
    wanted: Range<u32>,
    fresh: Vec<BlockId>,
    arrival: Arrival,
    phase: Phase,
    claims: usize,
    bytes: u64,
    first_block: bool,
    /// Connections that carried an extent.
    carried: BTreeSet<u64>,
    /// Connections on which nothing more of it can come: the marker came, or they closed.
    finished: BTreeSet<u64>,
    /// How many markers the writer sent.
    markers: Option<u32>,
}

impl EpochState {
    pub(super) fn new(
        (ticket, attempt): (Ticket, Attempt),
        (writer, path): (Instance, PathKind),
        wanted: Range<u32>,
        layers: u32,
        fresh: Vec<BlockId>,
        lease_until: Duration,
    ) -> Self {
        Self {
            ticket,
            attempt,
            writer,
            path,
            arrival: Arrival::new(wanted.clone(), layers),
            wanted,
            fresh,
            phase: Phase::Live {
                lease_until,
                complete: None,
            },
            claims: 0,
            bytes: 0,
            first_block: false,
            carried: BTreeSet::new(),
            finished: BTreeSet::new(),
            markers: None,
        }
    }

    pub(super) fn ticket(&self) -> Ticket {
        self.ticket
    }

    pub(super) fn attempt(&self) -> Attempt {
        self.attempt
    }

    pub(super) fn writer(&self) -> Instance {
        self.writer
    }

    pub(super) fn path(&self) -> PathKind {
        self.path
    }

    pub(super) fn wanted(&self) -> Range<u32> {
        self.wanted.clone()
    }

    pub(super) fn fresh(&self) -> &[BlockId] {
        &self.fresh
    }

    pub(super) fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Live { .. })
    }

    pub(super) fn is_written_by(&self, from: &Connection) -> bool {
        self.writer == from.writer && self.path == from.path
    }

    pub(super) fn lease_until(&self) -> Option<Duration> {
        match &self.phase {
            Phase::Live { lease_until, .. } => Some(*lease_until),
            Phase::Dead { .. } => None,
        }
    }

    pub(super) fn fence_until(&self) -> Option<Duration> {
        match &self.phase {
            Phase::Live { .. } => None,
            Phase::Dead { fence_until, .. } => *fence_until,
        }
    }

    /// The writer is asked for no proof any more: its connections are being destroyed.
    pub(super) fn await_disconnect(&mut self) {
        if let Phase::Dead { fence_until, .. } = &mut self.phase {
            *fence_until = None;
        }
    }

    /// Takes the writer's last word. The first one stays. False where it names other blocks than those granted.
    pub(super) fn completed(&mut self, blocks: &Range<u32>, payload: Bytes) -> bool {
        if let Phase::Live { complete, .. } = &mut self.phase {
            if *blocks != self.wanted {
                return false;
            }
            complete.get_or_insert(payload);
        }
        true
    }

    fn is_proven(&self) -> bool {
        let Phase::Dead { disconnected, .. } = &self.phase else {
            return false;
        };
        let fenced = self.markers.is_some_and(|sent| {
            self.finished.len() >= usize::try_from(sent).unwrap_or(usize::MAX) && self.carried.is_subset(&self.finished)
        });
        self.claims == 0 && (*disconnected || fenced || self.fresh.is_empty())
    }
}

impl Receiver {
    /// Asks to write an extent: the epoch lives, the writer and its path are the granted ones, the extent is in the grant and
    /// neither in nor on its way.
    pub(crate) fn claim(
        &mut self,
        now: Duration,
        from: Connection,
        epoch: Epoch,
        ordinal: u32,
        layers: &Range<u32>,
    ) -> Result<ClaimTicket, Reject> {
        let Some(state) = self.epochs.get_mut(&epoch).filter(|state| state.is_live()) else {
            return Err(Reject::DeadEpoch);
        };
        if !state.is_written_by(&from) {
            return Err(Reject::WrongWriter);
        }
        if state.finished.contains(&from.number) {
            return Err(Reject::DeadEpoch);
        }
        match state.arrival.take(ordinal, layers) {
            Ok(()) => {}
            Err(Misfit::Duplicate) => return Err(Reject::Duplicate),
            Err(Misfit::Outside) => return Err(Reject::OutsideGrant),
            Err(Misfit::Overlap) => {
                let reason = format!("layers {layers:?} of block {ordinal} overlap others that came before");
                self.fail_epoch(now, epoch, TransferError::Protocol { reason }, true);
                return Err(Reject::OutsideGrant);
            }
        }
        state.claims += 1;
        state.carried.insert(from.number);
        let block = state.fresh[(ordinal - state.wanted.start) as usize];
        Ok(ClaimTicket {
            epoch,
            ordinal,
            layers: layers.clone(),
            block,
        })
    }

    /// The extent is in the arena, whole and right.
    pub(crate) fn land(&mut self, now: Duration, claim: ClaimTicket, bytes: u64) -> Result<(), Reject> {
        let Some(state) = self.epochs.get_mut(&claim.epoch) else {
            return Err(Reject::DeadEpoch);
        };
        state.claims -= 1;
        if !state.is_live() {
            self.try_release(now, claim.epoch);
            return Err(Reject::DeadEpoch);
        }
        state.bytes += bytes;
        if state.arrival.land(claim.ordinal, &claim.layers) && !std::mem::replace(&mut state.first_block, true) {
            let ticket = state.ticket;
            self.effects.push(Effect::FirstBlock { ticket });
        }
        self.renew(now, claim.epoch);
        self.try_commit(now, claim.epoch);
        Ok(())
    }

    /// The claim ends without its extent: it was torn, and nobody sends it again under this epoch.
    pub(crate) fn release(&mut self, now: Duration, claim: &ClaimTicket) {
        let Some(state) = self.epochs.get_mut(&claim.epoch) else {
            return;
        };
        state.claims -= 1;
        if state.is_live() {
            let path = state.path.to_string();
            let reason = "an extent was torn".to_owned();
            self.fail_epoch(now, claim.epoch, TransferError::PathFailed { path, reason }, true);
        } else {
            self.try_release(now, claim.epoch);
        }
    }

    pub(super) fn renew(&mut self, now: Duration, epoch: Epoch) {
        let lease = self.limits.lease;
        if let Some(Phase::Live { lease_until, .. }) = self.epochs.get_mut(&epoch).map(|state| &mut state.phase) {
            *lease_until = now.saturating_add(lease);
        }
    }

    /// Commits where everything is in and the writer said so. No unfenced epoch can hold these blocks too: `owners` refuses
    /// to grant them.
    pub(super) fn try_commit(&mut self, now: Duration, epoch: Epoch) {
        let Some(state) = self.epochs.get(&epoch) else { return };
        let ready = match &state.phase {
            Phase::Live { complete, .. } => complete.is_some() && state.arrival.is_full() && state.claims == 0,
            Phase::Dead { .. } => false,
        };
        if !ready {
            return;
        }
        let Some(state) = self.drop_epoch(epoch) else { return };
        let Phase::Live {
            complete: Some(payload),
            ..
        } = state.phase
        else {
            return;
        };
        let EpochState {
            ticket,
            attempt,
            writer,
            path,
            wanted,
            bytes,
            ..
        } = state;
        self.tickets.remove(&ticket);
        self.remember_committed(ticket, attempt, epoch);
        self.effects.push(Effect::Commit {
            ticket,
            attempt,
            epoch,
            held: wanted.start,
            payload,
            bytes,
            path,
        });
        self.send(
            writer,
            Header {
                ticket,
                attempt,
                epoch: Some(epoch),
            },
            ToSender::Committed,
        );
        self.serve(now);
    }

    pub(super) fn fail_epoch(&mut self, now: Duration, epoch: Epoch, error: TransferError, tell: bool) {
        let Some(ticket) = self.epochs.get(&epoch).map(EpochState::ticket) else {
            return;
        };
        let current = self
            .tickets
            .get(&ticket)
            .is_some_and(|e| matches!(&e.stage, Stage::Granted(at) if *at == epoch));
        if current {
            self.fail_ticket(now, ticket, error, tell);
        }
    }

    /// The grant is over: no claim from here on, its blocks are in quarantine until proof.
    pub(super) fn kill(&mut self, now: Duration, epoch: Epoch, error: TransferError, tell: bool) {
        let fence_until = now.saturating_add(self.limits.fence_timeout);
        let Some(state) = self.epochs.get_mut(&epoch) else {
            return;
        };
        state.phase = Phase::Dead {
            fence_until: Some(fence_until),
            disconnected: false,
        };
        let header = Header {
            ticket: state.ticket,
            attempt: state.attempt,
            epoch: Some(epoch),
        };
        let writer = state.writer;
        self.wake_at(fence_until);
        self.effects.push(Effect::Quarantine { epoch });
        if tell {
            self.send(writer, header, ToSender::Fence { error });
        }
        self.try_release(now, epoch);
    }

    pub(super) fn fenced(&mut self, now: Duration, from: Instance, epoch: Epoch, connections: u32) {
        let Some(state) = self.epochs.get_mut(&epoch).filter(|state| state.writer == from) else {
            return;
        };
        state.markers.get_or_insert(connections);
        if state.is_live() {
            let reason = "the sender ended it".to_owned();
            self.fail_epoch(now, epoch, TransferError::Aborted { reason }, false);
        } else {
            self.try_release(now, epoch);
        }
    }

    pub(super) fn marker(&mut self, now: Duration, from: Connection, epoch: Epoch) {
        let Some(state) = self.epochs.get_mut(&epoch).filter(|state| state.is_written_by(&from)) else {
            return;
        };
        state.finished.insert(from.number);
        self.try_release(now, epoch);
    }

    pub(super) fn connection_closed(&mut self, now: Duration, from: Connection) {
        let carried: Vec<Epoch> = self
            .epochs
            .iter_mut()
            .filter(|(_, state)| state.is_written_by(&from) && state.carried.contains(&from.number))
            .map(|(epoch, state)| {
                state.finished.insert(from.number);
                *epoch
            })
            .collect();
        for epoch in carried {
            let incomplete = self
                .epochs
                .get(&epoch)
                .is_some_and(|s| s.is_live() && !s.arrival.is_full());
            if incomplete {
                let reason = "a connection closed before everything had come".to_owned();
                let path = from.path.to_string();
                self.fail_epoch(now, epoch, TransferError::PathFailed { path, reason }, true);
            } else {
                self.try_release(now, epoch);
            }
        }
    }

    pub(super) fn disconnected(&mut self, now: Duration, instance: Instance, through: Epoch) {
        let proven: Vec<Epoch> = self
            .epochs
            .range_mut(..=through)
            .filter(|(_, state)| state.writer == instance)
            .filter_map(|(epoch, state)| match &mut state.phase {
                Phase::Live { .. } => None,
                Phase::Dead {
                    fence_until,
                    disconnected,
                } => {
                    (*fence_until, *disconnected) = (None, true);
                    Some(*epoch)
                }
            })
            .collect();
        for epoch in proven {
            self.try_release(now, epoch);
        }
    }

    /// Lets the blocks of a dead epoch go where there is proof.
    fn try_release(&mut self, now: Duration, epoch: Epoch) {
        if self.epochs.get(&epoch).is_some_and(EpochState::is_proven) {
            self.drop_epoch(epoch);
            self.effects.push(Effect::Release { epoch });
            self.serve(now);
        }
    }

    fn drop_epoch(&mut self, epoch: Epoch) -> Option<EpochState> {
        let state = self.epochs.remove(&epoch)?;
        for block in &state.fresh {
            self.owners.remove(block);
        }
        if let Some(outstanding) = self.outstanding.get_mut(&state.writer) {
            *outstanding -= state.fresh.len();
            if *outstanding == 0 {
                self.outstanding.remove(&state.writer);
            }
        }
        Some(state)
    }
}
