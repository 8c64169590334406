//! Messages in-band: small ones, sent on the queue pair that carries the data, and the word that comes with a write.
//!
//! All integers are little-endian. Reliable connections neither lose nor damage nor reorder: there is no checksum here.
//!
//! ```text
//! message   version u8 | kind u8 | count or slot u16 | zero u32 | epoch u64 | count descriptors
//! descriptor  ordinal u32 | first layer u32 | layers' end u32
//! word      slot 12 bits | ordinal 20 bits
//! ```

use baton_types::Epoch;
use std::collections::HashMap;
use std::ops::Range;

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 16;
const DESCRIPTOR_BYTES: usize = 12;
/// Most bytes of a message.
pub(super) const MESSAGE_BYTES: usize = 2048;
/// Most extents that one message names.
pub(super) const EXTENTS_MAX: usize = (MESSAGE_BYTES - HEADER_BYTES) / DESCRIPTOR_BYTES;
/// Slots of one connection.
pub(super) const SLOTS: u16 = 1 << 12;
/// Ordinals from here on do not fit into a word.
pub(super) const WORD_ORDINALS: u32 = 1 << 20;

/// One extent that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) ordinal: u32,
    pub(super) layers: Range<u32>,
}

/// What is sent in-band.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Message {
    /// Words with this slot mean that epoch, from now on.
    Bind { slot: u16, epoch: Epoch },
    /// These extents were written before this message.
    Written { epoch: Epoch, extents: Vec<Written> },
    /// Nothing of that epoch is written behind this message.
    Fence { epoch: Epoch },
    /// From the receiver: so many more receives are posted.
    Credit { count: u16 },
}

/// Why bytes are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoMessage {
    #[error("{bytes} bytes are no message")]
    Length { bytes: usize },
    #[error("{field} is {value}")]
    Field { field: &'static str, value: u64 },
}

impl Message {
    /// # Panics
    /// With more than [`EXTENTS_MAX`] extents.
    pub(super) fn encode(&self) -> Vec<u8> {
        let (kind, count, epoch) = match self {
            Self::Bind { slot, epoch } => (1, *slot, *epoch),
            Self::Written { epoch, extents } => {
                assert!(extents.len() <= EXTENTS_MAX, "{} extents in a message", extents.len());
                (2, extents.len() as u16, *epoch)
            }
            Self::Fence { epoch } => (3, 0, *epoch),
            Self::Credit { count } => (4, *count, Epoch(0)),
        };
        let mut bytes = vec![VERSION, kind];
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&epoch.0.to_le_bytes());
        if let Self::Written { extents, .. } = self {
            for Written { ordinal, layers } in extents {
                for value in [*ordinal, layers.start, layers.end] {
                    bytes.extend_from_slice(&value.to_le_bytes());
                }
            }
        }
        bytes
    }

    /// # Errors
    /// Whatever is no message of this version. Layers and ordinals are not judged here.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, NoMessage> {
        let length = Err(NoMessage::Length { bytes: bytes.len() });
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return length;
        };
        let [version, kind, low, high, z0, z1, z2, z3, epoch @ ..] = *header;
        let count = u16::from_le_bytes([low, high]);
        let epoch = Epoch(u64::from_le_bytes(epoch));
        let field = |field, value: u64| Err(NoMessage::Field { field, value });
        if version != VERSION {
            return field("version", version.into());
        }
        if [z0, z1, z2, z3] != [0; 4] {
            return field("reserved", u32::from_le_bytes([z0, z1, z2, z3]).into());
        }
        let extents = if kind == 2 { usize::from(count) } else { 0 };
        if rest.len() != extents * DESCRIPTOR_BYTES {
            return length;
        }
        match kind {
            1 if count >= SLOTS => field("slot", count.into()),
            1 => Ok(Self::Bind { slot: count, epoch }),
            2 => {
                let word = |bytes: &[u8], at: usize| {
                    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
                };
                let extents = rest.chunks_exact(DESCRIPTOR_BYTES).map(|bytes| Written {
                    ordinal: word(bytes, 0),
                    layers: word(bytes, 4)..word(bytes, 8),
                });
                let extents = extents.collect();
                Ok(Self::Written { epoch, extents })
            }
            3 => Ok(Self::Fence { epoch }),
            4 => Ok(Self::Credit { count }),
            kind => field("kind", kind.into()),
        }
    }
}

