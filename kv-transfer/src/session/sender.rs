//! The sender's half of one hand-over.
//!
//! Life: connect, ask, be granted, push, complete, hear that it was committed. Where the path breaks, it says so, connects by
//! another kind of path and asks again, naming the epoch that broke: everything that the new grant wants is written again. It
//! ends once, in an [`Outcome`]; where that is a failure under a grant, the epoch is fenced: markers down every connection of
//! the path, then `Fenced`. Where that cannot be done in time the path is closed and the receiver told, which has what is left
//! of it destroyed.
//!
//! Invariants: nothing is written before the grant, outside the wanted ordinals, or twice under one epoch; nothing is written
//! under an epoch that broke, or after the outcome; `Fenced` is said only when the markers are in the wire; a kind of path
//! that broke is not taken again by the same hand-over.

use super::arrival::{Arrival, Misfit};
use super::digest::Sums;
use super::message::{ToReceiver, ToSender};
use crate::{Fallback, PathKind, TransferError};
use baton_types::{BlockId, Epoch};
use bytes::Bytes;
use std::ops::Range;
use std::time::Duration;

/// Bounds of the machine.
#[derive(Debug, Clone)]
pub(crate) struct SenderLimits {
    /// Layers of a block.
    pub layers: u32,
    /// When the hand-over must have ended.
    pub deadline: Duration,
    /// Time for the markers to reach the wire.
    pub fence_timeout: Duration,
    /// Time for the receiver's answer, once everything was handed to the wire.
    pub answer_timeout: Duration,
    /// The receiver is told a digest of what was written.
    pub digest: bool,
}

/// What the receiver granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grant {
    pub epoch: Epoch,
    pub held: u32,
    pub digest_from: u32,
    pub wanted: Range<u32>,
    /// The receiver's blocks of the wanted ordinals, in order.
    pub destinations: Vec<BlockId>,
    pub lease: Duration,
}

impl Grant {
    /// Where an ordinal is to be written, if it is wanted.
    pub(crate) fn destination(&self, ordinal: u32) -> Option<BlockId> {
        let at = ordinal.checked_sub(self.wanted.start)?;
        self.destinations.get(at as usize).copied()
    }
}

/// What becomes of an extent that was pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Push {
    /// It is written there now.
    Write(BlockId),
    /// It is kept, should a later grant want it.
    Keep,
    /// The receiver had it from the first.
    Drop,
}

/// How it ended.
pub(crate) type Outcome = Result<(), TransferError>;

/// What happens to the machine.
#[derive(Debug, Clone)]
pub(crate) enum SenderEvent {
    /// Control connection and path are there.
    Connected { path: PathKind },
    /// They cannot be had.
    ConnectFailed { error: TransferError },
    /// The role wants blocks.
    Reserve { context_tokens: u64 },
    /// The role says that everything was pushed.
    Complete { payload: Bytes },
    /// The role gives up.
    Abort { error: TransferError },
    /// The receiver speaks. `epoch` is what its header names.
    Message { epoch: Option<Epoch>, message: ToSender },
    /// Everything that was pushed is in the wire.
    Drained,
    /// A write under that epoch failed.
    WriteFailed { epoch: Epoch, error: TransferError },
    /// So many layers of a block were summed, just before they are written.
    Summed { ordinal: u32, layers: u32, sum: u64 },
    /// The markers are in the wire of so many connections.
    FenceSent { connections: u32 },
    /// They cannot get there.
    FenceFailed,
    /// The link to the peer is gone.
    LinkLost { error: TransferError },
    /// Time passed.
    Tick,
}

/// What the driver has to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SenderEffect {
    /// Tell the receiver. The header's epoch is given.
    Send { epoch: Option<Epoch>, message: ToReceiver },
    /// Send the markers, behind what is being written, and answer.
    Fence { epoch: Epoch },
    /// Stop writing, close the path, and connect by a kind that is none of these.
    NextPath { failed: Vec<PathKind> },
    /// Under the new grant: write everything that was pushed and that it wants, then `Drained`.
    Rewrite,
    /// Close the path: it is of no use.
    ClosePath,
}

