//! The wire format of data connections. All integers are little-endian.
//!
//! A connection begins with one [`Hello`] each way, writer first; then frames flow from the writer, and acknowledgements to it.
//! A frame is a head, which is a fixed prefix with the first descriptor in it, then the other descriptors; then the payloads
//! of all its extents, back to back in the descriptors' order; then, where both ends agreed on checksums, one for each of them.
//! So a receiver learns of many extents at once and receives them by one call, and a writer takes the checksums of payloads as
//! it sends them.
//!
//! ```text
//! prefix      version u8 | kind u8 | count u16 | head crc32c u32 | epoch u64 | descriptor of extent 0 (zeros in a fence)
//! descriptor  ordinal u32 | first layer u32 | layers' end u32 | payload bytes u32
//! trailer     payload crc32c u32 for each extent
//! acknowledgement   frames of extents applied so far u64 | crc32c u32
//! ```
//! The head's checksum covers all of the head with the checksum itself as zeros; it is always on. Everything is checked before
//! anything is allocated or received for it. A frame is applied when all its extents have landed or were rejected; a later
//! acknowledgement covers earlier frames.

use crate::transport::ExtentHeader;
use crate::transport::raw::CRC32C;
use crate::{Identity, WIRE_MAJOR};
use baton_types::{Epoch, Instance, KvDtype, KvGeometry, ModelFingerprint};

/// First bytes of every data connection. Control connections begin with others.
const MAGIC: [u8; 8] = *b"BATON-EX";
/// Version of the frames, within the major version of the handshake.
const FRAME_VERSION: u8 = 2;
const KIND_EXTENTS: u8 = 1;
const KIND_FENCE: u8 = 2;
const HEADER_BYTES: usize = 16;
/// Bytes of one descriptor.
pub(super) const DESCRIPTOR_BYTES: usize = 16;
/// Bytes of the fixed part of a frame's head.
pub(super) const PREFIX_BYTES: usize = HEADER_BYTES + DESCRIPTOR_BYTES;
/// Most extents in one frame.
pub(super) const EXTENTS_MAX: usize = 1024;
/// Bytes of one checksum in a trailer.
pub(super) const CRC_BYTES: usize = 4;
/// Bytes of an acknowledgement.
pub(super) const ACK_BYTES: usize = 12;
/// Magic and major version.
pub(in crate::transport) const VERSION_BYTES: usize = 12;
/// Bytes of a [`Hello`].
pub(in crate::transport) const HELLO_BYTES: usize = 88;

/// What is wrong with bytes that came from a peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::transport) enum WireError {
    #[error("the first bytes are not Baton's")]
    Magic,
    #[error("wire version {theirs} instead of {WIRE_MAJOR}")]
    Major { theirs: u32 },
    #[error("the checksum of the {part} is wrong")]
    Checksum { part: &'static str },
    #[error("{field} is {value}")]
    Field { field: &'static str, value: u64 },
}

/// What a receiver answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::transport) enum Verdict {
    /// Of a writer's own hello.
    Asking,
    Accepted,
    Refused,
    Full,
}

/// What each end says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::transport) struct Hello {
    /// Who speaks.
    pub(in crate::transport) from: Instance,
    /// Who is meant.
    pub(in crate::transport) to: Instance,
    pub(in crate::transport) fingerprint: ModelFingerprint,
    pub(in crate::transport) geometry: KvGeometry,
    /// Wants checksums of payloads; they are used where either end wants them.
    pub(in crate::transport) crc: bool,
    pub(in crate::transport) verdict: Verdict,
}

impl Hello {
    pub(in crate::transport) fn new(ours: &Identity, to: Instance, crc: bool, verdict: Verdict) -> Self {
        Self {
            from: ours.instance,
            to,
            fingerprint: ours.fingerprint,
            geometry: ours.geometry,
            crc,
            verdict,
        }
    }