/// The word of a whole block; none where its ordinal is too large.
pub(super) fn word(slot: u16, ordinal: u32) -> Option<u32> {
    (ordinal < WORD_ORDINALS).then_some(u32::from(slot) << 20 | ordinal)
}

/// The slot and the ordinal of a word.
pub(super) fn unword(word: u32) -> (u16, u32) {
    ((word >> 20) as u16, word & (WORD_ORDINALS - 1))
}

/// The sender's book of slots. A slot is bound again after 4096 others: no word of its former epoch can come behind the
/// message that binds it anew, because both travel on one connection, in order.
#[derive(Debug, Default)]
pub(super) struct Slots {
    next: u16,
    bound: HashMap<Epoch, u16>,
    epochs: HashMap<u16, Epoch>,
}

impl Slots {
    /// The slot of an epoch, and whether the peer must be told of it first.
    pub(super) fn of(&mut self, epoch: Epoch) -> (u16, bool) {
        if let Some(slot) = self.bound.get(&epoch) {
            return (*slot, false);
        }
        let slot = self.next;
        self.next = (slot + 1) % SLOTS;
        if let Some(former) = self.epochs.insert(slot, epoch) {
            self.bound.remove(&former);
        }
        self.bound.insert(epoch, slot);
        (slot, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn messages() -> impl Strategy<Value = Message> {
        let written = (any::<u32>(), any::<u32>(), any::<u32>()).prop_map(|(ordinal, start, end)| Written {
            ordinal,
            layers: start..end,
        });
        prop_oneof![
            (0..SLOTS, any::<u64>()).prop_map(|(slot, epoch)| Message::Bind {
                slot,
                epoch: Epoch(epoch)
            }),
            (any::<u64>(), prop::collection::vec(written, 0..=EXTENTS_MAX)).prop_map(|(epoch, extents)| {
                Message::Written {
                    epoch: Epoch(epoch),
                    extents,
                }
            }),
            any::<u64>().prop_map(|epoch| Message::Fence { epoch: Epoch(epoch) }),
            any::<u16>().prop_map(|count| Message::Credit { count }),
        ]
    }

    proptest! {
        #[test]
        fn messages_survive_the_wire(message in messages()) {
            let bytes = message.encode();
            prop_assert!(bytes.len() <= MESSAGE_BYTES);
            prop_assert_eq!(Message::decode(&bytes), Ok(message));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(message) = Message::decode(&bytes) {
                prop_assert_eq!(message.encode(), bytes);
            }
        }

        #[test]
        fn words_survive_the_wire(slot in 0..SLOTS, ordinal in any::<u32>()) {
            match word(slot, ordinal) {
                Some(word) => prop_assert_eq!(unword(word), (slot, ordinal)),
                None => prop_assert!(ordinal >= WORD_ORDINALS),
            }
        }
    }

    #[test]
    fn a_slot_means_one_epoch_at_a_time() {
        let mut slots = Slots::default();
        for epoch in 0..u64::from(SLOTS) {
            assert_eq!(slots.of(Epoch(epoch)), (epoch as u16, true));
        }
        assert_eq!(slots.of(Epoch(7)), (7, false));
        assert_eq!(slots.of(Epoch(9000)), (0, true));
        assert_eq!(slots.of(Epoch(0)), (1, true));
        assert_eq!(slots.of(Epoch(9000)), (0, false));
    }
}