#[derive(Debug)]
enum Fencing {
    NotNeeded,
    Until(Duration),
    Over,
}

/// The machine. See the module's head.
#[derive(Debug)]
pub(crate) struct Sender {
    limits: SenderLimits,
    /// None while there is none, or none any more.
    path: Option<PathKind>,
    /// Kinds of path that broke, and how the last one did.
    failed: Vec<PathKind>,
    broke: Option<TransferError>,
    fallbacks: Vec<Fallback>,
    /// Tokens that were asked blocks for.
    wants: Option<u64>,
    /// On this path.
    asked: bool,
    grant: Option<Grant>,
    /// The last epoch whose path broke.
    broken: Option<Epoch>,
    /// What the first grant wanted: the role pushes these.
    wanted: Range<u32>,
    pushed: Option<Arrival>,
    sums: Sums,
    payload: Option<Bytes>,
    /// `Complete` was said under this grant.
    completed: bool,
    drained: bool,
    /// When the receiver's answer is due.
    answer_until: Option<Duration>,
    renewed: Duration,
    outcome: Option<Outcome>,
    fencing: Fencing,
    effects: Vec<SenderEffect>,
}

impl Sender {
    pub(crate) fn new(limits: SenderLimits) -> Self {
        Self {
            sums: Sums::new(0..0, limits.layers),
            limits,
            path: None,
            failed: Vec::new(),
            broke: None,
            fallbacks: Vec::new(),
            wants: None,
            asked: false,
            grant: None,
            broken: None,
            wanted: 0..0,
            pushed: None,
            payload: None,
            completed: false,
            drained: true,
            answer_until: None,
            renewed: Duration::ZERO,
            outcome: None,
            fencing: Fencing::NotNeeded,
            effects: Vec::new(),
        }
    }

    pub(crate) fn grant(&self) -> Option<&Grant> {
        self.grant.as_ref()
    }

    /// The path that it uses, or the last one.
    pub(crate) fn path(&self) -> Option<PathKind> {
        self.path.or(self.failed.last().copied())
    }

    pub(crate) fn fallbacks(&self) -> &[Fallback] {
        &self.fallbacks
    }

    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    /// Nothing is left to do: the outcome is known and the epoch, if any, needs no more fencing.
    pub(crate) fn is_over(&self) -> bool {
        self.outcome.is_some() && !matches!(self.fencing, Fencing::Until(_))
    }

    /// When a `Tick` is due.
    pub(crate) fn next_tick(&self) -> Duration {
        match (&self.outcome, &self.fencing) {
            (_, Fencing::Until(at)) => *at,
            (Some(_), Fencing::NotNeeded | Fencing::Over) => Duration::MAX,
            (None, Fencing::NotNeeded | Fencing::Over) => {
                let answer = self.answer_until.unwrap_or(Duration::MAX);
                self.limits
                    .deadline
                    .min(answer)
                    .min(self.renewal().unwrap_or(Duration::MAX))
            }
        }
    }

    /// When the lease is to be renewed: four times in its length, while this side computes. Not while something waits for the
    /// wire: then it is the transfer that makes no progress, and the lease may run out.
    fn renewal(&self) -> Option<Duration> {
        let grant = self.grant.as_ref().filter(|_| self.drained && self.payload.is_none())?;
        Some(self.renewed.saturating_add(grant.lease / 4))
    }

    pub(crate) fn take_effects(&mut self) -> Vec<SenderEffect> {
        std::mem::take(&mut self.effects)
    }

