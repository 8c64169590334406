//! The only unsafe code of the transports: bytes of the arena as sources and destinations, and vectored socket calls on them.
//!
//! What makes it sound is in the types. A [`Source`] holds the claim that keeps its bytes from changing, a [`Destination`]
//! (or several, [`Destinations`]) holds the claim that makes this transport the only writer of its bytes (and nobody reads
//! them before the claim landed); the arena stays mapped while they live. The kernel is given raw addresses, never references; the one reference that is made, for a
//! checksum, covers bytes that nobody writes while it lives.

#![allow(unsafe_code)]

use super::{Claim, Claims, Extent, ExtentHeader, PathError, Reject, SourceClaim};
use baton_types::{ArenaView, BlockId, Epoch};
use crc_fast::{CrcAlgorithm, Digest};
use std::io;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// The checksum of RFC 3720 (iSCSI), called CRC32C.
pub(super) const CRC32C: CrcAlgorithm = CrcAlgorithm::Crc32Iscsi;

/// Most parts of one vectored call (`IOV_MAX` of Linux).
pub(super) const PARTS_MAX: usize = 1024;

/// An extent's bytes in this node's arena: they do not change while this lives. Lives in [`Sources`] only.
pub(super) struct Source {
    start: NonNull<u8>,
    header: ExtentHeader,
    destination: BlockId,
    _claim: SourceClaim,
}

// SAFETY: an address that stays valid while its `Sources` live, and that is only read; the other fields are Send.
unsafe impl Send for Source {}
// SAFETY: as above: all access through a shared `Source` is reading.
unsafe impl Sync for Source {}

/// Extents of one epoch. Keeps their arena mapped, and gives none of them away.
pub(super) struct Sources {
    all: Vec<Source>,
    _arena: ArenaView,
}

impl Deref for Sources {
    type Target = [Source];

    fn deref(&self) -> &[Source] {
        &self.all
    }
}

impl Sources {
    /// Takes over the extents' claims.
    ///
    /// # Errors
    /// As [`extent_bytes`].
    pub(super) fn new(arena: &ArenaView, epoch: Epoch, extents: Vec<Extent>) -> Result<Self, PathError> {
        let source = |extent: Extent| {
            let (start, len) = find(arena, &extent)?;
            let header = ExtentHeader {
                epoch,
                ordinal: extent.ordinal,
                layers: extent.layers,
                len,
            };
            Ok(Source {
                start,
                header,
                destination: extent.destination,
                _claim: extent.claim,
            })
        };
        Ok(Self {
            all: extents.into_iter().map(source).collect::<Result<_, PathError>>()?,
            _arena: arena.clone(),
        })
    }
}

/// How many bytes an extent has.
///
/// # Errors
/// Layers that the geometry does not have, or none; a block that the arena does not have.
pub(super) fn extent_bytes(arena: &ArenaView, extent: &Extent) -> Result<usize, PathError> {
    find(arena, extent).map(|(_, len)| len as usize)
}

/// Where an extent is, and how many bytes it has.
fn find(arena: &ArenaView, extent: &Extent) -> Result<(NonNull<u8>, u32), PathError> {
    let (geometry, layers) = (arena.geometry(), &extent.layers);
    let no_such = || PathError::NoSuchLayers {
        ordinal: extent.ordinal,
        layers: layers.clone(),
        of: geometry.layers,
    };
    if layers.is_empty() || layers.end > geometry.layers {
        return Err(no_such());
    }
    let layer_bytes = geometry.layer_bytes();
    let (offset, bytes) = (layers.start as usize * layer_bytes, layers.len() * layer_bytes);
    let start = arena.block_ptr(extent.source, offset, bytes)?;
    Ok((start, u32::try_from(bytes).map_err(|_| no_such())?))
}

impl Source {
    pub(super) fn header(&self) -> &ExtentHeader {
        &self.header
    }

    pub(super) fn len(&self) -> usize {
        self.header.len as usize
    }

    /// Where it lies in this process, and which block of the receiver it goes to: what one-sided hardware is told.
    #[cfg_attr(not(feature = "rdma"), allow(dead_code))]
    pub(super) fn places(&self) -> (u64, BlockId) {
        (self.start.as_ptr() as u64, self.destination)
    }

