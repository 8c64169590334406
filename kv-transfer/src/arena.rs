//! The memory that KV blocks live in: one sealed memfd, mapped once, resident before the node says that it is ready.
//!
//! It is a memfd, not anonymous memory, so that a process of the same host can map it later. The descriptor is sealed against
//! any change of size: nobody can turn an access into a SIGBUS. Invariants: the base is aligned to 2 MiB, every page is
//! present once [`Arena::allocate`] returned, and the mapping lives as long as the last [`ArenaView`] of it. Who may use
//! which block is decided by the block pool that owns the ids, not here.

#![allow(unsafe_code)]

use baton_types::{ArenaView, KvGeometry};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// Alignment of the base: that of a huge page.
const ALIGN: usize = 2 << 20;
/// Bytes made present between two calls of the progress callback.
const PREFAULT_STEP: usize = 64 << 20;

/// Why there is no arena.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArenaError {
    /// No blocks, or blocks of no bytes.
    #[error("an arena of {blocks} blocks of {block_bytes} bytes holds nothing")]
    Empty {
        /// How many were asked for.
        blocks: usize,
        /// How large each is.
        block_bytes: usize,
    },
    /// The sizes overflow, or ids of 32 bits cannot name all blocks.
    #[error("an arena of {blocks} blocks of {block_bytes} bytes is larger than can be addressed")]
    TooLarge {
        /// How many were asked for.
        blocks: usize,
        /// How large each is.
        block_bytes: usize,
    },
    /// The system gives no such mapping.
    #[error("the system refuses an arena of {bytes} bytes ({step}): {errno}; give a smaller --kv-bytes")]
    Map {
        /// How large it was to be.
        bytes: usize,
        /// What was tried.
        step: &'static str,
        /// What the system said.
        errno: Errno,
    },
    /// The mapping exists but memory for it does not.
    #[error("the system gives only {present} of the arena's {bytes} bytes: {errno}; give a smaller --kv-bytes")]
    Prefault {
        /// How large it was to be.
        bytes: usize,
        /// How much was present before.
        present: usize,
        /// What the system said.
        errno: Errno,
    },
}

impl ArenaError {
    /// The same call can succeed later: never without another size or a machine with more memory left.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Empty { .. } | Self::TooLarge { .. } | Self::Map { .. } | Self::Prefault { .. } => false,
        }
    }
}

/// One mapping of address space; unmapped on drop.
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is an address range; moving it to, or dropping it on, another thread is sound. No access goes through it.
unsafe impl Send for Mapping {}
// SAFETY: as above: a shared `Mapping` offers its address and length only.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by us, and is unmapped here only. Views keep the arena, hence this, alive. A failure
        // can only mean that the range was split wrongly; leaking it is the safe answer, and drop never panics.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast::<c_void>(), self.len) };
    }
}

/// The blocks' memory.
pub struct Arena {
    mapping: Mapping,
    /// Keeps the memory's name for processes that are to map it too.
    memory: OwnedFd,
    blocks: usize,
    geometry: KvGeometry,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena")
            .field("bytes", &self.mapping.len)
            .field("blocks", &self.blocks)
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

impl Arena {
    /// Maps `blocks` blocks and makes every page present (zeroed), calling `prefault` with the bytes done and the total after
    /// each step. Whether so much fits beside everything else on the machine is the caller's check: past a cgroup's limit the
    /// system kills instead of refusing.
    ///
    /// # Errors
    /// Sizes that cannot be, and whatever the system refuses.
    pub fn allocate(
        geometry: KvGeometry,
        blocks: u32,
        prefault: &mut dyn FnMut(usize, usize),
    ) -> Result<Arc<Self>, ArenaError> {
        let (blocks, block_bytes) = (blocks as usize, geometry.block_bytes());
        if blocks == 0 || block_bytes == 0 {
            return Err(ArenaError::Empty { blocks, block_bytes });
        }
        let page = rustix::param::page_size();
        let len = blocks
            .checked_mul(block_bytes)
            .and_then(|bytes| bytes.checked_next_multiple_of(page))
            .filter(|bytes| {
                bytes
                    .checked_add(ALIGN)
                    .is_some_and(|with_slack| isize::try_from(with_slack).is_ok())
            })
            .ok_or(ArenaError::TooLarge { blocks, block_bytes })?;
        let memory = sealed_memory(len)?;
        let mapping = map_aligned(&memory, len)?;
        // Fewer pages to translate where the system allows huge ones for shared memory; else nothing changes.
        // SAFETY: the range is our own mapping; the advice changes no content.
        let _ = unsafe { rustix::mm::madvise(mapping.base.as_ptr().cast(), len, Advice::LinuxHugepage) };
        make_present(&mapping, prefault)?;
        Ok(Arc::new(Self {
            mapping,
            memory,
            blocks,
            geometry,
        }))
    }

