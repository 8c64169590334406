//! The life of a grant: claims and arrivals while it lives, quarantine and proof once it does not.
//!
//! Proof that nobody can write the blocks of a dead epoch any more is, with no claim outstanding, either
//! - the writer's `Fenced` on the control connection *and* the in-band marker on every connection it names (a marker comes
//!   behind all data of its connection); connections that carried the epoch must be among those; or
//! - that all that the writer had on that kind of path was destroyed after the epoch died.
//!
//! A digest is compared while the epoch lives, under a claim of its own: what is being read is not let go.

mod commit;

use super::asks::Pending;
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

/// What the sender said when everything was pushed.
#[derive(Debug)]
pub(super) struct LastWord {
    pub(super) payload: Bytes,
    pub(super) digest: Option<u64>,
}

/// Whether what arrived is what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Open,
    Awaited,
    Matches,
}

#[derive(Debug)]
enum Phase {
    Live {
        lease_until: Duration,
        complete: Option<LastWord>,
        verdict: Verdict,
    },
    /// `fence_until`: none once destruction of the connections was asked for, or there is proof. `aside_until`: there while
    /// the reservation is kept for the next grant.
    Dead {
        fence_until: Option<Duration>,
        disconnected: bool,
        aside_until: Option<Duration>,
        /// There was proof while it was kept aside.
        proven_aside: bool,
    },
}

#[derive(Debug)]
pub(super) struct EpochState {
    ticket: Ticket,
    attempt: Attempt,
    writer: Instance,
    path: PathKind,
    /// The ordinal of the first of `fresh`.
    base: u32,
    /// Ordinals to be written. Those between `base` and these arrived under earlier epochs.
    wanted: Range<u32>,
    /// What a digest covers begins here: this attempt wrote it.
    digest_from: u32,
    fresh: Vec<BlockId>,
    /// Its writer promised a digest.
    has_digest: bool,
    arrival: Arrival,
    phase: Phase,
    claims: usize,
    bytes: u64,
    /// Connections that carried an extent.
    carried: BTreeSet<u64>,
    /// Connections on which nothing more of it can come: the marker came, or they closed.
    finished: BTreeSet<u64>,
    /// How many markers the writer sent.
    markers: Option<u32>,
}

/// What an epoch is made of.
pub(super) struct NewEpoch {
    pub(super) ticket: Ticket,
    pub(super) attempt: Attempt,
    pub(super) writer: Instance,
    pub(super) path: PathKind,
    pub(super) base: u32,
    pub(super) wanted: Range<u32>,
    pub(super) digest_from: u32,
    pub(super) fresh: Vec<BlockId>,
    pub(super) has_digest: bool,
    pub(super) bytes: u64,
    pub(super) layers: u32,
    pub(super) lease_until: Duration,
}

impl EpochState {
    pub(super) fn new(new: NewEpoch) -> Self {
        Self {
            ticket: new.ticket,
            attempt: new.attempt,
            writer: new.writer,
            path: new.path,
            base: new.base,
            arrival: Arrival::new(new.wanted.clone(), new.layers),
            wanted: new.wanted,
            digest_from: new.digest_from,
            fresh: new.fresh,
            has_digest: new.has_digest,
            phase: Phase::Live {
                lease_until: new.lease_until,
                complete: None,
                verdict: Verdict::Open,
            },
            claims: 0,
            bytes: new.bytes,
            carried: BTreeSet::new(),
            finished: BTreeSet::new(),
            markers: None,
        }
    }

