//! Raw access to the arena's memory, block by block. This is the only unsafe code among the shared words.
//!
//! Network threads write blocks while compute threads read others, so no reference to the whole arena ever exists: there
//! are only raw pointers to single blocks, and who may use which block is decided by the block pool that owns the ids.

#![allow(unsafe_code)]

use crate::{BlockId, KvGeometry};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;

/// A block id that this arena does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("block {block:?} bytes {offset}..{end} lie outside an arena of {blocks} blocks of {block_bytes} bytes")]
pub struct OutOfArena {
    /// Which block.
    pub block: BlockId,
    /// First byte within it.
    pub offset: usize,
    /// One past the last byte within it.
    pub end: usize,
    /// How many there are.
    pub blocks: usize,
    /// How large each is.
    pub block_bytes: usize,
}

/// A shared view of an arena: base, length, geometry. Cheap to clone; keeps the memory alive.
#[derive(Clone)]
pub struct ArenaView {
    base: NonNull<u8>,
    blocks: usize,
    geometry: KvGeometry,
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the view is only an address and numbers; every access goes through raw pointers whose users carry the proof
// that they own the block (see `block_ptr`). The owner is Send + Sync and keeps the memory mapped.
unsafe impl Send for ArenaView {}
// SAFETY: as above.
unsafe impl Sync for ArenaView {}

impl std::fmt::Debug for ArenaView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ArenaView")
            .field("blocks", &self.blocks)
            .field("geometry", &self.geometry)
            .finish()
    }
}

/// Memory of [`ArenaView::on_heap`].
struct Heap {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: an address that is only freed through it, once, when the last view has gone.
unsafe impl Send for Heap {}
// SAFETY: as above; it gives no access.
unsafe impl Sync for Heap {}

impl Drop for Heap {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and no view outlives its owner.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

impl ArenaView {
    /// An arena on the process's own heap, zeroed: what tests and benches need. Nodes use kv-transfer's.
    ///
    /// # Panics
    /// Where the size is zero or overflows, or memory is out.
    pub fn on_heap(geometry: KvGeometry, blocks: usize) -> Self {
        let bytes = blocks.checked_mul(geometry.block_bytes()).filter(|bytes| *bytes > 0);
        let layout = bytes.and_then(|bytes| Layout::from_size_align(bytes, 64).ok());
        let layout = layout.expect("an arena has a size that memory can have");
        // SAFETY: the layout has a size above zero.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base) else {
            handle_alloc_error(layout)
        };
        // SAFETY: just allocated with this size and alignment, initialised with zeros, and owned by `Heap` alone.
        unsafe { Self::new(base, blocks, geometry, Arc::new(Heap { base, layout })) }
    }

    /// Wraps memory.
    ///
    /// # Safety
    /// `base` must be valid for reads and writes of `blocks * geometry.block_bytes()` bytes, aligned to 64 bytes, and
    /// initialised, for as long as `owner` lives, and nobody may hold a Rust reference into it.
    pub unsafe fn new(
        base: NonNull<u8>,
        blocks: usize,
        geometry: KvGeometry,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            base,
            blocks,
            geometry,
            owner,
        }
    }

    /// How many blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// What keeps the memory, for those who know what it can be.
    pub fn owner(&self) -> &(dyn Any + Send + Sync) {
        &*self.owner
    }

    /// Their shape.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// Address of `len` bytes at `offset` in `block`. Checked against the arena's bounds.
    ///
    /// Reading or writing through it is sound only for the block's present owner: a sequence that references it, the
    /// epoch that it was granted to, or a hand-over that claims it as a source.
    ///
    /// # Errors
    /// Where any of those bytes lies outside the block or the arena.
    pub fn block_ptr(&self, block: BlockId, offset: usize, len: usize) -> Result<NonNull<u8>, OutOfArena> {
        let block_bytes = self.geometry.block_bytes();
        let end = offset.checked_add(len).filter(|end| *end <= block_bytes);
        match end {
            // SAFETY: the block and the range within it were checked, so the sum stays inside the allocation.
            Some(_) if block.index() < self.blocks => {
                Ok(unsafe { self.base.add(block.index() * block_bytes + offset) })
            }
            _ => Err(OutOfArena {
                block,
                offset,
                end: offset.saturating_add(len),
                blocks: self.blocks,
                block_bytes,
            }),
        }
    }

    /// Copies bytes of a block out.
    ///
    /// # Errors
    /// As [`Self::block_ptr`].
    ///
    /// # Safety
    /// The caller owns the block for reading (see [`Self::block_ptr`]): nobody writes these bytes meanwhile.
    pub unsafe fn read(&self, block: BlockId, offset: usize, out: &mut [u8]) -> Result<(), OutOfArena> {
        let from = self.block_ptr(block, offset, out.len())?;
        // SAFETY: the range is inside the arena, `out` is a distinct Rust slice, the caller excludes writers.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies bytes into a block.
    ///
    /// # Errors
    /// As [`Self::block_ptr`].
    ///
    /// # Safety
    /// The caller owns the block for writing (see [`Self::block_ptr`]): nobody else reads or writes these bytes.
    pub unsafe fn write(&self, block: BlockId, offset: usize, data: &[u8]) -> Result<(), OutOfArena> {
        let to = self.block_ptr(block, offset, data.len())?;
        // SAFETY: the range is inside the arena, `data` is a distinct Rust slice, the caller excludes others.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to.as_ptr(), data.len()) };
        Ok(())
    }
}
