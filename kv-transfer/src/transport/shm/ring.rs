//! What the writer tells the receiver: a ring of notices in shared memory, one producer, one consumer.
//!
//! A notice stands behind its data: the copy ends before the release store of `HEAD` that publishes it. Neither side trusts a
//! word that the other can write: each keeps its own index to itself, masks what it addresses, and checks what it reads.
//! A side that sleeps says so in its flag, looks once more, and only then is kicked; the two fences make that safe (each side
//! stores, fences, loads: at least one of them sees the other's store).
//!
//! ```text
//! word 0   HEAD: notices ever written       word 32  READER_SLEEPS: kick me when there is more
//! word 16  TAIL: notices ever read          word 48  WRITER_WAITS: kick me when there is room
//! word 64  notices of 4 words: epoch | ordinal, kind << 32 | first layer, layers' end << 32 | 0
//! ```

use super::map::SharedWords;
use baton_types::Epoch;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// How many notices fit. A power of two.
pub(super) const CAPACITY: usize = 8192;
/// Words of a ring.
pub(super) const WORDS: usize = ENTRIES + CAPACITY * ENTRY_WORDS;

/// Indices and flags stand two lines apart, because processors fetch lines in pairs.
const HEAD: usize = 0;
const TAIL: usize = 16;
const READER_SLEEPS: usize = 32;
const WRITER_WAITS: usize = 48;
const ENTRIES: usize = 64;
const ENTRY_WORDS: usize = 4;
const KIND_EXTENT: u32 = 1;
const KIND_FENCE: u32 = 2;

/// One thing to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Notice {
    /// These layers of that block are in the receiver's arena.
    Extent {
        epoch: Epoch,
        ordinal: u32,
        layers: Range<u32>,
    },
    /// No later byte of that epoch comes from this writer.
    Fence { epoch: Epoch },
}

/// A peer that stored what no peer of ours would.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{field} of the ring is {value}")]
pub(super) struct Malformed {
    pub(super) field: &'static str,
    pub(super) value: u64,
}

/// Where notice `index` stands.
fn entry(words: &[AtomicU64], index: u64) -> &[AtomicU64] {
    let at = ENTRIES + (index as usize & (CAPACITY - 1)) * ENTRY_WORDS;
    &words[at..at + ENTRY_WORDS]
}

/// Clears a flag; whether it was set.
fn take(flag: &AtomicU64) -> bool {
    // Mostly it is not set, and a load keeps its line shared.
    flag.load(Ordering::Relaxed) != 0 && flag.swap(0, Ordering::Relaxed) != 0
}

/// The writer's end.
pub(super) struct Producer {
    memory: Arc<SharedWords>,
    head: u64,
    published: u64,
    /// The receiver's index as last seen.
    tail: u64,
    /// What each notice in the ring took of the writer's room.
    costs: Box<[u32]>,
}

impl Producer {
    pub(super) fn new(memory: Arc<SharedWords>) -> Self {
        Self {
            memory,
            head: 0,
            published: 0,
            tail: 0,
            costs: vec![0; CAPACITY].into_boxed_slice(),
        }
    }

    /// Looks how far the receiver has read; gives the room that this frees.
    ///
    /// # Errors
    /// An index that cannot be.
    pub(super) fn reclaim(&mut self) -> Result<usize, Malformed> {
        let tail = self.memory.words()[TAIL].load(Ordering::Acquire);
        if tail < self.tail || tail > self.published {
            return Err(Malformed {
                field: "tail",
                value: tail,
            });
        }
        let freed = (self.tail..tail).map(|index| self.costs[index as usize & (CAPACITY - 1)] as usize);
        let freed = freed.sum();
        self.tail = tail;
        Ok(freed)
    }

    /// Notices that fit now.
    pub(super) fn free(&self) -> usize {
        CAPACITY - (self.head - self.tail) as usize
    }

