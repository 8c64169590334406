//! The sender's half of one hand-over.
//!
//! Life: connect, ask, be granted, push, complete, hear that it was committed. It ends once, in an [`Outcome`]; where that is
//! a failure after a grant, the epoch is fenced: markers down every connection of the path, then `Fenced`. Where that cannot
//! be done in time the link to the peer is broken, which proves as much to the receiver.
//!
//! Invariants: nothing is written before the grant, outside the wanted ordinals, or twice; nothing is written after the
//! outcome; `Fenced` is said only when the markers are in the wire.

use super::arrival::{Arrival, Misfit};
use super::message::{ToReceiver, ToSender};
use crate::{PathKind, TransferError};
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
}

/// What the receiver granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grant {
    pub epoch: Epoch,
    pub held: u32,
    pub wanted: Range<u32>,
    /// The receiver's blocks of the wanted ordinals, in order.
    pub destinations: Vec<BlockId>,
    pub lease: Duration,
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
    /// A write failed.
    WriteFailed { error: TransferError },
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
    /// Break the link: the receiver destroys what is left of it.
    BreakLink,
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
    path: Option<PathKind>,
    /// Tokens that were asked blocks for.
    wants: Option<u64>,
    asked: bool,
    grant: Option<Grant>,
    pushed: Option<Arrival>,
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
            limits,
            path: None,
            wants: None,
            asked: false,
            grant: None,
            pushed: None,
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

    pub(crate) fn path(&self) -> Option<PathKind> {
        self.path
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
        let grant = self.grant.as_ref().filter(|_| self.drained && !self.completed)?;
        Some(self.renewed.saturating_add(grant.lease / 4))
    }

    pub(crate) fn take_effects(&mut self) -> Vec<SenderEffect> {
        std::mem::take(&mut self.effects)
    }

    /// Where an extent is to be written; nowhere, where the receiver does not want it.
    ///
    /// # Errors
    /// Before the grant, after the end, after `Complete`, outside the context, or pushed before: the last three end the attempt.
    pub(crate) fn push(
        &mut self,
        now: Duration,
        ordinal: u32,
        layers: &Range<u32>,
    ) -> Result<Option<BlockId>, TransferError> {
        if let Some(outcome) = &self.outcome {
            return Err(outcome.clone().err().unwrap_or(TransferError::AlreadyCommitted));
        }
        let protocol = |reason: String| TransferError::Protocol { reason };
        let (Some(grant), Some(pushed)) = (&self.grant, &mut self.pushed) else {
            return Err(protocol("pushed before the grant".to_owned()));
        };
        if ordinal < grant.held {
            return Ok(None);
        }
        let error = match pushed.take(ordinal, layers) {
            Ok(()) => {
                pushed.land(ordinal, layers);
                self.drained = false;
                self.answer_until = None;
                return Ok(Some(grant.destinations[(ordinal - grant.held) as usize]));
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
            SenderEvent::Connected { path } => {
                self.path = Some(path);
                self.ask(now);
            }
            SenderEvent::Reserve { context_tokens } => {
                self.wants.get_or_insert(context_tokens);
                self.ask(now);
            }
            SenderEvent::Complete { payload } => self.complete(now, payload),
            SenderEvent::Abort { error } | SenderEvent::WriteFailed { error } => self.fail(now, error, true),
            SenderEvent::ConnectFailed { error } => self.fail(now, error, false),
            SenderEvent::Message { epoch, message } => self.message(now, epoch, message),
            SenderEvent::Drained => {
                self.drained = true;
                self.await_answer(now);
            }
            SenderEvent::FenceSent { connections } => {
                if let (Fencing::Until(_), Some(grant)) = (&self.fencing, &self.grant) {
                    let (epoch, message) = (Some(grant.epoch), ToReceiver::Fenced { connections });
                    self.effects.push(SenderEffect::Send { epoch, message });
                    self.fencing = Fencing::Over;
                }
            }
            SenderEvent::FenceFailed => self.break_link(),
            SenderEvent::LinkLost { error } => {
                self.fail(now, error, false);
                self.fencing = Fencing::Over;
                self.effects.clear();
            }
            SenderEvent::Tick => self.tick(now),
        }
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
        };
        self.effects.push(SenderEffect::Send { epoch: None, message });
    }

    fn complete(&mut self, now: Duration, payload: Bytes) {
        if self.outcome.is_some() || self.completed {
            return;
        }
        let (Some(grant), Some(pushed)) = (&self.grant, &self.pushed) else {
            let reason = "completed before the grant".to_owned();
            return self.fail(now, TransferError::Protocol { reason }, true);
        };
        if !pushed.is_full() {
            let reason = "completed before everything was pushed".to_owned();
            return self.fail(now, TransferError::Protocol { reason }, true);
        }
        let (epoch, message) = (
            Some(grant.epoch),
            ToReceiver::Complete {
                blocks: grant.wanted.clone(),
                payload,
            },
        );
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
        match message {
            ToSender::Grant {
                held,
                wanted,
                destinations,
                lease,
            } => match epoch {
                Some(epoch) if current.is_none() => {
                    let grant = Grant {
                        epoch,
                        held,
                        wanted,
                        destinations,
                        lease,
                    };
                    self.granted(now, grant);
                }
                Some(_) | None => {}
            },
            ToSender::Refused { error } if current.is_none() => self.fail(now, error, false),
            ToSender::Fence { error } if epoch.is_some() && epoch == current => self.fail(now, error, false),
            ToSender::Committed if epoch.is_some() && epoch == current && self.completed => {
                if self.outcome.is_none() {
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
        let sound =
            wanted.start == grant.held && wanted.start <= wanted.end && wanted.len() == grant.destinations.len();
        self.pushed = Some(Arrival::new(if sound { wanted } else { 0..0 }, self.limits.layers));
        self.renewed = now;
        self.grant = Some(grant);
        if !sound {
            let reason = "the grant contradicts itself".to_owned();
            self.fail(now, TransferError::Protocol { reason }, true);
        }
    }

    /// Ends the attempt. With a grant, its epoch is fenced; where `tell`, the receiver hears why.
    fn fail(&mut self, now: Duration, error: TransferError, tell: bool) {
        if self.outcome.is_some() {
            return;
        }
        let epoch = self.grant.as_ref().map(|grant| grant.epoch);
        if tell && self.asked {
            self.effects.push(SenderEffect::Send {
                epoch,
                message: ToReceiver::Abort { error: error.clone() },
            });
        }
        if let Some(epoch) = epoch {
            self.fencing = Fencing::Until(now.saturating_add(self.limits.fence_timeout));
            self.effects.push(SenderEffect::Fence { epoch });
        }
        self.outcome = Some(Err(error));
    }

    fn break_link(&mut self) {
        if matches!(self.fencing, Fencing::Until(_)) {
            self.fencing = Fencing::Over;
            self.effects.push(SenderEffect::BreakLink);
        }
    }

    fn tick(&mut self, now: Duration) {
        if let Fencing::Until(at) = self.fencing {
            if at <= now {
                self.break_link();
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
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn sender() -> Sender {
        Sender::new(SenderLimits {
            layers: 2,
            deadline: 60 * SECOND,
            fence_timeout: 2 * SECOND,
            answer_timeout: 10 * SECOND,
        })
    }

    fn sends(sender: &mut Sender) -> Vec<ToReceiver> {
        let take = |effect| match effect {
            SenderEffect::Send { message, .. } => Some(message),
            SenderEffect::Fence { .. } | SenderEffect::BreakLink => None,
        };
        sender.take_effects().into_iter().filter_map(take).collect()
    }

    fn grant(epoch: u64, wanted: Range<u32>) -> SenderEvent {
        let destinations = wanted.clone().map(baton_types::BlockId).collect();
        let message = ToSender::Grant {
            held: wanted.start,
            wanted,
            destinations,
            lease: 10 * SECOND,
        };
        SenderEvent::Message {
            epoch: Some(Epoch(epoch)),
            message,
        }
    }

    fn say(epoch: u64, message: ToSender) -> SenderEvent {
        SenderEvent::Message {
            epoch: Some(Epoch(epoch)),
            message,
        }
    }

    fn granted(wanted: Range<u32>) -> Sender {
        let mut sender = sender();
        sender.handle(SECOND, SenderEvent::Reserve { context_tokens: 40 });
        assert!(
            sender.take_effects().is_empty(),
            "nothing can be said before there is a connection"
        );
        sender.handle(2 * SECOND, SenderEvent::Connected { path: PathKind::Tcp });
        let reserve = ToReceiver::Reserve {
            context_tokens: 40,
            path: PathKind::Tcp,
            budget: 58 * SECOND,
        };
        assert_eq!(sends(&mut sender), [reserve]);
        sender.handle(3 * SECOND, grant(7, wanted));
        sender
    }

    #[test]
    fn the_normal_path() {
        let mut sender = granted(1..3);
        let now = 4 * SECOND;
        assert_eq!(sender.push(now, 0, &(0..2)), Ok(None), "the receiver holds it");
        assert_eq!(sender.push(now, 1, &(0..2)), Ok(Some(BlockId(1))));
        assert_eq!(sender.push(now, 2, &(0..1)), Ok(Some(BlockId(2))));
        assert_eq!(sender.push(now, 2, &(1..2)), Ok(Some(BlockId(2))));
        sender.handle(
            now,
            SenderEvent::Complete {
                payload: Bytes::from_static(b"x"),
            },
        );
        assert_eq!(
            sends(&mut sender),
            [ToReceiver::Complete {
                blocks: 1..3,
                payload: Bytes::from_static(b"x")
            }]
        );
        assert_eq!(sender.next_tick(), 60 * SECOND);
        sender.handle(now, SenderEvent::Drained);
        assert_eq!(sender.next_tick(), 14 * SECOND);
        sender.handle(now, say(6, ToSender::Committed));
        assert_eq!(sender.outcome(), None, "another epoch was committed, not this one");
        sender.handle(now, say(7, ToSender::Committed));
        assert_eq!(sender.outcome(), Some(&Ok(())));
        assert!(sender.is_over());
        assert!(sender.take_effects().is_empty());
    }

    #[test]
    fn nothing_is_pushed_before_the_grant_or_twice() {
        let mut early = sender();
        assert!(matches!(
            early.push(SECOND, 0, &(0..1)),
            Err(TransferError::Protocol { .. })
        ));
        assert_eq!(early.outcome(), None);
        for (ordinal, layers) in [(1, 0..2), (3, 0..2), (2, 1..3), (2, 1..1)] {
            let mut sender = granted(1..3);
            assert_eq!(sender.push(SECOND, 1, &(0..1)), Ok(Some(BlockId(1))));
            assert!(sender.push(SECOND, ordinal, &layers).is_err(), "{ordinal} {layers:?}");
            assert!(matches!(sender.outcome(), Some(Err(TransferError::Protocol { .. }))));
        }
    }

    #[test]
    fn completing_too_early_fails() {
        let mut sender = granted(1..3);
        assert_eq!(sender.push(SECOND, 1, &(0..2)), Ok(Some(BlockId(1))));
        sender.handle(SECOND, SenderEvent::Complete { payload: Bytes::new() });
        assert!(matches!(sender.outcome(), Some(Err(TransferError::Protocol { .. }))));
        assert!(!sender.is_over(), "the epoch is to be fenced");
    }

    #[test]
    fn a_failure_after_the_grant_is_fenced() {
        let mut sender = granted(0..1);
        let error = TransferError::Aborted { reason: "test".into() };
        sender.handle(5 * SECOND, SenderEvent::Abort { error: error.clone() });
        let epoch = Epoch(7);
        assert_eq!(
            sender.take_effects(),
            [
                SenderEffect::Send {
                    epoch: Some(epoch),
                    message: ToReceiver::Abort { error: error.clone() }
                },
                SenderEffect::Fence { epoch }
            ]
        );
        sender.handle(
            5 * SECOND,
            say(
                7,
                ToSender::Fence {
                    error: TransferError::Fenced,
                },
            ),
        );
        assert!(sender.take_effects().is_empty(), "it is being fenced already");
        assert_eq!(sender.push(SECOND, 0, &(0..1)), Err(error));
        sender.handle(5 * SECOND, SenderEvent::FenceSent { connections: 2 });
        assert_eq!(sends(&mut sender), [ToReceiver::Fenced { connections: 2 }]);
        assert!(sender.is_over());
    }

    #[test]
    fn a_fence_that_cannot_be_sent_breaks_the_link() {
        for event in [SenderEvent::FenceFailed, SenderEvent::Tick] {
            let mut sender = granted(0..1);
            sender.handle(
                5 * SECOND,
                say(
                    7,
                    ToSender::Fence {
                        error: TransferError::LeaseExpired,
                    },
                ),
            );
            assert_eq!(sender.take_effects(), [SenderEffect::Fence { epoch: Epoch(7) }]);
            assert_eq!(sender.next_tick(), 7 * SECOND);
            sender.handle(7 * SECOND, event);
            assert_eq!(sender.take_effects(), [SenderEffect::BreakLink]);
            assert!(sender.is_over());
            assert_eq!(sender.outcome(), Some(&Err(TransferError::LeaseExpired)));
        }
    }

    #[test]
    fn a_grant_that_comes_too_late_is_given_back() {
        let mut sender = sender();
        sender.handle(SECOND, SenderEvent::Connected { path: PathKind::Tcp });
        sender.handle(SECOND, SenderEvent::Reserve { context_tokens: 40 });
        sender.handle(
            SECOND,
            SenderEvent::Abort {
                error: TransferError::Deadline,
            },
        );
        assert!(sender.is_over(), "without a grant there is nothing to fence");
        sender.take_effects();
        sender.handle(SECOND, grant(7, 0..2));
        assert_eq!(sends(&mut sender), [ToReceiver::Fenced { connections: 0 }]);
    }

    #[test]
    fn no_answer_ends_in_a_failure() {
        let mut sender = granted(0..0);
        sender.handle(5 * SECOND, SenderEvent::Complete { payload: Bytes::new() });
        assert_eq!(sender.next_tick(), 15 * SECOND, "there was nothing to write");
        sender.handle(15 * SECOND, SenderEvent::Tick);
        assert!(matches!(sender.outcome(), Some(Err(TransferError::PeerGone { .. }))));

        let mut sender = granted(0..1);
        sender.handle(60 * SECOND, SenderEvent::Tick);
        assert_eq!(sender.outcome(), Some(&Err(TransferError::Deadline)));
    }

    #[test]
    fn a_lost_link_needs_no_fence() {
        let mut sender = granted(0..1);
        let error = TransferError::PeerGone { reason: "test".into() };
        sender.handle(5 * SECOND, SenderEvent::LinkLost { error: error.clone() });
        assert_eq!(sender.outcome(), Some(&Err(error)));
        assert!(sender.is_over());
        assert!(sender.take_effects().is_empty());
    }

    #[test]
    fn the_lease_is_renewed_while_this_side_computes() {
        let mut sender = granted(0..1);
        sender.take_effects();
        for renewal in 1..5 {
            let due = 3 * SECOND + renewal * 5 * SECOND / 2;
            assert_eq!(sender.next_tick(), due);
            sender.handle(due, SenderEvent::Tick);
            assert_eq!(sends(&mut sender), [ToReceiver::Renew]);
        }
        assert_eq!(sender.push(14 * SECOND, 0, &(0..2)), Ok(Some(BlockId(0))));
        assert_eq!(
            sender.next_tick(),
            60 * SECOND,
            "what waits for the wire renews nothing"
        );
        sender.handle(20 * SECOND, SenderEvent::Tick);
        assert_eq!(sends(&mut sender), []);
        sender.handle(21 * SECOND, SenderEvent::Drained);
        sender.handle(21 * SECOND, SenderEvent::Tick);
        assert_eq!(sends(&mut sender), [ToReceiver::Renew]);
    }

    #[test]
    fn a_grant_that_contradicts_itself_is_refused() {
        let mut sender = sender();
        sender.handle(SECOND, SenderEvent::Connected { path: PathKind::Tcp });
        sender.handle(SECOND, SenderEvent::Reserve { context_tokens: 40 });
        let message = ToSender::Grant {
            held: 0,
            wanted: 1..3,
            destinations: Vec::new(),
            lease: SECOND,
        };
        sender.handle(SECOND, say(9, message));
        assert!(matches!(sender.outcome(), Some(Err(TransferError::Protocol { .. }))));
        assert!(!sender.is_over(), "the receiver has set blocks aside");
    }
}