    /// CRC32C of all of it.
    pub(super) fn crc(&self) -> u32 {
        let mut digest = Digest::new(CRC32C);
        self.digest(&mut digest, 0, self.len());
        // The algorithm's values have 32 bits.
        digest.finalize() as u32
    }

    /// Feeds `len` bytes from `from` on to a checksum.
    ///
    /// # Panics
    /// Outside the extent.
    pub(super) fn digest(&self, digest: &mut Digest, from: usize, len: usize) {
        assert!(
            from <= self.len() && len <= self.len() - from,
            "digest outside its extent"
        );
        // SAFETY: the range was checked; the bytes are valid while the arena is mapped, initialised, and the claim keeps
        // everyone from writing them while `self` is borrowed.
        let bytes = unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(from), len) };
        digest.update(bytes);
    }
}

/// Where an extent goes: no one else reads or writes these bytes while this lives.
pub(super) struct Destination {
    start: NonNull<u8>,
    len: usize,
    claim: Box<dyn Claim>,
    _arena: ArenaView,
}

// SAFETY: an address that stays valid while `_arena` lives and that only this value may use; the claim is Send.
unsafe impl Send for Destination {}

impl Destination {
    /// Takes over the claim.
    ///
    /// # Errors
    /// A claim that is not of the header's length or lies outside the arena: the payload is to be discarded.
    pub(super) fn new(arena: &ArenaView, header: &ExtentHeader, claim: Box<dyn Claim>) -> Result<Self, Reject> {
        if claim.len() != header.len as usize {
            return Err(Reject::OutsideGrant);
        }
        let start = arena
            .block_ptr(claim.block(), claim.offset(), claim.len())
            .map_err(|_| Reject::OutsideGrant)?;
        Ok(Self {
            start,
            len: claim.len(),
            claim,
            _arena: arena.clone(),
        })
    }

    /// Copies `len` bytes from `from` on, which have the same place in both.
    ///
    /// # Panics
    /// Outside either of them.
    pub(super) fn copy_from(&mut self, source: &Source, from: usize, len: usize) {
        let shorter = self.len.min(source.len());
        assert!(from <= shorter && len <= shorter - from, "copy outside its extent");
        // SAFETY: both ranges were checked. `copy` allows overlap, which a node that hands over to itself could ask for.
        // The source does not change and the destination is ours alone (see the types).
        unsafe { std::ptr::copy(source.start.as_ptr().add(from), self.start.as_ptr().add(from), len) };
    }

    /// All of it is there and right: gives the claim back with that news.
    ///
    /// # Errors
    /// Where the epoch died meanwhile.
    pub(super) fn land(self) -> Result<(), Reject> {
        self.claim.land()
    }
}

/// Where the extents of one frame go. None of those that were rejected, or whose claim lies outside the arena.
pub(super) struct Destinations {
    places: Vec<Option<NonNull<u8>>>,
    lens: Vec<usize>,
    claims: Box<dyn Claims>,
    _arena: ArenaView,
}

// SAFETY: addresses that stay valid while `_arena` lives and that only this value may use; the claims are Send.
unsafe impl Send for Destinations {}

impl Destinations {
    /// Takes over the claims of the extents with these headers, and tells of each that was rejected.
    pub(super) fn new(
        arena: &ArenaView,
        headers: &[ExtentHeader],
        claims: Box<dyn Claims>,
        mut rejected: impl FnMut(Reject),
    ) -> Self {
        let mut place = |(index, header): (usize, &ExtentHeader)| {
            let place = claims.place(index);
            let found = place.and_then(|place| {
                let found = arena.block_ptr(place.block, place.offset, header.len as usize);
                found.map_err(|_| Reject::OutsideGrant)
            });
            found.inspect_err(|reject| rejected(*reject)).ok()
        };
        Self {
            places: headers.iter().enumerate().map(&mut place).collect(),
            lens: headers.iter().map(|header| header.len as usize).collect(),
            claims,
            _arena: arena.clone(),
        }
    }

