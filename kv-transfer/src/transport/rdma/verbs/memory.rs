//! Memory that devices may reach.
//!
//! A [`Region`] owns what it registers, or shares in its ownership: the memory is given back only after the registration is
//! over, and a device reaches nothing without one. So a work request that names a region that has gone fails; it never reads
//! or writes freed memory.

#![allow(unsafe_code)]

use super::{Context, Part, VerbsError};
use baton_types::ArenaView;
use ibverbs_sys as ffi;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// What registrations and queue pairs must share to be used together.
pub(in crate::transport) struct ProtectionDomain {
    raw: NonNull<ffi::ibv_pd>,
    context: Arc<Context>,
}

// SAFETY: verbs are thread safe.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: allocated by us, freed once; every child holds an `Arc` of this, so none is left.
        unsafe { ffi::ibv_dealloc_pd(self.raw.as_ptr()) };
    }
}

impl ProtectionDomain {
    /// # Errors
    /// What the device says.
    pub(in crate::transport) fn new(context: &Arc<Context>) -> Result<Arc<Self>, VerbsError> {
        // SAFETY: the context is open and kept so by the `Arc`.
        let raw = NonNull::new(unsafe { ffi::ibv_alloc_pd(context.raw()) });
        let raw = raw.ok_or_else(|| VerbsError::last("ibv_alloc_pd"))?;
        let context = Arc::clone(context);
        Ok(Arc::new(Self { raw, context }))
    }

    pub(in crate::transport) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(super) fn raw(&self) -> *mut ffi::ibv_pd {
        self.raw.as_ptr()
    }
}

/// Memory of this process.
#[derive(Clone)]
pub(in crate::transport) struct HostMemory {
    start: NonNull<u8>,
    len: usize,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: an address and its owner, which is Send and Sync; no access goes through it.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Blocks of an arena, which is kept mapped. Writing to them is for whoever they were granted to.
    ///
    /// # Errors
    /// Blocks that the arena does not have.
    pub(in crate::transport) fn blocks(
        arena: &ArenaView,
        first: usize,
        count: usize,
    ) -> Result<Self, baton_types::OutOfArena> {
        let id = |index: usize| baton_types::BlockId(u32::try_from(index).unwrap_or(u32::MAX));
        let block_bytes = arena.geometry().block_bytes();
        let start = arena.block_ptr(id(first), 0, 0)?;
        arena.block_ptr(id(first + count - 1), 0, block_bytes)?;
        Ok(Self {
            start,
            len: count * block_bytes,
            _owner: Arc::new(arena.clone()),
        })
    }
}

/// Memory that another driver shares by descriptor: that of a GPU.
pub(in crate::transport) struct DmaBuf {
    pub(in crate::transport) descriptor: Arc<OwnedFd>,
    /// First byte within it.
    pub(in crate::transport) offset: u64,
    /// The same bytes as this process maps them: the addresses that work requests name, and what is registered in its
    /// stead where the device takes no dma-buf.
    pub(in crate::transport) mapped: HostMemory,
}

/// What can be registered.
pub(in crate::transport) enum Memory {
    Host(HostMemory),
    DmaBuf(DmaBuf),
}

/// How a region came to be registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::transport) enum Registration {
    /// As memory of this process.
    Host,
    /// As a dma-buf.
    DmaBuf,
    /// As memory of this process, because the device or its driver takes no dma-buf.
    HostInsteadOfDmaBuf {
        /// What it said.
        reason: String,
    },
}

/// Registered memory.
pub(in crate::transport) struct Region {
    raw: NonNull<ffi::ibv_mr>,
    memory: HostMemory,
    registration: Registration,
    _descriptor: Option<Arc<OwnedFd>>,
    _domain: Arc<ProtectionDomain>,
}

// SAFETY: verbs are thread safe; the memory is an address with an owner.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: registered by us, ended once. The memory goes after this.
        let ended = unsafe { ffi::ibv_dereg_mr(self.raw.as_ptr()) };
        if ended != 0 {
            // The device may still reach the memory: it must never be given back.
            tracing::error!(
                error = ended,
                "memory cannot be taken back from the device and is leaked"
            );
            std::mem::forget(self.memory.clone());
        }
    }
}

impl Region {
    /// Registers memory; `remote`: peers that know the key may write it.
    ///
    /// # Errors
    /// What the device says. A device that takes no dma-buf is none: the mapped memory is registered instead, and
    /// [`Self::registration`] says so.
    pub(in crate::transport) fn register(
        domain: &Arc<ProtectionDomain>,
        memory: Memory,
        remote: bool,
    ) -> Result<Self, VerbsError> {
        let mut access = ffi::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE;
        if remote {
            access |= ffi::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE;
        }
        let access = i32::try_from(access.0).expect("access flags are small");
        let (memory, descriptor, registered, registration) = match memory {
            Memory::Host(memory) => {
                let registered = host(domain, &memory, access);
                (memory, None, registered, Registration::Host)
            }
            Memory::DmaBuf(DmaBuf {
                descriptor,
                offset,
                mapped,
            }) => match dma_buf(domain, &descriptor, offset, &mapped, access) {
                Ok(raw) => (mapped, Some(descriptor), Ok(raw), Registration::DmaBuf),
                Err(error) => {
                    let reason = error.to_string();
                    let registered = host(domain, &mapped, access);
                    (mapped, None, registered, Registration::HostInsteadOfDmaBuf { reason })
                }
            },
        };
        Ok(Self {
            raw: registered?,
            memory,
            registration,
            _descriptor: descriptor,
            _domain: Arc::clone(domain),
        })
    }

    pub(in crate::transport) fn registration(&self) -> &Registration {
        &self.registration
    }

