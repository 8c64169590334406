//! The end that a grant is for: everything is in, and it is what was sent.

use super::{EpochState, LastWord, Phase, Verdict};
use crate::TransferError;
use crate::session::message::{Header, ToSender};
use crate::session::receiver::{Effect, Receiver};
use baton_types::Epoch;
use std::time::Duration;

impl Receiver {
    /// Commits where everything is in, the writer said so, and it is what was sent. No unfenced epoch can hold these blocks
    /// too: `owners` refuses to grant them.
    pub(in super::super) fn try_commit(&mut self, now: Duration, epoch: Epoch) {
        let Some(state) = self.epochs.get_mut(&epoch) else {
            return;
        };
        let full = state.arrival.missing() <= u64::from(planted!(EarlyCommit));
        let (wanted, digest_from) = (state.wanted.clone(), state.digest_from);
        match &mut state.phase {
            Phase::Live {
                complete: Some(word),
                verdict,
                ..
            } if full && state.claims == 0 => {
                if let (Some(digest), Verdict::Open) = (word.digest, *verdict) {
                    *verdict = Verdict::Awaited;
                    state.claims += 1;
                    let blocks = (digest_from..wanted.end).map(|ordinal| (ordinal, state.block(ordinal)));
                    let blocks = blocks.collect();
                    self.effects.push(Effect::Verify { epoch, blocks, digest });
                    return self.renew(now, epoch);
                }
            }
            Phase::Live { .. } | Phase::Dead { .. } => return,
        }
        self.commit(now, epoch);
    }

    pub(in super::super) fn verified(&mut self, now: Duration, epoch: Epoch, matches: bool) {
        let Some(state) = self.epochs.get_mut(&epoch) else {
            return;
        };
        match &mut state.phase {
            Phase::Live { verdict, .. } if *verdict == Verdict::Awaited => {
                state.claims -= 1;
                if matches {
                    *verdict = Verdict::Matches;
                    self.try_commit(now, epoch);
                } else {
                    let reason = "its digest is not the sender's".to_owned();
                    self.fail_epoch(now, epoch, TransferError::Corrupt { reason }, true);
                }
            }
            Phase::Live { .. } => {}
            Phase::Dead { .. } => {
                state.claims = state.claims.saturating_sub(1);
                self.try_release(now, epoch);
            }
        }
    }

    fn commit(&mut self, now: Duration, epoch: Epoch) {
        let Some(state) = self.drop_epoch(epoch) else { return };
        let Phase::Live {
            complete: Some(LastWord { payload, .. }),
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
        let fallbacks = self.tickets.remove(&ticket).map(|expected| expected.fallbacks);
        self.remember_committed(ticket, attempt, epoch);
        self.effects.push(Effect::Commit {
            ticket,
            attempt,
            epoch,
            held: wanted.start,
            payload,
            bytes,
            path,
            fallbacks: fallbacks.unwrap_or_default(),
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
}