    /// What becomes of an extent.
    ///
    /// # Errors
    /// Before the grant, after the end, after `Complete`, outside the context, or pushed before: the last three end the attempt.
    pub(crate) fn push(&mut self, now: Duration, ordinal: u32, layers: &Range<u32>) -> Result<Push, TransferError> {
        if let Some(outcome) = &self.outcome {
            return Err(outcome.clone().err().unwrap_or(TransferError::AlreadyCommitted));
        }
        let protocol = |reason: String| TransferError::Protocol { reason };
        let Some(pushed) = &mut self.pushed else {
            return Err(protocol("pushed before the grant".to_owned()));
        };
        if ordinal < self.wanted.start {
            return Ok(Push::Drop);
        }
        let error = match pushed.take(ordinal, layers) {
            Ok(()) => {
                pushed.land(ordinal, layers);
                let destination = self.grant.as_ref().and_then(|grant| grant.destination(ordinal));
                return Ok(match destination {
                    None => Push::Keep,
                    Some(destination) => {
                        self.drained = false;
                        self.answer_until = None;
                        Push::Write(destination)
                    }
                });
            }
            Err(Misfit::Outside) => protocol(format!("layers {layers:?} of block {ordinal} are not wanted")),
            Err(Misfit::Duplicate | Misfit::Overlap) => {
                protocol(format!("layers {layers:?} of block {ordinal} were pushed twice"))
            }
        };
        self.fail(now, error.clone(), true);
        Err(error)
    }

    /// Takes an event. Effects are collected by [`Self::take_effects`].
    pub(crate) fn handle(&mut self, now: Duration, event: SenderEvent) {
        match event {
            SenderEvent::Connected { path } => self.connected(now, path),
            SenderEvent::Reserve { context_tokens } => {
                self.wants.get_or_insert(context_tokens);
                self.ask(now);
            }
            SenderEvent::Complete { payload } => self.complete(now, payload),
            SenderEvent::Abort { error } => self.fail(now, error, true),
            SenderEvent::WriteFailed { epoch, error } => {
                if self.grant.as_ref().is_some_and(|grant| grant.epoch == epoch) {
                    self.path_broke(error);
                }
            }
            // Why there was a need for another path says more than that there is none.
            SenderEvent::ConnectFailed { error } => {
                let error = self.broke.clone().unwrap_or(error);
                self.fail(now, error, true);
            }
            SenderEvent::Message { epoch, message } => self.message(now, epoch, message),
            SenderEvent::Drained => {
                self.drained = true;
                self.await_answer(now);
            }
            SenderEvent::Summed { ordinal, layers, sum } => {
                self.sums.add(ordinal, layers, sum);
                self.say_complete(now);
            }
            SenderEvent::FenceSent { connections } => {
                if let (Fencing::Until(_), Some(grant)) = (&self.fencing, &self.grant) {
                    let (epoch, message) = (Some(grant.epoch), ToReceiver::Fenced { connections });
                    self.effects.push(SenderEffect::Send { epoch, message });
                    self.fencing = Fencing::Over;
                }
            }
            SenderEvent::FenceFailed => self.give_up_fencing("it takes no markers"),
            SenderEvent::LinkLost { error } => {
                self.fail(now, error, false);
                self.fencing = Fencing::Over;
                self.effects.clear();
            }
            SenderEvent::Tick => self.tick(now),
        }
    }

    fn connected(&mut self, now: Duration, path: PathKind) {
        if self.outcome.is_some() || self.path.is_some() {
            return;
        }
        self.path = Some(path);
        if let (Some(from), Some(error)) = (self.failed.last(), &self.broke) {
            let (from, to, reason) = (*from, path, error.to_string());
            self.fallbacks.push(Fallback { from, to, reason });
        }
        self.ask(now);
    }

    fn ask(&mut self, now: Duration) {
        let (Some(path), Some(context_tokens)) = (self.path, self.wants) else {
            return;
        };
        if self.asked || self.outcome.is_some() {
            return;
        }
        self.asked = true;
        let budget = self.limits.deadline.saturating_sub(now);
        let message = ToReceiver::Reserve {
            context_tokens,
            path,
            budget,
            digest: self.limits.digest,
        };
        let epoch = self.broken;
        self.effects.push(SenderEffect::Send { epoch, message });
    }

