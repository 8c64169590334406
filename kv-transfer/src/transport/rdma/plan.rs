//! What becomes of a batch of extents: work requests and notifications. Pure; nothing of a device is known here.
//!
//! - A large whole block is one write, or several whose last brings a word with it: the block is told as soon as it is there.
//! - Small blocks and parts of blocks are written in runs, where neighbours at the destination share a work request that
//!   gathers their bytes, and told together by a message behind them: a word each would cost the receiver more than the bytes.

use super::verbs::{Part, Remote};
use super::wire::{EXTENTS_MAX, Message, Slots, WORD_ORDINALS, Written, word};
use baton_types::Epoch;
use std::collections::VecDeque;
use std::ops::Range;

/// Whole blocks from this size on are told by a word each.
const WORD_BYTES_MIN: u32 = 64 << 10;
/// As are all whole blocks of so small a batch: a message would be one more work request.
const WORD_EXTENTS_MAX: usize = 2;
/// A message follows so many bytes at the latest.
const TOLD_BYTES_MAX: u64 = 512 << 10;

/// One extent, with both of its places.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    pub(super) ordinal: u32,
    pub(super) layers: Range<u32>,
    /// All layers of its block.
    pub(super) whole: bool,
    pub(super) from: Part,
    pub(super) to: Remote,
}

/// What one work request can do.
#[derive(Debug, Clone, Copy)]
pub(super) struct WriteLimits {
    /// Parts that it gathers.
    pub(super) parts: usize,
    /// Bytes that it writes.
    pub(super) bytes: u32,
}

/// One work request to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Writes these of the plan's parts, and tells by a word.
    Write {
        parts: Range<usize>,
        to: Remote,
        word: Option<u32>,
    },
    /// Sends a message.
    Tell(Message),
}

/// Work requests in order.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) parts: Vec<Part>,
    pub(super) steps: VecDeque<Step>,
    gathering: Option<Gathering>,
    untold: Vec<Written>,
    untold_bytes: u64,
}

/// A write that more parts may join.
#[derive(Debug)]
struct Gathering {
    first: usize,
    to: Remote,
    bytes: u32,
}

impl Plan {
    /// A marker.
    pub(super) fn fence(epoch: Epoch) -> Self {
        Self {
            steps: VecDeque::from([Step::Tell(Message::Fence { epoch })]),
            ..Self::default()
        }
    }

    /// A batch.
    pub(super) fn batch(epoch: Epoch, pieces: Vec<Piece>, limits: WriteLimits, slots: &mut Slots) -> Self {
        let mut plan = Self::default();
        let few = pieces.len() <= WORD_EXTENTS_MAX;
        for piece in pieces {
            let large = few || piece.from.len() >= WORD_BYTES_MIN;
            if large && piece.whole && piece.ordinal < WORD_ORDINALS {
                plan.alone(epoch, &piece, limits, slots);
            } else {
                plan.together(epoch, piece, limits);
            }
        }
        plan.tell(epoch);
        plan
    }

    fn alone(&mut self, epoch: Epoch, piece: &Piece, limits: WriteLimits, slots: &mut Slots) {
        self.end_gathering();
        let (slot, new) = slots.of(epoch);
        if new {
            self.steps.push_back(Step::Tell(Message::Bind { slot, epoch }));
        }
        self.write(piece, limits, word(slot, piece.ordinal));
    }

    /// Writes all of a piece, in several steps where it is too large for one.
    fn write(&mut self, piece: &Piece, limits: WriteLimits, word: Option<u32>) {
        let mut done = 0;
        while done < piece.from.len() {
            let len = limits.bytes.min(piece.from.len() - done);
            self.parts.push(piece.from.slice(done, len));
            let to = Remote {
                address: piece.to.address + u64::from(done),
                ..piece.to
            };
            done += len;
            self.steps.push_back(Step::Write {
                parts: self.parts.len() - 1..self.parts.len(),
                to,
                word: word.filter(|_| done == piece.from.len()),
            });
        }
    }

    fn together(&mut self, epoch: Epoch, piece: Piece, limits: WriteLimits) {
        let len = piece.from.len();
        if !self.gather(&piece, limits) {
            self.end_gathering();
            if len > limits.bytes {
                self.write(&piece, limits, None);
            } else {
                self.gathering = Some(Gathering {
                    first: self.parts.len(),
                    to: piece.to,
                    bytes: len,
                });
                self.parts.push(piece.from);
            }
        }
        self.untold.push(Written {
            ordinal: piece.ordinal,
            layers: piece.layers,
        });
        self.untold_bytes += u64::from(len);
        if self.untold.len() == EXTENTS_MAX || self.untold_bytes >= TOLD_BYTES_MAX {
            self.tell(epoch);
        }
    }

    /// Adds a piece to the write that is being gathered, where it follows at the destination and fits.
    fn gather(&mut self, piece: &Piece, limits: WriteLimits) -> bool {
        let Some(gathering) = &mut self.gathering else {
            return false;
        };
        let follows =
            gathering.to.key == piece.to.key && gathering.to.address + u64::from(gathering.bytes) == piece.to.address;
        let Some(bytes) = gathering.bytes.checked_add(piece.from.len()) else {
            return false;
        };
        if !follows || bytes > limits.bytes {
            return false;
        }
        let joined = self.parts.last_mut().is_some_and(|last| last.join(&piece.from));
        if !joined {
            if self.parts.len() - gathering.first >= limits.parts {
                return false;
            }
            self.parts.push(piece.from);
        }
        gathering.bytes = bytes;
        true
    }

    fn end_gathering(&mut self) {
        if let Some(Gathering { first, to, .. }) = self.gathering.take() {
            self.steps.push_back(Step::Write {
                parts: first..self.parts.len(),
                to,
                word: None,
            });
        }
    }

