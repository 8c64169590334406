//! Memory that two processes share, as safe types: the receiver's arena as its writer sees it, and the words of the ring.
//!
//! Only sealed memory is mapped, so that no access can become a SIGBUS however the peer ends. References are made to atomic
//! words only; blocks are reached through raw pointers whose ranges were checked, and which borrow everything that keeps them
//! valid. No mapping is inherited by a forked child: when the process is dead, nothing of it can write any more.

#![allow(unsafe_code)]

use super::copy::{ask, copy};
use crate::transport::Extent;
use baton_types::{ArenaView, BlockId, KvGeometry, OutOfArena};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// One shared mapping; unmapped on drop.
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is an address range; moving it to, or dropping it on, another thread is sound.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared `Mapping` itself offers no access.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by us and is unmapped here only; whatever points into it borrows the mapping.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast::<c_void>(), self.len) };
    }
}

impl Mapping {
    /// Maps the first `len` bytes, which the memory must have for ever.
    fn new(memory: impl AsFd, len: usize) -> Result<Self, Errno> {
        let sealed = rustix::fs::fcntl_get_seals(&memory)?.contains(SealFlags::SHRINK);
        let size = rustix::fs::fstat(&memory)?.st_size;
        if !sealed || len == 0 || u64::try_from(size).map_err(|_| Errno::INVAL)? < len as u64 {
            return Err(Errno::INVAL);
        }
        // SAFETY: a fresh range chosen by the system: nothing that exists is touched.
        let base = unsafe {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, memory, 0)?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or(Errno::NOMEM)?;
        let mapping = Self { base, len };
        for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump] {
            // SAFETY: the range is our own mapping; the advice changes no content.
            unsafe { rustix::mm::madvise(base.as_ptr().cast(), len, advice)? };
        }
        Ok(mapping)
    }
}

/// A receiver's arena in its writer's address space.
pub(super) struct PeerArena {
    mapping: Mapping,
    blocks: usize,
    geometry: KvGeometry,
}

impl PeerArena {
    /// Maps so many blocks of the receiver's memory.
    ///
    /// # Errors
    /// Memory that can shrink or is too small, and whatever the system refuses.
    pub(super) fn map(memory: &OwnedFd, blocks: u64, geometry: KvGeometry) -> Result<Self, Errno> {
        let blocks = usize::try_from(blocks).map_err(|_| Errno::OVERFLOW)?;
        let len = blocks.checked_mul(geometry.block_bytes()).ok_or(Errno::OVERFLOW)?;
        let mapping = Mapping::new(memory, len)?;
        // Fewer pages to translate where the system allows huge ones for shared memory; else nothing changes.
        // SAFETY: the range is our own mapping; the advice changes no content.
        let _ = unsafe { rustix::mm::madvise(mapping.base.as_ptr().cast(), len, Advice::LinuxHugepage) };
        Ok(Self {
            mapping,
            blocks,
            geometry,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        self.mapping.len
    }

    /// Makes pages present in this process, so that no copy waits for a fault. They have memory already: the receiver made it
    /// present. Beyond the end there is nothing to do.
    pub(super) fn populate(&self, from: usize, len: usize) {
        let from = from.min(self.mapping.len) & !(rustix::param::page_size() - 1);
        let len = len.min(self.mapping.len - from);
        // SAFETY: inside the mapping, from a page's border on; populating changes no content. An older kernel refuses, which
        // costs time later and nothing else.
        let _ = unsafe {
            let at = self.mapping.base.as_ptr().add(from).cast::<c_void>();
            rustix::mm::madvise(at, len, Advice::LinuxPopulateWrite)
        };
    }

    /// Checks that a block is one of the receiver's.
    ///
    /// # Errors
    /// Where it is none.
    pub(super) fn check(&self, block: BlockId) -> Result<(), OutOfArena> {
        if block.index() < self.blocks {
            return Ok(());
        }
        Err(OutOfArena {
            block,
            offset: 0,
            end: self.geometry.block_bytes(),
            blocks: self.blocks,
            block_bytes: self.geometry.block_bytes(),
        })
    }

    /// The way of one extent, from our arena into the peer's.
    ///
    /// # Errors
    /// Blocks or layers that either does not have.
    pub(super) fn run<'a>(&'a self, arena: &'a ArenaView, extent: &'a Extent) -> Result<Run<'a>, OutOfArena> {
        let layer_bytes = self.geometry.layer_bytes();
        let offset = extent.layers.start as usize * layer_bytes;
        let len = extent.layers.len() * layer_bytes;
        // Our geometry is the peer's, so what lies within a block here does so there.
        let from = arena.block_ptr(extent.source, offset, len)?;
        self.check(extent.destination)?;
        // SAFETY: the block is one of the mapping's and the range lies within it, so the sum stays inside the mapping.
        let to = unsafe {
            let block = extent.destination.index() * self.geometry.block_bytes();
            self.mapping.base.add(block + offset)
        };
        Ok(Run {
            from,
            to,
            len,
            _borrows: PhantomData,
        })
    }
}