    /// Puts a notice in, unseen by the receiver until [`Self::publish`].
    ///
    /// # Panics
    /// Where none fits.
    pub(super) fn push(&mut self, notice: &Notice, cost: u32) {
        assert!(self.free() > 0, "a notice is pushed where one fits");
        let (epoch, ordinal, kind, layers) = match notice {
            Notice::Extent { epoch, ordinal, layers } => (epoch, *ordinal, KIND_EXTENT, layers.clone()),
            Notice::Fence { epoch } => (epoch, 0, KIND_FENCE, 0..0),
        };
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let values = [epoch.0, pair(ordinal, kind), pair(layers.start, layers.end), 0];
        for (word, value) in entry(self.memory.words(), self.head).iter().zip(values) {
            word.store(value, Ordering::Relaxed);
        }
        self.costs[self.head as usize & (CAPACITY - 1)] = cost;
        self.head += 1;
    }

    /// Lets the receiver see what was pushed. True where it sleeps and must be kicked.
    pub(super) fn publish(&mut self) -> bool {
        let words = self.memory.words();
        words[HEAD].store(self.head, Ordering::Release);
        self.published = self.head;
        fence(Ordering::SeqCst);
        take(&words[READER_SLEEPS])
    }

    /// Asks to be kicked once more was read; what was read by now is for [`Self::reclaim`] to see.
    pub(super) fn ask_for_room(&self) {
        self.memory.words()[WRITER_WAITS].store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

/// The receiver's end.
pub(super) struct Consumer {
    memory: SharedWords,
    layers: u32,
    /// The writer's index as last seen, and checked.
    head: u64,
    tail: u64,
    released: u64,
}

impl Consumer {
    /// For blocks of so many layers.
    pub(super) fn new(memory: SharedWords, layers: u32) -> Self {
        Self {
            memory,
            layers,
            head: 0,
            tail: 0,
            released: 0,
        }
    }

    /// The next notice, where there is one.
    ///
    /// # Errors
    /// An index that cannot be, a kind or layers that there are not. Nothing after it can be trusted.
    pub(super) fn next(&mut self) -> Result<Option<Notice>, Malformed> {
        let words = self.memory.words();
        if self.tail == self.head {
            let head = words[HEAD].load(Ordering::Acquire);
            let field = "head";
            if head < self.head || head - self.released > CAPACITY as u64 {
                return Err(Malformed { field, value: head });
            }
            self.head = head;
            if self.tail == head {
                return Ok(None);
            }
        }
        // Each word is read once: what was checked is what is used.
        let mut values = [0; ENTRY_WORDS];
        for (value, word) in values.iter_mut().zip(entry(words, self.tail)) {
            *value = word.load(Ordering::Relaxed);
        }
        let [epoch, what, layers, _] = values;
        let notice = self.read(Epoch(epoch), what, layers)?;
        self.tail += 1;
        Ok(Some(notice))
    }

    fn read(&self, epoch: Epoch, what: u64, layers: u64) -> Result<Notice, Malformed> {
        let (ordinal, kind) = (what as u32, (what >> 32) as u32);
        let (first, end) = (layers as u32, (layers >> 32) as u32);
        let bad = |field, value: u32| Malformed {
            field,
            value: value.into(),
        };
        match kind {
            KIND_FENCE => Ok(Notice::Fence { epoch }),
            KIND_EXTENT if end > self.layers => Err(bad("layers' end", end)),
            KIND_EXTENT if first >= end => Err(bad("first layer", first)),
            KIND_EXTENT => Ok(Notice::Extent {
                epoch,
                ordinal,
                layers: first..end,
            }),
            other => Err(bad("kind", other)),
        }
    }

    /// Gives the room of all notices read so far back to the writer. True where it waits for that and must be kicked.
    pub(super) fn release(&mut self) -> bool {
        let words = self.memory.words();
        words[TAIL].store(self.tail, Ordering::Release);
        self.released = self.tail;
        fence(Ordering::SeqCst);
        take(&words[WRITER_WAITS])
    }

    /// Says that the receiver sleeps. False where there is something to read, and no sleep to be had.
    pub(super) fn arm(&self) -> bool {
        let words = self.memory.words();
        words[READER_SLEEPS].store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let idle = words[HEAD].load(Ordering::Relaxed) == self.tail;
        if !idle {
            self.disarm();
        }
        idle
    }

    /// Says that it is awake.
    pub(super) fn disarm(&self) {
        self.memory.words()[READER_SLEEPS].store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ring(layers: u32) -> (Producer, Consumer, Arc<SharedWords>) {
        let (theirs, memory) = SharedWords::create(WORDS).unwrap();
        let ours = Arc::new(SharedWords::map(&memory, WORDS).unwrap());
        (Producer::new(Arc::clone(&ours)), Consumer::new(theirs, layers), ours)
    }

    fn extent(i: u64) -> Notice {
        Notice::Extent {
            epoch: Epoch(i),
            ordinal: i as u32 ^ 5,
            layers: 1..3,
        }
    }

    #[test]
    fn notices_come_in_order_across_many_turns_and_never_more_than_fit() {
        let (mut producer, mut consumer, _words) = ring(3);
        let (mut written, mut read, mut freed) = (0u64, 0u64, 0);
        for turn in 0..40 {
            while producer.free() > 0 && written < (turn + 1) * 5000 {
                let notice = if written % 7 == 0 {
                    Notice::Fence { epoch: Epoch(written) }
                } else {
                    extent(written)
                };
                producer.push(&notice, 3);
                written += 1;
            }
            producer.publish();
            while let Some(notice) = consumer.next().unwrap() {
                let expected = if read % 7 == 0 {
                    Notice::Fence { epoch: Epoch(read) }
                } else {
                    extent(read)
                };
                assert_eq!(notice, expected);
                read += 1;
            }
            assert_eq!(read, written);
            consumer.release();
            freed += producer.reclaim().unwrap();
            assert_eq!((freed as u64, producer.free()), (3 * written, CAPACITY));
        }
    }

    #[test]
    fn who_sleeps_is_kicked_once_and_who_does_not_is_not() {
        let (mut producer, mut consumer, _words) = ring(3);
        producer.push(&extent(1), 0);
        assert!(!producer.publish(), "nobody sleeps");
        assert!(!consumer.arm(), "there is something to read");
        assert!(consumer.next().unwrap().is_some());
        assert!(!consumer.release(), "nobody waits");
        assert!(consumer.arm());
        producer.push(&extent(2), 0);
        assert!(producer.publish());
        producer.push(&extent(3), 0);
        assert!(!producer.publish(), "it was kicked");
        consumer.disarm();
        producer.ask_for_room();
        assert!(consumer.release());
        assert!(!consumer.release());
    }

    #[test]
    fn nothing_is_seen_before_it_is_published() {
        let (mut producer, mut consumer, _words) = ring(3);
        producer.push(&extent(1), 0);
        assert_eq!(consumer.next(), Ok(None));
        producer.publish();
        assert_eq!(consumer.next(), Ok(Some(extent(1))));
        assert_eq!(producer.reclaim(), Ok(0), "read, but not given back");
    }

    #[test]
    fn indices_that_cannot_be_are_refused() {
        let (mut producer, mut consumer, words) = ring(3);
        let words = words.words();
        for head in [CAPACITY as u64 + 1, u64::MAX, 1 << 63] {
            words[HEAD].store(head, Ordering::Relaxed);
            assert_eq!(
                consumer.next(),
                Err(Malformed {
                    field: "head",
                    value: head
                })
            );
        }
        words[HEAD].store(0, Ordering::Relaxed);
        producer.push(&extent(1), 0);
        producer.publish();
        assert!(consumer.next().unwrap().is_some());
        words[HEAD].store(0, Ordering::Relaxed);
        assert!(consumer.next().is_err(), "it went back");
        for tail in [2, u64::MAX] {
            words[TAIL].store(tail, Ordering::Relaxed);
            assert!(producer.reclaim().is_err());
        }
    }

    proptest! {
        #[test]
        fn any_words_are_read_without_panic(values: [u64; 4], head in 0..=CAPACITY as u64, layers in 1u32..100) {
            let (_producer, mut consumer, words) = ring(layers);
            for (word, value) in entry(words.words(), 0).iter().zip(values) {
                word.store(value, Ordering::Relaxed);
            }
            words.words()[HEAD].store(head, Ordering::Relaxed);
            if let Ok(Some(Notice::Extent { layers: read, .. })) = consumer.next() {
                prop_assert!(read.start < read.end && read.end <= layers);
            }
        }
    }
}