    /// Tells of everything that was written and not told.
    fn tell(&mut self, epoch: Epoch) {
        self.end_gathering();
        self.untold_bytes = 0;
        if !self.untold.is_empty() {
            let extents = std::mem::take(&mut self.untold);
            self.steps.push_back(Step::Tell(Message::Written { epoch, extents }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::unword;
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const EPOCH: Epoch = Epoch(5);
    const LIMITS: WriteLimits = WriteLimits {
        parts: 4,
        bytes: 1 << 20,
    };

    fn piece(ordinal: u32, layers: Range<u32>, from: u64, to: u64, len: u32) -> Piece {
        Piece {
            ordinal,
            whole: layers == (0..4),
            layers,
            from: Part::fake(from, len, 1),
            to: Remote { address: to, key: 2 },
        }
    }

    fn writes(plan: &Plan) -> Vec<(usize, u64, Option<u32>)> {
        plan.steps
            .iter()
            .filter_map(|step| match step {
                Step::Write { parts, to, word } => Some((parts.len(), to.address, word.map(|word| unword(word).1))),
                Step::Tell(_) => None,
            })
            .collect()
    }

    #[test]
    fn a_large_block_is_told_by_its_last_write() {
        let mut slots = Slots::default();
        let plan = Plan::batch(EPOCH, vec![piece(3, 0..4, 0, 1 << 30, 5 << 19)], LIMITS, &mut slots);
        let bind = Message::Bind { slot: 0, epoch: EPOCH };
        assert_eq!(plan.steps[0], Step::Tell(bind));
        let at = 1 << 30;
        assert_eq!(
            writes(&plan),
            [(1, at, None), (1, at + (1 << 20), None), (1, at + (2 << 20), Some(3))]
        );
        let again = Plan::batch(EPOCH, vec![piece(4, 0..4, 0, 0, 4096)], LIMITS, &mut slots);
        assert_eq!(again.steps.len(), 1, "the slot was bound before");
    }

    #[test]
    fn neighbours_share_a_request_and_a_message() {
        let pieces = (0..10).map(|i| piece(i, 0..4, u64::from(i) * 9000, u64::from(i) * 4096, 4096));
        let plan = Plan::batch(EPOCH, pieces.collect(), LIMITS, &mut Slots::default());
        assert_eq!(writes(&plan), [(4, 0, None), (4, 4 * 4096, None), (2, 8 * 4096, None)]);
        assert!(matches!(plan.steps.back(), Some(Step::Tell(Message::Written { extents, .. })) if extents.len() == 10));
        // Contiguous on both sides: one part.
        let pieces = (0..10).map(|i| piece(i, 0..4, u64::from(i) * 4096, u64::from(i) * 4096, 4096));
        let plan = Plan::batch(EPOCH, pieces.collect(), LIMITS, &mut Slots::default());
        assert_eq!(writes(&plan), [(1, 0, None)]);
    }

    #[test]
    fn an_ordinal_that_no_word_holds_goes_into_a_message() {
        let pieces = vec![piece(u32::MAX, 0..4, 0, 0, 1 << 20)];
        let plan = Plan::batch(EPOCH, pieces, LIMITS, &mut Slots::default());
        assert_eq!(writes(&plan), [(1, 0, None)]);
        assert_eq!(plan.steps.len(), 2);
    }

    proptest! {
        /// Executes the plan on a memory of bytes: every extent is where it belongs when it is told, and told once.
        #[test]
        fn whatever_is_told_was_written_before(
            shapes in prop::collection::vec((0u32..4, 1u32..5, 0u32..3), 1..80),
            parts in 1usize..5,
            bytes in 1u32..5000,
        ) {
            let limits = WriteLimits { parts, bytes };
            let mut at = 0;
            let mut pieces = Vec::new();
            for (i, (start, layers, gap)) in (0..).zip(shapes) {
                let layers = start..start + layers;
                let len = (layers.end - layers.start) * 700;
                at += u64::from(gap) * 700;
                pieces.push(piece(i, layers, at * 3, at, len));
                at += u64::from(len);
            }
            let wanted = pieces.clone();
            let mut plan = Plan::batch(EPOCH, pieces, limits, &mut Slots::default());
            let mut memory: HashMap<u64, u64> = HashMap::new();
            let mut told = Vec::new();
            let mut check = |ordinal: u32, memory: &HashMap<u64, u64>| {
                let piece = &wanted[ordinal as usize];
                for i in 0..u64::from(piece.from.len()) {
                    let from = piece.from.slice(i as u32, 1);
                    assert_eq!(memory.get(&(piece.to.address + i)), Some(&address(&from)));
                }
                told.push(ordinal);
            };
            while let Some(step) = plan.steps.pop_front() {
                match step {
                    Step::Write { parts: range, to, word } => {
                        let of = &plan.parts[range];
                        prop_assert!(of.len() <= parts);
                        let mut at = to.address;
                        for part in of {
                            for i in 0..part.len() {
                                memory.insert(at, address(&part.slice(i, 1)));
                                at += 1;
                            }
                        }
                        prop_assert!(at - to.address <= u64::from(bytes));
                        if let Some(word) = word {
                            check(unword(word).1, &memory);
                        }
                    }
                    Step::Tell(Message::Written { extents, .. }) => {
                        for extent in extents {
                            prop_assert_eq!(&extent.layers, &wanted[extent.ordinal as usize].layers);
                            check(extent.ordinal, &memory);
                        }
                    }
                    Step::Tell(_) => {}
                }
            }
            told.sort_unstable();
            prop_assert_eq!(told, (0..wanted.len() as u32).collect::<Vec<_>>());
        }
    }

    fn address(part: &Part) -> u64 {
        part.fake_address()
    }
}