    /// Goes on over another path, if the driver finds one.
    fn path_broke(&mut self, error: TransferError) {
        let Some(path) = self.path.take().filter(|_| self.outcome.is_none()) else {
            return;
        };
        if let Some(grant) = self.grant.take() {
            self.broken = Some(grant.epoch);
            let (epoch, error) = (Some(grant.epoch), error.clone());
            self.effects.push(SenderEffect::Send {
                epoch,
                message: ToReceiver::PathBroken { error },
            });
        }
        self.failed.push(path);
        self.broke = Some(error);
        (self.asked, self.completed, self.drained) = (false, false, true);
        self.answer_until = None;
        self.effects.push(SenderEffect::NextPath {
            failed: self.failed.clone(),
        });
    }

    fn complete(&mut self, now: Duration, payload: Bytes) {
        if self.outcome.is_some() || self.payload.is_some() {
            return;
        }
        let Some(pushed) = &self.pushed else {
            let reason = "completed before the grant".to_owned();
            return self.fail(now, TransferError::Protocol { reason }, true);
        };
        if !pushed.is_full() {
            let reason = "completed before everything was pushed".to_owned();
            return self.fail(now, TransferError::Protocol { reason }, true);
        }
        self.payload = Some(payload);
        self.say_complete(now);
    }

    /// Under each grant once, when everything is known that is to be said.
    fn say_complete(&mut self, now: Duration) {
        let (Some(payload), Some(grant)) = (&self.payload, &self.grant) else {
            return;
        };
        if self.completed || self.outcome.is_some() {
            return;
        }
        let digest = match self.limits.digest {
            false => None,
            true => match self.sums.of(grant.digest_from..grant.wanted.end) {
                None => return,
                some => some,
            },
        };
        let message = ToReceiver::Complete {
            blocks: grant.wanted.clone(),
            payload: payload.clone(),
            digest,
        };
        let epoch = Some(grant.epoch);
        self.effects.push(SenderEffect::Send { epoch, message });
        self.completed = true;
        self.await_answer(now);
    }

    fn await_answer(&mut self, now: Duration) {
        if self.completed && self.drained && self.outcome.is_none() {
            self.answer_until
                .get_or_insert(now.saturating_add(self.limits.answer_timeout));
        }
    }

    fn message(&mut self, now: Duration, epoch: Option<Epoch>, message: ToSender) {
        let current = self.grant.as_ref().map(|grant| grant.epoch);
        let about_current = epoch.is_some() && epoch == current;
        match message {
            ToSender::Grant {
                held,
                digest_from,
                wanted,
                destinations,
                lease,
            } => match epoch {
                Some(epoch) if current.is_none() && Some(epoch) > self.broken => {
                    let grant = Grant {
                        epoch,
                        held,
                        digest_from,
                        wanted,
                        destinations,
                        lease,
                    };
                    self.granted(now, grant);
                }
                Some(_) | None => {}
            },
            ToSender::Refused { error } if current.is_none() => match error {
                TransferError::PathFailed { .. } if self.asked => self.path_broke(error),
                error => self.fail(now, error, false),
            },
            ToSender::Fence { error } if about_current => match error {
                TransferError::PathFailed { .. } if self.outcome.is_none() => self.path_broke(error),
                error => self.fail(now, error, false),
            },
            // It may have had everything when the path broke.
            ToSender::Committed if epoch.is_some() && (epoch == current || epoch == self.broken) => {
                if self.outcome.is_none() && self.payload.is_some() {
                    self.outcome = Some(Ok(()));
                }
            }
            // About an epoch that is over or was never ours.
            ToSender::Refused { .. } | ToSender::Fence { .. } | ToSender::Committed => {}
        }
    }