    pub(in crate::transport) fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        let mut put = Put {
            bytes: &mut bytes,
            at: 0,
        };
        put.slice(&MAGIC);
        put.u32(WIRE_MAJOR);
        put.u32(HELLO_BYTES as u32);
        put.u64(self.from.0);
        put.u64(self.to.0);
        put.slice(&self.fingerprint.0);
        let KvGeometry {
            layers,
            kv_heads,
            head_dim,
            block_tokens,
            dtype,
        } = self.geometry;
        for value in [layers, kv_heads, head_dim, block_tokens] {
            put.u32(value);
        }
        let dtype = match dtype {
            KvDtype::F16 => 0,
            KvDtype::Bf16 => 1,
            KvDtype::F32 => 2,
            KvDtype::Q8 => 3,
        };
        let verdict = match self.verdict {
            Verdict::Asking => 0,
            Verdict::Accepted => 1,
            Verdict::Refused => 2,
            Verdict::Full => 3,
        };
        put.slice(&[dtype, u8::from(self.crc), verdict, 0]);
        let crc = crc32c(&bytes[..HELLO_BYTES - 4]);
        bytes[HELLO_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// # Errors
    /// Whatever is no hello of this major version.
    pub(in crate::transport) fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, WireError> {
        check_version(&bytes[..VERSION_BYTES])?;
        let mut take = Take {
            bytes,
            at: VERSION_BYTES,
        };
        check("hello length", take.u32(), |len| len as usize == HELLO_BYTES)?;
        if crc32c(&bytes[..HELLO_BYTES - 4]).to_le_bytes() != bytes[HELLO_BYTES - 4..] {
            return Err(WireError::Checksum { part: "hello" });
        }
        let from = Instance(take.u64());
        let to = Instance(take.u64());
        let fingerprint = ModelFingerprint(take.array());
        let (layers, kv_heads, head_dim, block_tokens) = (take.u32(), take.u32(), take.u32(), take.u32());
        let [dtype, crc, verdict, _] = take.array::<4>();
        let field = |field, value: u8| WireError::Field {
            field,
            value: value.into(),
        };
        let dtype = match dtype {
            0 => KvDtype::F16,
            1 => KvDtype::Bf16,
            2 => KvDtype::F32,
            3 => KvDtype::Q8,
            other => return Err(field("element type", other)),
        };
        let verdict = match verdict {
            0 => Verdict::Asking,
            1 => Verdict::Accepted,
            2 => Verdict::Refused,
            3 => Verdict::Full,
            other => return Err(field("verdict", other)),
        };
        let geometry = KvGeometry {
            layers,
            kv_heads,
            head_dim,
            block_tokens,
            dtype,
        };
        Ok(Self {
            from,
            to,
            fingerprint,
            geometry,
            crc: crc != 0,
            verdict,
        })
    }
}

/// Checks the first [`VERSION_BYTES`] of a hello, which mean the same in all versions.
///
/// # Errors
/// What is none of Baton's, or of another major version.
pub(in crate::transport) fn check_version(bytes: &[u8]) -> Result<(), WireError> {
    let mut take = Take { bytes, at: 0 };
    if take.array::<8>() != MAGIC {
        return Err(WireError::Magic);
    }
    match take.u32() {
        WIRE_MAJOR => Ok(()),
        theirs => Err(WireError::Major { theirs }),
    }
}

/// A frame's first words, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frame {
    /// So many extents; their descriptors follow.
    Extents { epoch: Epoch, count: usize },
    /// No later byte of that epoch comes on this connection.
    Fence { epoch: Epoch },
}

/// Appends the head of a frame of these extents.
///
/// # Panics
/// With none of them, or more than [`EXTENTS_MAX`].
pub(super) fn encode_extents<'a>(
    epoch: Epoch,
    extents: impl ExactSizeIterator<Item = &'a ExtentHeader>,
    out: &mut Vec<u8>,
) {
    let count = extents.len();
    assert!((1..=EXTENTS_MAX).contains(&count), "{count} extents in a frame");
    let start = out.len();
    out.reserve(HEADER_BYTES + count * DESCRIPTOR_BYTES);
    out.extend_from_slice(&header(KIND_EXTENTS, count as u16, epoch));
    for extent in extents {
        for value in [extent.ordinal, extent.layers.start, extent.layers.end, extent.len] {
            out.extend_from_slice(&value.to_le_bytes());
        }
    }
    seal(&mut out[start..]);
}

/// Appends a fence's frame.
pub(super) fn encode_fence(epoch: Epoch, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&header(KIND_FENCE, 0, epoch));
    out.extend_from_slice(&[0; DESCRIPTOR_BYTES]);
    seal(&mut out[start..]);
}

fn header(kind: u8, count: u16, epoch: Epoch) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    let mut put = Put {
        bytes: &mut bytes,
        at: 0,
    };
    put.slice(&[FRAME_VERSION, kind]);
    put.slice(&count.to_le_bytes());
    put.u32(0);
    put.u64(epoch.0);
    bytes
}