/// Bytes to copy in one go, of one extent or of neighbours. It borrows both mappings, and the extents with their claims.
pub(super) struct Run<'a> {
    from: NonNull<u8>,
    to: NonNull<u8>,
    len: usize,
    _borrows: PhantomData<&'a Extent>,
}

impl Run<'_> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Takes another in that begins where this one ends, in both arenas. False where it does not.
    pub(super) fn join(&mut self, next: &Self) -> bool {
        // Addresses only: both ends are compared as numbers, and lie at most one past what was checked.
        let ends = |start: NonNull<u8>, next: NonNull<u8>| start.as_ptr().wrapping_add(self.len) == next.as_ptr();
        let joined = ends(self.from, next.from) && ends(self.to, next.to);
        if joined {
            self.len += next.len;
        }
        joined
    }

    /// It is the next to be copied.
    pub(super) fn ask(&self) {
        ask(self.from.as_ptr(), self.to.as_ptr(), self.len);
    }

    /// Copies `len` bytes from `start` on; [`super::copy::settle`] is to follow.
    ///
    /// # Panics
    /// Outside the run.
    pub(super) fn copy(&self, start: usize, len: usize) {
        assert!(start <= self.len && len <= self.len - start, "copy outside its run");
        // SAFETY: the range was checked, and each part of the run was when it was made: both sides are mapped while they are
        // borrowed. The claims of the borrowed extents keep the source from changing. The destination was granted to this
        // writer alone; it is another mapping, so the ranges do not overlap as addresses.
        unsafe { copy(self.from.as_ptr().add(start), self.to.as_ptr().add(start), len) };
    }
}

/// Words that both processes read and write.
pub(super) struct SharedWords {
    mapping: Mapping,
    words: usize,
}

impl SharedWords {
    /// New sealed memory of so many words, all zero, and the descriptor that makes others see it.
    ///
    /// # Errors
    /// Whatever the system refuses.
    pub(super) fn create(words: usize) -> Result<(Self, OwnedFd), Errno> {
        let memory = rustix::fs::memfd_create("baton-ring", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&memory, (words * size_of::<AtomicU64>()) as u64)?;
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((Self::map(&memory, words)?, memory))
    }

    /// Maps what another process created.
    ///
    /// # Errors
    /// Memory that can shrink or is too small, and whatever the system refuses.
    pub(super) fn map(memory: &OwnedFd, words: usize) -> Result<Self, Errno> {
        let mapping = Mapping::new(memory, words * size_of::<AtomicU64>())?;
        Ok(Self { mapping, words })
    }

    pub(super) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has room for so many words, begins at a page and lives as long as `self`. Any bytes are a valid
        // word. Every access of this process is atomic, so whatever the peer stores meanwhile is no race of ours.
        unsafe { std::slice::from_raw_parts(self.mapping.base.as_ptr().cast::<AtomicU64>(), self.words) }
    }
}