    /// The next grant of the same reservation: what arrived whole is not wanted again.
    pub(super) fn succeeded_by(self, attempt: Attempt, by: &Pending, lease_until: Duration) -> Self {
        let start = self.whole_until();
        let same = self.attempt == attempt;
        Self::new(NewEpoch {
            ticket: self.ticket,
            attempt,
            writer: by.from,
            path: by.path,
            has_digest: by.digest,
            base: self.base,
            wanted: start..self.wanted.end,
            digest_from: if same { self.digest_from } else { start },
            bytes: if same { self.bytes } else { 0 },
            layers: self.arrival.layers(),
            fresh: self.fresh,
            lease_until,
        })
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

    pub(super) fn base(&self) -> u32 {
        self.base
    }

    pub(super) fn wanted(&self) -> Range<u32> {
        self.wanted.clone()
    }

    pub(super) fn has_digest(&self) -> bool {
        self.has_digest
    }

    pub(super) fn digest_from(&self) -> u32 {
        self.digest_from
    }

    pub(super) fn fresh(&self) -> &[BlockId] {
        &self.fresh
    }

    /// The block of an ordinal from `base` on.
    fn block(&self, ordinal: u32) -> BlockId {
        self.fresh[(ordinal - self.base) as usize]
    }

    /// Ordinals before this one are here, whole.
    fn whole_until(&self) -> u32 {
        self.wanted.start + self.arrival.leading()
    }

    pub(super) fn is_full(&self) -> bool {
        self.arrival.is_full()
    }

    pub(super) fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Live { .. })
    }

    pub(super) fn is_aside(&self) -> bool {
        matches!(
            self.phase,
            Phase::Dead {
                aside_until: Some(_),
                ..
            }
        )
    }

    pub(super) fn is_written_by(&self, from: &Connection) -> bool {
        (self.writer == from.writer || planted!(RestartedPeer)) && self.path == from.path
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

    pub(super) fn aside_until(&self) -> Option<Duration> {
        match &self.phase {
            Phase::Live { .. } => None,
            Phase::Dead { aside_until, .. } => *aside_until,
        }
    }

    /// There is proof: it is kept for so long. Only the first time counts.
    pub(super) fn keep_proven(&mut self, until: Duration) {
        if let Phase::Dead {
            fence_until,
            aside_until: Some(aside_until),
            proven_aside: proven @ false,
            ..
        } = &mut self.phase
        {
            (*fence_until, *aside_until, *proven) = (None, until, true);
        }
    }

    /// It is kept no longer.
    pub(super) fn keep_no_more(&mut self) {
        if let Phase::Dead { aside_until, .. } = &mut self.phase {
            *aside_until = None;
        }
    }

    /// The writer is asked for no proof any more: there is proof, or its connections are being destroyed.
    pub(super) fn await_no_fence(&mut self) {
        if let Phase::Dead { fence_until, .. } = &mut self.phase {
            *fence_until = None;
        }
    }

    /// Takes the writer's last word. The first one stays. False where it names other blocks than those granted.
    pub(super) fn completed(&mut self, blocks: &Range<u32>, word: LastWord) -> bool {
        if let Phase::Live { complete, .. } = &mut self.phase {
            if *blocks != self.wanted {
                return false;
            }
            complete.get_or_insert(word);
        }
        true
    }

    pub(super) fn is_proven(&self) -> bool {
        let Phase::Dead { disconnected, .. } = &self.phase else {
            return false;
        };
        let fenced = self.markers.is_some_and(|sent| {
            planted!(FlushIsProof)
                || self.finished.len() >= usize::try_from(sent).unwrap_or(usize::MAX)
                    && self.carried.is_subset(&self.finished)
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
        let state = self.epochs.get_mut(&epoch);
        let Some(state) = state.filter(|state| state.is_live() || planted!(OldEpoch)) else {
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
            Err(Misfit::Duplicate) if planted!(DuplicateCounts) => {}
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
        let block = state.block(ordinal);
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
        let ticket = state.ticket;
        if state.arrival.land(claim.ordinal, &claim.layers)
            && let Some(expected) = self.tickets.get_mut(&ticket)
            && !std::mem::replace(&mut expected.first_block, true)
        {
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
            self.break_epoch(now, claim.epoch, &TransferError::PathFailed { path, reason }, true);
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

    /// The grant is over: no claim from here on. Its blocks are in quarantine until proof; where `keep`, and there is something
    /// to keep, the reservation is kept aside instead, which nobody else can have either.
    pub(super) fn kill(&mut self, now: Duration, epoch: Epoch, error: TransferError, tell: bool, keep: bool) {
        let fence_until = now.saturating_add(self.limits.fence_timeout);
        // Time for the proof by markers, and then for that by destruction.
        let aside_until = fence_until.saturating_add(self.limits.fence_timeout);
        let Some(state) = self.epochs.get_mut(&epoch) else {
            return;
        };
        let expected = self.tickets.get_mut(&state.ticket);
        let expected = expected.filter(|_| keep && state.whole_until() > state.base);
        state.phase = Phase::Dead {
            fence_until: Some(fence_until),
            disconnected: false,
            aside_until: expected.is_some().then_some(aside_until),
            proven_aside: false,
        };
        let header = Header {
            ticket: state.ticket,
            attempt: state.attempt,
            epoch: Some(epoch),
        };
        let writer = state.writer;
        match expected {
            Some(expected) => expected.aside = Some(epoch),
            None => self.effects.push(Effect::Quarantine { epoch }),
        }
        self.wake_at(fence_until);
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
                .is_some_and(|state| state.is_live() && !state.is_full());
            if incomplete {
                let reason = "a connection closed before everything had come".to_owned();
                let path = from.path.to_string();
                self.break_epoch(now, epoch, &TransferError::PathFailed { path, reason }, true);
            } else {
                self.try_release(now, epoch);
            }
        }
    }

    pub(super) fn disconnected(&mut self, now: Duration, instance: Instance, path: PathKind, through: Epoch) {
        self.condemned.remove(&(instance, path));
        let proven: Vec<Epoch> = self
            .epochs
            .range_mut(..=through)
            .filter(|(_, state)| state.writer == instance && state.path == path)
            .filter_map(|(epoch, state)| match &mut state.phase {
                Phase::Live { .. } => None,
                Phase::Dead {
                    fence_until,
                    disconnected,
                    ..
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
    pub(super) fn try_release(&mut self, now: Duration, epoch: Epoch) {
        let Some(state) = self.epochs.get(&epoch).filter(|state| state.is_proven()) else {
            return;
        };
        if state.is_aside() {
            return self.proven_aside(now, epoch);
        }
        self.drop_epoch(epoch);
        self.effects.push(Effect::Release { epoch });
        self.serve(now);
    }

    /// A grant's blocks are its own from here on.
    pub(super) fn insert_epoch(&mut self, epoch: Epoch, state: EpochState) {
        for block in &state.fresh {
            self.owners.insert(*block, epoch);
        }
        if !state.fresh.is_empty() {
            *self.outstanding.entry(state.writer).or_default() += state.fresh.len();
        }
        if let Some(lease_until) = state.lease_until() {
            self.wake_at(lease_until);
        }
        self.epochs.insert(epoch, state);
    }

    pub(super) fn drop_epoch(&mut self, epoch: Epoch) -> Option<EpochState> {
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