    fn granted(&mut self, now: Duration, grant: Grant) {
        if self.outcome.is_some() || !self.asked {
            // Given up while the grant was under way: nothing was written under it, nor will be.
            let message = ToReceiver::Fenced { connections: 0 };
            self.effects.push(SenderEffect::Send {
                epoch: Some(grant.epoch),
                message,
            });
            return;
        }
        let wanted = grant.wanted.clone();
        let sound = wanted.start == grant.held
            && wanted.start <= wanted.end
            && grant.digest_from <= wanted.start
            && wanted.len() == grant.destinations.len();
        let first = self.pushed.is_none();
        if first {
            self.wanted = if sound { wanted.clone() } else { 0..0 };
            self.pushed = Some(Arrival::new(self.wanted.clone(), self.limits.layers));
            self.sums = Sums::new(self.wanted.clone(), self.limits.layers);
        }
        let sound = sound && wanted.end == self.wanted.end;
        let lost = grant.digest_from < self.wanted.start;
        self.renewed = now;
        self.grant = Some(grant);
        if !sound {
            let reason = "the grant contradicts itself".to_owned();
            return self.fail(now, TransferError::Protocol { reason }, true);
        }
        if lost {
            // What it held at first was not pushed, and it does not hold it any more.
            let reason = "the receiver wants blocks that it held before".to_owned();
            return self.fail(now, TransferError::Aborted { reason }, true);
        }
        if !first {
            self.drained = false;
            self.effects.push(SenderEffect::Rewrite);
        }
        self.say_complete(now);
    }

    /// Ends the attempt. With a grant, its epoch is fenced; where `tell`, the receiver hears why.
    fn fail(&mut self, now: Duration, error: TransferError, tell: bool) {
        if self.outcome.is_some() {
            return;
        }
        let granted = self.grant.as_ref().map(|grant| grant.epoch);
        if tell && (self.asked || !self.failed.is_empty()) {
            self.effects.push(SenderEffect::Send {
                epoch: granted.or(self.broken),
                message: ToReceiver::Abort { error: error.clone() },
            });
        }
        if let Some(epoch) = granted {
            self.fencing = Fencing::Until(now.saturating_add(self.limits.fence_timeout));
            self.effects.push(SenderEffect::Fence { epoch });
        }
        self.outcome = Some(Err(error));
    }

    /// The receiver gets its proof by destroying what is left of the path.
    fn give_up_fencing(&mut self, reason: &str) {
        let (Fencing::Until(_), Some(grant), Some(path)) = (&self.fencing, &self.grant, self.path) else {
            return;
        };
        let error = TransferError::PathFailed {
            path: path.to_string(),
            reason: reason.to_owned(),
        };
        self.effects.push(SenderEffect::Send {
            epoch: Some(grant.epoch),
            message: ToReceiver::PathBroken { error },
        });
        self.effects.push(SenderEffect::ClosePath);
        self.fencing = Fencing::Over;
    }

    fn tick(&mut self, now: Duration) {
        if let Fencing::Until(at) = self.fencing {
            if at <= now {
                self.give_up_fencing("the markers did not reach the wire in time");
            }
        } else if self.outcome.is_none() {
            if self.limits.deadline <= now {
                self.fail(now, TransferError::Deadline, true);
            } else if self.answer_until.is_some_and(|at| at <= now) {
                let reason = "it did not answer that it has everything".to_owned();
                self.fail(now, TransferError::PeerGone { reason }, true);
            } else if self.renewal().is_some_and(|at| at <= now) {
                self.renewed = now;
                let epoch = self.grant.as_ref().map(|grant| grant.epoch);
                self.effects.push(SenderEffect::Send {
                    epoch,
                    message: ToReceiver::Renew,
                });
            }
        }
    }
}

#[cfg(test)]
#[path = "sender_tests.rs"]
mod tests;
