//! The receiver's end of one queue pair: takes note of what was written, and proves by its end that nothing more can be.
//!
//! The bytes are in the arena before this task hears of them. Each notification is claimed and landed at once: that is what
//! checks epoch, writer, grant and duplicates. Invariant: the entry among the writers drops only after `ibv_destroy_qp`
//! returned without an error; where it does not, the entry is kept for ever, and so are the quarantined blocks.

use super::pair::{Done, PairEnd};
use super::verbs::{Chain, Completion, Failure, VerbsError, Work};
use super::wire::{Message, NoMessage, Written, unword};
use crate::PathKind;
use crate::transport::writers::WriterEntry;
use crate::transport::{ExtentHeader, metric};
use baton_types::{Epoch, KvGeometry};
use std::any::Any;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Messages being sent at once: returned credits.
pub(super) const MESSAGES: usize = 8;
/// Fewest receives: a quarter of them is returned at once.
pub(super) const RECEIVES_MIN: usize = 4;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("it was closed here")]
    Stopped,
    #[error("the writer closed it, or another queue pair of its path ended")]
    Over,
    #[error("the device gave it up")]
    DeviceFailed,
    #[error("its work failed: {}", .0.name())]
    Failed(Failure),
    #[error("the device refused work: {0}")]
    Refused(#[from] VerbsError),
    #[error("malformed message: {0}")]
    Malformed(#[from] NoMessage),
    #[error("slot {slot} is bound to no epoch")]
    Unbound { slot: u16 },
}

/// One queue pair of a writer. Fields drop in order: the queue pair is destroyed before the entry says so.
pub(super) struct Receiver {
    pub(super) end: PairEnd,
    geometry: KvGeometry,
    /// Cancelled when the path that this belongs to is over.
    pub(super) over: CancellationToken,
    entry: Arc<WriterEntry>,
    notes: Notes,
}

/// What the connection remembers.
#[derive(Default)]
struct Notes {
    slots: HashMap<u16, Epoch>,
    done: Vec<Completion>,
    /// Receives posted again whose credit was not returned yet.
    unreturned: usize,
    sends: u64,
    /// Messages being sent: number and slot.
    sending: Vec<(u64, usize)>,
    landed: usize,
    landed_bytes: usize,
}

impl Receiver {
    pub(super) fn new(mut end: PairEnd, geometry: KvGeometry, over: CancellationToken, entry: WriterEntry) -> Self {
        let entry = Arc::new(entry);
        end.guard(Arc::clone(&entry) as Arc<dyn Any + Send + Sync>);
        Self {
            end,
            geometry,
            over,
            entry,
            notes: Notes::default(),
        }
    }

    /// Receives until the connection ends, for whatever reason; then destroys the queue pair.
    pub(super) async fn run(mut self) {
        let Err(end) = self.receive().await;
        // What the writer was told is written is here: it counts, unless this side or a broken protocol ends the connection.
        if matches!(end, End::Over | End::DeviceFailed) {
            self.last_notifications();
        }
        self.over.cancel();
        let from = self.entry.from();
        let (writer, connection) = (from.instance, from.connection);
        match &end {
            End::Stopped | End::Over => tracing::debug!(%writer, connection, %end, "data connection ended"),
            End::DeviceFailed | End::Failed(_) | End::Refused(_) => {
                tracing::warn!(%writer, connection, %end, "data connection broke");
            }
            End::Malformed(_) | End::Unbound { .. } => {
                metric::malformed(PathKind::Rdma);
                tracing::warn!(%writer, connection, %end, "data connection broke the protocol");
            }
        }
    }

    async fn receive(&mut self) -> Result<Infallible, End> {
        loop {
            let any = self.settle()?;
            self.return_credits()?;
            if any {
                metric::landed(PathKind::Rdma, self.notes.landed, self.notes.landed_bytes);
                (self.notes.landed, self.notes.landed_bytes) = (0, 0);
                // A writer that never stops keeps nobody else from running.
                tokio::task::consume_budget().await;
            }
            let Self {
                end,
                over,
                entry,
                notes,
                ..
            } = self;
            tokio::select! {
                biased;
                () = entry.stopped().cancelled() => return Err(End::Stopped),
                come = end.completions.next(&mut notes.done) => come?,
                () = end.watch.failed() => return Err(End::DeviceFailed),
                () = over.cancelled() => return Err(End::Over),
            }
        }
    }

    /// Takes note of what came; whether anything had.
    fn settle(&mut self) -> Result<bool, End> {
        let mut done = std::mem::take(&mut self.notes.done);
        self.end.completions.poll(&mut done)?;
        let any = !done.is_empty();
        let mut again = Vec::new();
        for completion in done.drain(..) {
            let slot = match self.end.done(&completion).map_err(End::Failed)? {
                Done::Sent(last) => {
                    self.sent(last);
                    continue;
                }
                Done::Word { slot, word } => {
                    self.word(word)?;
                    slot
                }
                Done::Message { slot, message } => {
                    self.message(message?)?;
                    slot
                }
            };
            again.push(slot);
        }
        self.notes.done = done;
        self.notes.unreturned += again.len();
        self.end.receive_again(again)?;
        Ok(any)
    }

    /// Lands what was told before the end. What fails now failed with the connection.
    fn last_notifications(&mut self) {
        while matches!(self.settle(), Ok(true)) {}
        metric::landed(PathKind::Rdma, self.notes.landed, self.notes.landed_bytes);
    }

    fn word(&mut self, word: u32) -> Result<(), End> {
        let (slot, ordinal) = unword(word);
        let epoch = self.notes.slots.get(&slot).copied();
        let epoch = epoch.ok_or(End::Unbound { slot })?;
        let layers = 0..self.geometry.layers;
        self.land(epoch, Written { ordinal, layers });
        Ok(())
    }

    fn message(&mut self, message: Message) -> Result<(), End> {
        match message {
            Message::Bind { slot, epoch } => {
                self.notes.slots.insert(slot, epoch);
            }
            Message::Written { epoch, extents } => {
                for extent in extents {
                    let layers = extent.layers.clone();
                    if layers.is_empty() || layers.end > self.geometry.layers {
                        let (field, value) = ("layers' end", layers.end.into());
                        return Err(NoMessage::Field { field, value }.into());
                    }
                    self.land(epoch, extent);
                }
            }
            Message::Fence { epoch } => self.entry.landing().fenced(self.entry.from(), epoch),
            Message::Credit { count } => {
                let (field, value) = ("credit from a writer", count.into());
                return Err(NoMessage::Field { field, value }.into());
            }
        }
        Ok(())
    }

    /// An extent is in the arena.
    fn land(&mut self, epoch: Epoch, written: Written) {
        let bytes = written.layers.len() * self.geometry.layer_bytes();
        let header = ExtentHeader {
            epoch,
            ordinal: written.ordinal,
            layers: written.layers,
            // Blocks of 4 GiB would not be sent: a writer's extents have lengths of 32 bits.
            len: u32::try_from(bytes).unwrap_or(u32::MAX),
        };
        let claim = self.entry.landing().claim(self.entry.from(), &header);
        match claim.and_then(|claim| claim.land()) {
            Ok(()) => {
                self.notes.landed += 1;
                self.notes.landed_bytes += bytes;
            }
            Err(reject) => metric::rejected(PathKind::Rdma, reject),
        }
    }

    /// Tells the writer of receives that were posted again, by the quarter of them.
    fn return_credits(&mut self) -> Result<(), End> {
        let quarter = (self.end.receives() / 4).max(1);
        if self.notes.unreturned < quarter {
            return Ok(());
        }
        let count = u16::try_from(self.notes.unreturned).unwrap_or(u16::MAX);
        let Some((slot, part)) = self.end.put(&Message::Credit { count }) else {
            return Ok(());
        };
        self.notes.unreturned -= usize::from(count);
        let mut chain = Chain::default();
        chain.push(self.notes.sends, Work::Send, [part]);
        chain.signal();
        self.notes.sending.push((self.notes.sends, slot));
        self.notes.sends += 1;
        Ok(self.end.post(&mut chain)?)
    }

    fn sent(&mut self, last: u64) {
        let over = self.notes.sending.extract_if(.., |(number, _)| *number <= last);
        self.end.free_slots(over.map(|(_, slot)| slot));
    }
}