/// A descriptor whose being readable can be awaited.
///
/// # Errors
/// One that cannot be waited on.
pub(super) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, and the same, for as long as it lives; it lives as long as the `AsyncFd`.
    let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    registered.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Arena;
    use baton_types::KvDtype;
    use std::sync::Arc;

    const GEOMETRY: KvGeometry = KvGeometry {
        layers: 2,
        kv_heads: 1,
        head_dim: 5,
        block_tokens: 16,
        dtype: KvDtype::F16,
    };

    fn extent(source: u32, destination: u32, layers: std::ops::Range<u32>) -> Extent {
        Extent {
            ordinal: 0,
            layers,
            source: BlockId(source),
            destination: BlockId(destination),
            claim: Arc::new(()),
        }
    }

    #[test]
    fn neighbours_in_both_arenas_join_and_others_do_not() {
        let arena = Arena::allocate(GEOMETRY, 8, &mut |_, _| ()).unwrap();
        let memory = arena.memory().try_clone_to_owned().unwrap();
        let (view, peer) = (arena.view(), PeerArena::map(&memory, 8, GEOMETRY).unwrap());
        let joins = |first: &Extent, second: &Extent| {
            let mut run = peer.run(&view, first).unwrap();
            let joined = run.join(&peer.run(&view, second).unwrap());
            (joined, run.len())
        };
        let block = GEOMETRY.block_bytes();
        assert_eq!(joins(&extent(0, 4, 0..2), &extent(1, 5, 0..2)), (true, 2 * block));
        assert_eq!(joins(&extent(0, 4, 0..1), &extent(0, 4, 1..2)), (true, block));
        assert_eq!(joins(&extent(0, 4, 1..2), &extent(1, 5, 0..2)), (true, 3 * block / 2));
        assert_eq!(joins(&extent(0, 4, 0..2), &extent(2, 5, 0..2)), (false, block));
        assert_eq!(joins(&extent(0, 4, 0..2), &extent(1, 6, 0..2)), (false, block));
        assert_eq!(joins(&extent(1, 5, 0..2), &extent(0, 4, 0..2)), (false, block));
        assert!(peer.run(&view, &extent(0, 8, 0..2)).is_err());
        assert!(peer.run(&view, &extent(8, 0, 0..2)).is_err());
        assert!(peer.run(&view, &extent(0, 0, 0..3)).is_err());
    }

    #[test]
    fn what_is_copied_appears_in_the_other_mapping() {
        let arena = Arena::allocate(GEOMETRY, 4, &mut |_, _| ()).unwrap();
        let memory = arena.memory().try_clone_to_owned().unwrap();
        let (view, peer) = (arena.view(), PeerArena::map(&memory, 4, GEOMETRY).unwrap());
        peer.populate(0, 1 << 30);
        let data: Vec<u8> = (0..GEOMETRY.block_bytes()).map(|i| i as u8 | 1).collect();
        let mut back = vec![0; data.len()];
        // SAFETY: this test is the only user of the arena.
        unsafe { view.write(BlockId(0), 0, &data).unwrap() };
        let extent = extent(0, 3, 0..2);
        let run = peer.run(&view, &extent).unwrap();
        run.copy(0, 100);
        run.copy(100, run.len() - 100);
        // SAFETY: as above.
        unsafe { view.read(BlockId(3), 0, &mut back).unwrap() };
        assert_eq!(back, data);
    }

    #[test]
    fn memory_that_can_shrink_or_is_too_small_is_not_mapped() {
        let memory = rustix::fs::memfd_create("loose", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&memory, 1 << 16).unwrap();
        assert!(SharedWords::map(&memory, 8).is_err());
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK).unwrap();
        assert!(SharedWords::map(&memory, 8).is_ok());
        assert!(SharedWords::map(&memory, 1 << 14).is_err());
        assert!(PeerArena::map(&memory, u64::MAX, GEOMETRY).is_err());
    }
}