    /// A view that keeps the memory mapped.
    pub fn view(self: &Arc<Self>) -> ArenaView {
        // SAFETY: the mapping has room for `blocks * block_bytes` bytes, is aligned to 2 MiB, zeroed by the system, readable
        // and writable, and unmapped only when the last `Arc` of this arena drops. Nobody makes references into it: all
        // access is through the view's raw pointers.
        unsafe {
            ArenaView::new(
                self.mapping.base,
                self.blocks,
                self.geometry,
                Arc::clone(self) as Arc<dyn std::any::Any + Send + Sync>,
            )
        }
    }

    /// The arena that a view is of; none where its memory is another's.
    pub(crate) fn of(view: &ArenaView) -> Option<&Self> {
        view.owner().downcast_ref()
    }

    /// What other processes of this host map. Block 0 is at its start; its size is sealed.
    pub(crate) fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// How many blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes of memory that it takes, whole pages.
    pub fn bytes(&self) -> usize {
        self.mapping.len
    }
}

fn refused(bytes: usize, step: &'static str) -> impl Fn(Errno) -> ArenaError {
    move |errno| ArenaError::Map { bytes, step, errno }
}

/// Anonymous shared memory of exactly `len` bytes that can neither shrink nor grow.
fn sealed_memory(len: usize) -> Result<OwnedFd, ArenaError> {
    let memory = rustix::fs::memfd_create("baton-arena", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(refused(len, "memfd_create"))?;
    rustix::fs::ftruncate(&memory, len as u64).map_err(refused(len, "ftruncate"))?;
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(refused(len, "F_ADD_SEALS"))?;
    Ok(memory)
}

/// Maps all of `memory` at a multiple of [`ALIGN`].
fn map_aligned(memory: &OwnedFd, len: usize) -> Result<Mapping, ArenaError> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh range chosen by the system: nothing that exists is touched.
    let reserved = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            len + ALIGN,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }
    .map_err(refused(len, "reserve addresses"))?;
    let reserved_start = reserved as usize;
    let slack_before = reserved_start.next_multiple_of(ALIGN) - reserved_start;
    let base = reserved.wrapping_byte_add(slack_before);
    // SAFETY: `base..base + len` lies inside the range reserved above, which nobody else knows; it replaces that part only.
    let mapped = unsafe { rustix::mm::mmap(base, len, protection, MapFlags::SHARED | MapFlags::FIXED, memory, 0) };
    let slack_after = ALIGN - slack_before;
    // SAFETY: both parts belong to the reservation and lie outside the mapping. `base`, `len` and page size are multiples of
    // a page, so the parts are too.
    unsafe {
        if slack_before > 0 {
            let _ = rustix::mm::munmap(reserved, slack_before);
        }
        if slack_after > 0 {
            let _ = rustix::mm::munmap(base.wrapping_byte_add(len), slack_after);
        }
    }
    match (mapped, NonNull::new(base.cast::<u8>())) {
        (Ok(_), Some(base)) => Ok(Mapping { base, len }),
        (mapped, _) => {
            // SAFETY: what is left of the reservation; no mapping of ours stands there.
            let _ = unsafe { rustix::mm::munmap(base, len) };
            Err(refused(len, "mmap")(mapped.err().unwrap_or(Errno::INVAL)))
        }
    }
}