fn seal(head: &mut [u8]) {
    let crc = crc32c(head);
    head[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// Reads a prefix: what the frame is and how long its head. Nothing of it is trusted before [`decode_head`].
///
/// # Errors
/// What is no prefix.
pub(super) fn decode_prefix(prefix: &[u8; PREFIX_BYTES]) -> Result<Frame, WireError> {
    let mut take = Take { bytes: prefix, at: 0 };
    let [version, kind] = take.array();
    let count = u16::from_le_bytes(take.array());
    let _crc = take.u32();
    let epoch = Epoch(take.u64());
    check("frame version", u32::from(version), |version| {
        version == u32::from(FRAME_VERSION)
    })?;
    match kind {
        KIND_EXTENTS => {
            check("extent count", u32::from(count), |count| {
                (1..=EXTENTS_MAX as u32).contains(&count)
            })?;
            Ok(Frame::Extents {
                epoch,
                count: count.into(),
            })
        }
        KIND_FENCE => {
            check("extent count", u32::from(count), |count| count == 0)?;
            Ok(Frame::Fence { epoch })
        }
        other => Err(WireError::Field {
            field: "frame kind",
            value: other.into(),
        }),
    }
}

/// Checks a whole head, `PREFIX_BYTES` and the descriptors behind it, and reads its extents.
///
/// # Errors
/// A wrong checksum; layers or a length that the geometry does not have.
pub(super) fn decode_head(head: &[u8], frame: Frame, geometry: &KvGeometry) -> Result<Vec<ExtentHeader>, WireError> {
    let mut digest = crc_fast::Digest::new(CRC32C);
    digest.update(&head[..4]);
    digest.update(&[0; 4]);
    digest.update(&head[8..]);
    if (digest.finalize() as u32).to_le_bytes() != head[4..8] {
        return Err(WireError::Checksum { part: "frame's head" });
    }
    let (epoch, count) = match frame {
        Frame::Extents { epoch, count } => (epoch, count),
        Frame::Fence { .. } => return Ok(Vec::new()),
    };
    let (descriptors, _) = head[HEADER_BYTES..].as_chunks::<DESCRIPTOR_BYTES>();
    check("descriptors", descriptors.len() as u32, |got| got as usize == count)?;
    descriptors
        .iter()
        .map(|bytes| decode_descriptor(bytes, epoch, geometry))
        .collect()
}

fn decode_descriptor(
    bytes: &[u8; DESCRIPTOR_BYTES],
    epoch: Epoch,
    geometry: &KvGeometry,
) -> Result<ExtentHeader, WireError> {
    let mut take = Take { bytes, at: 0 };
    let (ordinal, first, end, len) = (take.u32(), take.u32(), take.u32(), take.u32());
    check("layers' end", end, |end| end <= geometry.layers)?;
    check("first layer", first, |first| first < end)?;
    let wanted = u64::from(end - first) * geometry.layer_bytes() as u64;
    check("payload bytes", len, |len| u64::from(len) == wanted)?;
    Ok(ExtentHeader {
        epoch,
        ordinal,
        layers: first..end,
        len,
    })
}

/// An acknowledgement of so many frames.
pub(super) fn encode_ack(applied: u64) -> [u8; ACK_BYTES] {
    let mut bytes = [0; ACK_BYTES];
    let (count, crc) = bytes.split_at_mut(8);
    count.copy_from_slice(&applied.to_le_bytes());
    crc.copy_from_slice(&crc32c(count).to_le_bytes());
    bytes
}

/// How many frames were applied.
///
/// # Errors
/// What is no acknowledgement.
pub(super) fn decode_ack(bytes: &[u8; ACK_BYTES]) -> Result<u64, WireError> {
    let mut take = Take { bytes, at: 0 };
    let (applied, crc) = (take.u64(), take.u32());
    match crc == crc32c(&bytes[..8]) {
        true => Ok(applied),
        false => Err(WireError::Checksum {
            part: "acknowledgement",
        }),
    }
}

fn check(field: &'static str, value: u32, right: impl FnOnce(u32) -> bool) -> Result<(), WireError> {
    if right(value) {
        Ok(())
    } else {
        Err(WireError::Field {
            field,
            value: value.into(),
        })
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    // The algorithm's values have 32 bits.
    crc_fast::checksum(CRC32C, bytes) as u32
}

struct Put<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl Put<'_> {
    fn slice(&mut self, from: &[u8]) {
        self.bytes[self.at..self.at + from.len()].copy_from_slice(from);
        self.at += from.len();
    }

    fn u32(&mut self, value: u32) {
        self.slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.slice(&value.to_le_bytes());
    }
}

struct Take<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Take<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes[self.at..self.at + N]);
        self.at += N;
        out
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GEOMETRY: KvGeometry = KvGeometry {
        layers: 30,
        kv_heads: 3,
        head_dim: 64,
        block_tokens: 16,
        dtype: KvDtype::F16,
    };

    fn extents() -> impl Strategy<Value = Vec<ExtentHeader>> {
        let one = (any::<u32>(), 0..30u32, any::<u32>()).prop_map(|(ordinal, first, span)| {
            let layers = first..first + 1 + span % (30 - first);
            let len = (layers.len() * GEOMETRY.layer_bytes()) as u32;
            ExtentHeader {
                epoch: Epoch(0),
                ordinal,
                layers,
                len,
            }
        });
        proptest::collection::vec(one, 1..40)
    }

    fn prefix(head: &[u8]) -> [u8; PREFIX_BYTES] {
        head[..PREFIX_BYTES].try_into().unwrap()
    }

    /// Reads a head as the receiver does.
    fn read(head: &[u8]) -> Result<(Frame, Vec<ExtentHeader>), WireError> {
        let frame = decode_prefix(&prefix(head))?;
        let len = match frame {
            Frame::Extents { count, .. } => PREFIX_BYTES + (count - 1) * DESCRIPTOR_BYTES,
            Frame::Fence { .. } => PREFIX_BYTES,
        };
        check("head", head.len() as u32, |have| have as usize >= len)?;
        Ok((frame, decode_head(&head[..len], frame, &GEOMETRY)?))
    }

    proptest! {
        #[test]
        fn a_head_survives_the_wire(epoch: u64, mut extents in extents()) {
            for header in &mut extents {
                header.epoch = Epoch(epoch);
            }
            let mut head = Vec::new();
            encode_extents(Epoch(epoch), extents.iter(), &mut head);
            let (frame, read) = read(&head).unwrap();
            prop_assert_eq!(frame, Frame::Extents { epoch: Epoch(epoch), count: extents.len() });
            prop_assert_eq!(read, extents);
        }

        #[test]
        fn an_acknowledgement_survives_the_wire(applied: u64, bit in 0..8 * ACK_BYTES) {
            let mut bytes = encode_ack(applied);
            prop_assert_eq!(decode_ack(&bytes), Ok(applied));
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode_ack(&bytes).is_err());
        }

        #[test]
        fn a_changed_bit_is_seen(epoch: u64, extents in extents(), bit: prop::sample::Index, fence: bool) {
            let mut head = Vec::new();
            if fence {
                encode_fence(Epoch(epoch), &mut head);
            } else {
                encode_extents(Epoch(epoch), extents.iter(), &mut head);
            }
            let bit = bit.index(8 * head.len());
            head[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(read(&head).is_err(), "bit {bit}");
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), PREFIX_BYTES..4096)) {
            let _ = read(&bytes);
            if let Some(hello) = bytes.first_chunk::<HELLO_BYTES>() {
                prop_assert!(Hello::decode(hello).is_err());
            }
        }

        #[test]
        fn a_hello_survives_the_wire(from: u64, to: u64, fingerprint: [u8; 32], shape: [u32; 4], crc: bool) {
            let [layers, kv_heads, head_dim, block_tokens] = shape;
            let geometry = KvGeometry { layers, kv_heads, head_dim, block_tokens, dtype: KvDtype::Bf16 };
            let hello = Hello {
                from: Instance(from),
                to: Instance(to),
                fingerprint: ModelFingerprint(fingerprint),
                geometry,
                crc,
                verdict: Verdict::Accepted,
            };
            prop_assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        }
    }

    #[test]
    fn another_major_version_is_named_whatever_follows() {
        let mut bytes = [0xee; HELLO_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&7u32.to_le_bytes());
        assert_eq!(Hello::decode(&bytes), Err(WireError::Major { theirs: 7 }));
    }

    #[test]
    fn sizes_are_checked_against_the_geometry() {
        let announce = |layers: std::ops::Range<u32>, len: u32| {
            let header = ExtentHeader {
                epoch: Epoch(1),
                ordinal: 0,
                layers,
                len,
            };
            let mut head = Vec::new();
            encode_extents(Epoch(1), [&header].into_iter(), &mut head);
            read(&head).map(|_| ())
        };
        let layer = GEOMETRY.layer_bytes() as u32;
        let field = |field, value| Err(WireError::Field { field, value });
        assert_eq!(announce(0..1, layer), Ok(()));
        assert_eq!(announce(0..1, layer + 1), field("payload bytes", u64::from(layer) + 1));
        assert_eq!(announce(0..0, 0), field("first layer", 0));
        assert_eq!(announce(29..31, 2 * layer), field("layers' end", 31));
        assert_eq!(announce(0..1, u32::MAX), field("payload bytes", u64::from(u32::MAX)));
    }
}