    /// Whether that extent is to be received.
    pub(super) fn is_wanted(&self, index: usize) -> bool {
        self.places[index].is_some()
    }

    /// Feeds `len` bytes of a wanted extent from `from` on to a checksum.
    ///
    /// # Panics
    /// Outside the extent.
    pub(super) fn digest(&self, index: usize, digest: &mut Digest, from: usize, len: usize) {
        let whole = self.lens[index];
        assert!(from <= whole && len <= whole - from, "digest outside its extent");
        let Some(start) = self.places[index] else { return };
        // SAFETY: the range was checked; the bytes are initialised (the arena is), and nobody writes them while `self`, the
        // only one who may, is borrowed.
        let bytes = unsafe { std::slice::from_raw_parts(start.as_ptr().add(from), len) };
        digest.update(bytes);
    }

    /// Ends the claims: those that are whole land.
    pub(super) fn land(self, whole: &[bool]) -> Vec<Result<(), Reject>> {
        self.claims.land(whole)
    }
}

/// Parts to send in one call.
pub(super) struct Gather<'a> {
    parts: Vec<libc::iovec>,
    _borrows: PhantomData<&'a Source>,
}

impl<'a> Gather<'a> {
    pub(super) fn with_room_for(parts: usize) -> Self {
        Self {
            parts: Vec::with_capacity(parts),
            _borrows: PhantomData,
        }
    }

    pub(super) fn push_bytes(&mut self, bytes: &'a [u8]) {
        self.push(bytes.as_ptr().cast_mut(), bytes.len());
    }

    /// `len` of the source's bytes from `from` on.
    pub(super) fn push_source(&mut self, source: &'a Source, from: usize, len: usize) {
        assert!(
            from <= source.len() && len <= source.len() - from,
            "part outside its extent"
        );
        // SAFETY: `from` is within the extent, so the address is at most one past its end.
        let start = unsafe { source.start.as_ptr().add(from) };
        self.push(start, len);
    }

    fn push(&mut self, start: *mut u8, len: usize) {
        if len > 0 {
            self.parts.push(libc::iovec {
                iov_base: start.cast(),
                iov_len: len,
            });
        }
    }

    /// Sends what the socket takes now; returns how much that was.
    ///
    /// # Errors
    /// What the system says, `WouldBlock` where the socket takes nothing now.
    pub(super) fn send(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let message = message(&self.parts);
        // SAFETY: the descriptor is open while borrowed; every part points to bytes that live and do not change for `'a`;
        // the kernel only reads them.
        let sent = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &raw const message,
                libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

/// Parts to fill in one call, in order.
#[derive(Default)]
pub(super) struct Scatter<'a> {
    parts: Vec<libc::iovec>,
    _borrows: PhantomData<&'a mut Destinations>,
}

impl<'a> Scatter<'a> {
    /// There is no room for two more parts.
    pub(super) fn is_full(&self) -> bool {
        self.parts.len() + 2 > PARTS_MAX
    }

    pub(super) fn push_bytes(&mut self, bytes: &'a mut [u8]) {
        self.push(bytes.as_mut_ptr(), bytes.len());
    }

    /// `len` bytes from `from` on of the first of these extents and as many bytes of those behind it as there is room for,
    /// up to the first that is not wanted; returns how much room is left, and which extent is the first that has none.
    ///
    /// # Panics
    /// Where `from` is outside the first.
    pub(super) fn push_destinations(
        &mut self,
        to: &'a mut Destinations,
        first: usize,
        mut from: usize,
        mut room: usize,
    ) -> (usize, usize) {
        let mut index = first;
        while let Some(Some(start)) = to.places.get(index)
            && room > 0
            && self.parts.len() < PARTS_MAX
        {
            let len = to.lens[index];
            assert!(from <= len, "part outside its extent");
            let taken = room.min(len - from);
            // SAFETY: `from` is within the extent, so the address is at most one past its end.
            let start = unsafe { start.as_ptr().add(from) };
            self.push(start, taken);
            room -= taken;
            if taken < len - from {
                break;
            }
            index += 1;
            from = 0;
        }
        (room, index)
    }