/// Makes every page present, step by step, as huge ones where the system has them.
fn make_present(mapping: &Mapping, progress: &mut dyn FnMut(usize, usize)) -> Result<(), ArenaError> {
    let total = mapping.len;
    let (mut present, mut huge) = (0, true);
    while present < total {
        let step = PREFAULT_STEP.min(total - present);
        huge = huge && collapse(mapping, present, step);
        // SAFETY: the range lies inside the mapping, both ends on page borders; populating changes no content.
        let populated = unsafe {
            let at = mapping.base.as_ptr().add(present).cast::<c_void>();
            rustix::mm::madvise(at, step, Advice::LinuxPopulateWrite)
        };
        match populated {
            Ok(()) => {}
            Err(Errno::INTR | Errno::AGAIN) => continue,
            // A kernel older than 5.14: touch the pages.
            Err(Errno::INVAL) => touch(mapping, present, step, rustix::param::page_size()),
            Err(errno) => {
                return Err(ArenaError::Prefault {
                    bytes: total,
                    present,
                    errno,
                });
            }
        }
        present += step;
        progress(present, total);
    }
    Ok(())
}

/// Asks for huge pages where the system-wide switch for shared memory is off, as it usually is: one page of each is made present,
/// and Linux 6.1 and later make a huge one of it. False where they do not; what is there stays there.
fn collapse(mapping: &Mapping, from: usize, len: usize) -> bool {
    touch(mapping, from, len, ALIGN);
    // SAFETY: the range lies inside the mapping, from a huge page's border on; collapsing changes no content.
    let collapsed = unsafe {
        let at = mapping.base.as_ptr().add(from).cast::<c_void>();
        libc::madvise(at, len, libc::MADV_COLLAPSE)
    };
    collapsed == 0
}

/// Touches one page of every `each` bytes.
fn touch(mapping: &Mapping, from: usize, len: usize, each: usize) {
    for offset in (from..from + len).step_by(each) {
        // SAFETY: inside the mapping; nobody else has its address yet, and the page holds zeros.
        unsafe { mapping.base.as_ptr().add(offset).write_volatile(0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_types::{BlockId, KvDtype};

    const GEOMETRY: KvGeometry = KvGeometry {
        layers: 3,
        kv_heads: 1,
        head_dim: 5,
        block_tokens: 16,
        dtype: KvDtype::F16,
    };

    #[test]
    fn all_of_it_is_aligned_present_and_writable() {
        let mut steps = Vec::new();
        let blocks = 150_000;
        let arena = Arena::allocate(GEOMETRY, blocks, &mut |done, total| steps.push((done, total))).unwrap();
        let bytes = blocks as usize * GEOMETRY.block_bytes();
        assert!(arena.bytes() >= bytes && arena.bytes() < bytes + (1 << 16));
        assert_eq!(steps.len(), arena.bytes().div_ceil(PREFAULT_STEP));
        assert!(steps.is_sorted());
        assert_eq!(steps.last(), Some(&(arena.bytes(), arena.bytes())));

        let view = arena.view();
        drop(arena);
        let last = BlockId(blocks - 1);
        let data: Vec<u8> = (0..GEOMETRY.block_bytes()).map(|i| i as u8).collect();
        let mut back = vec![0; data.len()];
        assert_eq!(view.block_ptr(BlockId(0), 0, 1).unwrap().as_ptr() as usize % ALIGN, 0);
        // SAFETY: this test is the only user of the arena.
        unsafe {
            view.write(last, 0, &data).unwrap();
            view.read(last, 0, &mut back).unwrap();
        }
        assert_eq!(back, data);
        assert!(view.block_ptr(BlockId(blocks), 0, 1).is_err());
    }

    #[test]
    fn impossible_sizes_are_errors() {
        let allocate = |geometry, blocks| Arena::allocate(geometry, blocks, &mut |_, _| ()).map(|_| ());
        let none = KvGeometry { layers: 0, ..GEOMETRY };
        assert!(matches!(allocate(GEOMETRY, 0), Err(ArenaError::Empty { .. })));
        assert!(matches!(allocate(none, 9), Err(ArenaError::Empty { .. })));
        let huge = KvGeometry {
            layers: 1 << 20,
            kv_heads: 1 << 10,
            head_dim: 1 << 10,
            ..GEOMETRY
        };
        assert!(matches!(allocate(huge, u32::MAX), Err(ArenaError::TooLarge { .. })));
        // Sixteen pebibytes can be named but not mapped.
        let refused = allocate(huge, 1 << 8).unwrap_err();
        assert!(matches!(refused, ArenaError::Map { .. }), "{refused}");
        assert!(refused.to_string().contains("--kv-bytes"), "{refused}");
    }
}
