//! One end of a connection: a queue pair with its completions, its mailbox and the device's word on it. Both sides have one.
//!
//! Slots of the mailbox: the first are posted as receives, the others hold messages being sent. Receives are numbered by
//! their slot with the highest bit set, sends count up from zero. Dropping an end destroys its queue pair.

use super::completions::Completions;
use super::device::{Device, PairWatch};
use super::hello::End;
use super::verbs::{Capacity, Chain, Completion, CompletionQueue, Failure, Mailbox, Part, Port, QueuePair, VerbsError};
use super::wire::{MESSAGE_BYTES, Message, NoMessage};
use baton_node_runtime::Clock;
use std::any::Any;
use std::sync::Arc;

/// Marks the number of a receive.
const RECEIVE: u64 = 1 << 63;
/// Most work requests posted and not over.
const SENDS_MAX: u32 = 512;
/// Most parts that one work request gathers: more would make the queue's memory large for nothing.
const PARTS_MAX: u32 = 16;

/// What an end is to hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct EndOptions {
    /// Receives posted.
    pub(super) receives: usize,
    /// Messages being sent at once.
    pub(super) messages: usize,
}

/// One end, not necessarily joined to another yet.
pub(super) struct PairEnd {
    pub(super) completions: Completions,
    /// There until the end is dropped.
    pair: Option<QueuePair>,
    mail: Mailbox,
    receives: usize,
    free: Vec<usize>,
    pub(super) watch: PairWatch,
    port: Port,
    capacity: Capacity,
    pub(super) device: Arc<Device>,
    /// What must outlive the queue pair: kept for ever where that cannot be destroyed.
    guarded: Vec<Arc<dyn Any + Send + Sync>>,
}

impl Drop for PairEnd {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.pair.take().map(QueuePair::destroy) {
            tracing::error!(%error, "a queue pair cannot be destroyed: whatever it may read or write is kept for ever");
            std::mem::forget(std::mem::take(&mut self.guarded));
        }
    }
}

/// What a completion means.
#[derive(Debug)]
pub(super) enum Done {
    /// This send and all before it are over.
    Sent(u64),
    /// A message came. Its receive is to be posted again.
    Message {
        slot: usize,
        message: Result<Message, NoMessage>,
    },
    /// A write came with a word. Its receive is to be posted again.
    Word { slot: usize, word: u32 },
}

impl PairEnd {
    /// A new queue pair with all of its receives posted.
    ///
    /// # Errors
    /// What the device says.
    pub(super) fn new(device: &Arc<Device>, port: Port, options: EndOptions, clock: Clock) -> Result<Self, VerbsError> {
        let limits = device.context().limits();
        let receives = u32::try_from(options.receives)
            .unwrap_or(u32::MAX)
            .min(limits.work_requests);
        let capacity = Capacity {
            sends: SENDS_MAX.min(limits.work_requests),
            receives,
            parts: PARTS_MAX.min(limits.parts),
        };
        let entries = (capacity.sends + capacity.receives).min(limits.completions);
        let queue = CompletionQueue::new(device.context(), entries, device.next_queue())?;
        let receives = receives as usize;
        let mail = Mailbox::new(device.domain(), receives + options.messages, MESSAGE_BYTES)?;
        let mut random = [0; 4];
        getrandom::fill(&mut random).expect("the operating system provides random bytes");
        let pair = QueuePair::new(device.domain(), &queue, capacity, &port, u32::from_le_bytes(random))?;
        let watch = device.watch_pair(pair.number());
        let end = Self {
            completions: Completions::new(&queue, clock),
            pair: Some(pair),
            mail,
            receives,
            free: (receives..receives + options.messages).collect(),
            watch,
            port,
            capacity,
            device: Arc::clone(device),
            guarded: Vec::new(),
        };
        end.receive_again(0..receives)?;
        Ok(end)
    }

    fn pair(&self) -> &QueuePair {
        self.pair.as_ref().expect("an end has its pair until it is dropped")
    }

    /// As the peer is told of it.
    pub(super) fn describe(&self, arena: u32) -> End {
        End {
            number: self.pair().number(),
            first_packet: self.pair().first_packet(),
            gid: self.port.gid.to_vec(),
            lid: self.port.lid.into(),
            mtu: self.port.mtu,
            arena,
        }
    }

    pub(super) fn port(&self) -> &Port {
        &self.port
    }

    /// What the queue pair holds.
    pub(super) fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// How many receives are posted in all.
    pub(super) fn receives(&self) -> usize {
        self.receives
    }

    /// Joins it to its peer.
    ///
    /// # Errors
    /// What the device says.
    pub(super) fn connect(&self, remote: &super::verbs::RemoteEnd) -> Result<(), VerbsError> {
        self.pair().connect(&self.port, remote)
    }

    /// Posts receives into these slots.
    ///
    /// # Errors
    /// What the device says.
    pub(super) fn receive_again(&self, slots: impl IntoIterator<Item = usize>) -> Result<(), VerbsError> {
        let wanted: Vec<_> = slots
            .into_iter()
            .map(|slot| (RECEIVE | slot as u64, self.mail.whole(slot)))
            .collect();
        self.pair().receive(&wanted)
    }

    /// A message can be sent now.
    pub(super) fn has_slot(&self) -> bool {
        !self.free.is_empty()
    }

    /// Puts a message into a free slot, to be sent and given back by [`Self::free_slots`] when it was; none where there is no
    /// free one.
    pub(super) fn put(&mut self, message: &Message) -> Option<(usize, Part)> {
        let slot = self.free.pop()?;
        Some((slot, self.mail.put(slot, &message.encode())))
    }

    /// These messages were sent.
    pub(super) fn free_slots(&mut self, slots: impl IntoIterator<Item = usize>) {
        self.free.extend(slots);
    }

    /// # Errors
    /// What the device says.
    pub(super) fn post(&self, chain: &mut Chain) -> Result<(), VerbsError> {
        self.pair().post(chain)
    }

    /// What a completion means.
    ///
    /// # Errors
    /// Where its work failed.
    pub(super) fn done(&mut self, completion: &Completion) -> Result<Done, Failure> {
        let bytes = completion.outcome?;
        if completion.id & RECEIVE == 0 {
            return Ok(Done::Sent(completion.id));
        }
        // Numbers come back as they were posted: below `receives`.
        let slot = usize::try_from(completion.id & !RECEIVE).unwrap_or(0);
        Ok(match completion.word {
            Some(word) => Done::Word { slot, word },
            None => Done::Message {
                slot,
                message: Message::decode(&self.mail.take(slot, bytes.min(MESSAGE_BYTES))),
            },
        })
    }

    /// Holds this until the queue pair is destroyed, and for ever where the device refuses that: nothing is proven then.
    pub(super) fn guard(&mut self, what: Arc<dyn Any + Send + Sync>) {
        self.guarded.push(what);
    }
}