    /// Address of its first byte, as peers and work requests name it.
    pub(in crate::transport) fn address(&self) -> u64 {
        self.memory.start.as_ptr() as u64
    }

    /// What peers must show to write it.
    pub(in crate::transport) fn remote_key(&self) -> u32 {
        // SAFETY: the registration lives; the key never changes.
        unsafe { self.raw.as_ref() }.rkey
    }

    /// Bytes of it, for a work request; none where they are not all inside.
    pub(in crate::transport) fn part(&self, address: u64, len: u32) -> Option<Part> {
        let offset = address.checked_sub(self.address())?;
        let inside = offset.checked_add(u64::from(len))? <= self.memory.len as u64;
        // SAFETY: the registration lives; the key never changes.
        let key = unsafe { self.raw.as_ref() }.lkey;
        inside.then_some(Part { address, len, key })
    }
}

fn host(domain: &ProtectionDomain, memory: &HostMemory, access: i32) -> Result<NonNull<ffi::ibv_mr>, VerbsError> {
    // SAFETY: the memory is valid for `len` bytes while its owner lives, which the region sees to; Rust references into it do
    // not exist, so that a device may write it.
    let raw = unsafe { ffi::ibv_reg_mr(domain.raw(), memory.start.as_ptr().cast(), memory.len, access) };
    NonNull::new(raw).ok_or_else(|| VerbsError::last("ibv_reg_mr"))
}

fn dma_buf(
    domain: &ProtectionDomain,
    descriptor: &OwnedFd,
    offset: u64,
    mapped: &HostMemory,
    access: i32,
) -> Result<NonNull<ffi::ibv_mr>, VerbsError> {
    let (address, descriptor) = (mapped.start.as_ptr() as u64, descriptor.as_raw_fd());
    // SAFETY: the descriptor is open; the call checks that it is a dma-buf of that size.
    let raw = unsafe { ffi::ibv_reg_dmabuf_mr(domain.raw(), offset, mapped.len, address, descriptor, access) };
    NonNull::new(raw).ok_or_else(|| VerbsError::last("ibv_reg_dmabuf_mr"))
}

/// Memory of [`Mailbox`].
struct Heap {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: an address that is only freed through it, once.
unsafe impl Send for Heap {}
// SAFETY: as above; it gives no access.
unsafe impl Sync for Heap {}

impl Drop for Heap {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout; whoever registers it holds it until the registration is over.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// Registered slots for small messages, sent and received. Peers cannot write them but by a message.
pub(in crate::transport) struct Mailbox {
    region: Region,
    start: NonNull<u8>,
    slots: usize,
    slot_bytes: usize,
}

// SAFETY: the region is Send, and the address is that of its memory.
unsafe impl Send for Mailbox {}

impl Mailbox {
    /// # Errors
    /// What the device says.
    ///
    /// # Panics
    /// Where slots or their size are zero or overflow.
    pub(in crate::transport) fn new(
        domain: &Arc<ProtectionDomain>,
        slots: usize,
        slot_bytes: usize,
    ) -> Result<Self, VerbsError> {
        let bytes = slots.checked_mul(slot_bytes).filter(|bytes| *bytes > 0);
        let layout = bytes.and_then(|bytes| Layout::from_size_align(bytes, 4096).ok());
        let layout = layout.expect("a mailbox has a size that memory can have");
        // SAFETY: the layout has a size above zero.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        let memory = HostMemory {
            start,
            len: layout.size(),
            _owner: Arc::new(Heap { start, layout }),
        };
        Ok(Self {
            region: Region::register(domain, Memory::Host(memory), false)?,
            start,
            slots,
            slot_bytes,
        })
    }

    fn slot(&self, slot: usize, len: usize) -> NonNull<u8> {
        assert!(
            slot < self.slots && len <= self.slot_bytes,
            "{len} bytes in slot {slot}"
        );
        // SAFETY: inside the allocation, as just checked.
        unsafe { self.start.add(slot * self.slot_bytes) }
    }

    /// Puts a message into a slot, to be sent. The slot must not be in use by a work request: its bytes would be sent mixed.
    ///
    /// # Panics
    /// Where there is no such slot or the message is longer than it.
    pub(in crate::transport) fn put(&mut self, slot: usize, message: &[u8]) -> Part {
        let start = self.slot(slot, message.len());
        // SAFETY: inside the allocation; `&mut self` makes this the only access of this process.
        unsafe { std::ptr::copy_nonoverlapping(message.as_ptr(), start.as_ptr(), message.len()) };
        self.part(slot, message.len())
    }

    /// The first bytes of a slot that a message came into.
    ///
    /// # Panics
    /// Where there is no such slot or it is shorter.
    pub(in crate::transport) fn take(&mut self, slot: usize, len: usize) -> Vec<u8> {
        let start = self.slot(slot, len);
        let mut message = vec![0; len];
        // SAFETY: inside the allocation, initialised with zeros at first; `&mut self` makes this the only access of this
        // process, and the device writes a slot only while a receive of it is posted.
        unsafe { std::ptr::copy_nonoverlapping(start.as_ptr(), message.as_mut_ptr(), len) };
        message
    }

    /// A whole slot, to receive into.
    ///
    /// # Panics
    /// Where there is no such slot.
    pub(in crate::transport) fn whole(&self, slot: usize) -> Part {
        self.part(slot, self.slot_bytes)
    }

    fn part(&self, slot: usize, len: usize) -> Part {
        let address = self.slot(slot, len).as_ptr() as u64;
        let len = u32::try_from(len).expect("a slot is small");
        self.region.part(address, len).expect("the region is the whole mailbox")
    }
}