    fn push(&mut self, start: *mut u8, len: usize) {
        if len > 0 {
            self.parts.push(libc::iovec {
                iov_base: start.cast(),
                iov_len: len,
            });
        }
    }

    /// Receives what the socket has now, into the parts in order; returns how much that was, 0 at the stream's end.
    ///
    /// # Errors
    /// What the system says, `WouldBlock` where the socket has nothing now.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut message = message(&self.parts);
        // SAFETY: the descriptor is open while borrowed; every part points to bytes that live for `'a` and that the pushed
        // `&mut` made ours alone; the kernel writes at most their lengths.
        let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }
}

fn message(parts: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: a `msghdr` is plain integers and pointers, for all of which zero means "none".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_ptr().cast_mut();
    // The field is `usize` with glibc and `i32` with musl; there are at most `PARTS_MAX`.
    message.msg_iovlen = parts.len().min(PARTS_MAX) as _;
    message
}

/// Layers of one block that nobody writes while this lives.
pub(crate) struct Still {
    start: NonNull<u8>,
    layers: usize,
    layer_bytes: usize,
    _claim: Option<SourceClaim>,
    _arena: ArenaView,
}

// SAFETY: an address that stays valid while `_arena` lives, and that is only read; the claim is Send.
unsafe impl Send for Still {}

impl Still {
    /// An extent that is to be sent: its claim keeps it as it is.
    ///
    /// # Errors
    /// Outside the arena or the geometry.
    pub(crate) fn source(arena: &ArenaView, extent: &Extent) -> Result<Self, PathError> {
        let of = arena.geometry().layers;
        if extent.layers.is_empty() || extent.layers.end > of {
            let (ordinal, layers) = (extent.ordinal, extent.layers.clone());
            return Err(PathError::NoSuchLayers { ordinal, layers, of });
        }
        let claim = SourceClaim::clone(&extent.claim);
        Ok(Self::new(arena, extent.source, &extent.layers, Some(claim))?)
    }

    /// A block that arrived whole, under a grant whose book of claims holds it until the comparison is answered.
    ///
    /// # Errors
    /// Outside the arena.
    pub(crate) fn arrived(arena: &ArenaView, block: baton_types::BlockId) -> Result<Self, baton_types::OutOfArena> {
        Self::new(arena, block, &(0..arena.geometry().layers), None)
    }

    fn new(
        arena: &ArenaView,
        block: baton_types::BlockId,
        layers: &std::ops::Range<u32>,
        claim: Option<SourceClaim>,
    ) -> Result<Self, baton_types::OutOfArena> {
        let layer_bytes = arena.geometry().layer_bytes();
        let (first, layers) = (layers.start as usize, layers.len());
        Ok(Self {
            start: arena.block_ptr(block, first * layer_bytes, layers * layer_bytes)?,
            layers,
            layer_bytes,
            _claim: claim,
            _arena: arena.clone(),
        })
    }

    /// CRC-64/NVME of each layer.
    pub(crate) fn layer_crcs(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.layers).map(|layer| {
            // SAFETY: `new` checked that so many layers lie in the arena, which lives; they are initialised; and who made
            // `self` keeps everyone of this process from writing them while it lives.
            let bytes = unsafe {
                std::slice::from_raw_parts(self.start.as_ptr().add(layer * self.layer_bytes), self.layer_bytes)
            };
            crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes)
        })
    }
}

/// A whole block as it stands now.
#[cfg(any(test, fuzzing))]
pub(super) fn peek(arena: &ArenaView, block: baton_types::BlockId) -> Vec<u8> {
    let mut bytes = vec![0; arena.geometry().block_bytes()];
    // SAFETY: tests look only while no transport writes that block.
    unsafe { arena.read(block, 0, &mut bytes) }.expect("tests name blocks of the arena");
    bytes
}

/// Sets a whole block.
#[cfg(any(test, fuzzing))]
pub(super) fn poke(arena: &ArenaView, block: baton_types::BlockId, bytes: &[u8]) {
    // SAFETY: tests write only while no transport uses that block.
    unsafe { arena.write(block, 0, bytes) }.expect("tests name blocks of the arena");
}
