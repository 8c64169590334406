//! Devices: which there are, one of them opened, its port and its events.

#![allow(unsafe_code)]

use super::VerbsError;
use ibverbs_sys as ffi;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What a device can do at most.
#[derive(Debug, Clone, Copy)]
pub(in crate::transport) struct Limits {
    /// Bytes of one registration.
    pub(in crate::transport) region_bytes: u64,
    /// Work requests in one queue.
    pub(in crate::transport) work_requests: u32,
    /// Parts that one work request gathers.
    pub(in crate::transport) parts: u32,
    /// Entries of one completion queue.
    pub(in crate::transport) completions: u32,
}

/// One opened device.
pub(in crate::transport) struct Context {
    raw: NonNull<ffi::ibv_context>,
    name: String,
    limits: Limits,
}

// SAFETY: verbs are thread safe: any thread may use any object, and calls on one object are serialised by the library.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: opened by us, closed once; every child holds an `Arc` of this, so none is left.
        unsafe { ffi::ibv_close_device(self.raw.as_ptr()) };
    }
}

/// Calls `visit` with each device and its name.
fn each_device(mut visit: impl FnMut(*mut ffi::ibv_device, &str)) -> Result<(), VerbsError> {
    let mut count = 0;
    // SAFETY: `count` outlives the call.
    let list = unsafe { ffi::ibv_get_device_list(&raw mut count) };
    if list.is_null() {
        let error = VerbsError::last("ibv_get_device_list");
        // A kernel without RDMA has no devices; that is no error.
        return match error.source.raw_os_error() {
            Some(libc::ENOSYS | libc::ENOENT | libc::ENODEV) => Ok(()),
            _ => Err(error),
        };
    }
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the list has `count` entries, each a device that lives until the list is freed.
        let device = unsafe { *list.add(index) };
        // SAFETY: as above; the name is a terminated string inside the device.
        let name = unsafe { CStr::from_ptr(ffi::ibv_get_device_name(device)) };
        visit(device, &name.to_string_lossy());
    }
    // SAFETY: the list came from `ibv_get_device_list` and is freed once; opened devices stay open.
    unsafe { ffi::ibv_free_device_list(list) };
    Ok(())
}

impl Context {
    /// The names of this host's devices.
    ///
    /// # Errors
    /// What the library says; a host without RDMA has none, which is no error.
    pub(in crate::transport) fn names() -> Result<Vec<String>, VerbsError> {
        let mut names = Vec::new();
        each_device(|_, name| names.push(name.to_owned()))?;
        Ok(names)
    }

    /// Opens the device of that name; none where there is none.
    ///
    /// # Errors
    /// What the device says.
    pub(in crate::transport) fn open(wanted: &str) -> Result<Option<Arc<Self>>, VerbsError> {
        let mut opened = None;
        each_device(|device, name| {
            if name == wanted {
                // SAFETY: the device lives while its list does.
                let raw = NonNull::new(unsafe { ffi::ibv_open_device(device) });
                opened = Some(raw.ok_or_else(|| VerbsError::last("ibv_open_device")));
            }
        })?;
        let Some(raw) = opened.transpose()? else {
            return Ok(None);
        };
        let mut context = Self {
            raw,
            name: wanted.to_owned(),
            limits: Limits {
                region_bytes: 0,
                work_requests: 0,
                parts: 0,
                completions: 0,
            },
        };
        let mut attributes = ffi::ibv_device_attr::default();
        // SAFETY: the context is open; the call fills `attributes`.
        let queried = unsafe { ffi::ibv_query_device(raw.as_ptr(), &raw mut attributes) };
        VerbsError::check("ibv_query_device", queried)?;
        let count = |value: i32| u32::try_from(value).unwrap_or(0);
        context.limits = Limits {
            region_bytes: attributes.max_mr_size,
            work_requests: count(attributes.max_qp_wr),
            parts: count(attributes.max_sge),
            completions: count(attributes.max_cqe),
        };
        set_nonblocking(context.async_fd()).map_err(|source| VerbsError {
            call: "fcntl of async_fd",
            source,
        })?;
        Ok(Some(Arc::new(context)))
    }

    pub(in crate::transport) fn name(&self) -> &str {
        &self.name
    }

    pub(in crate::transport) fn limits(&self) -> Limits {
        self.limits
    }

    pub(super) fn raw(&self) -> *mut ffi::ibv_context {
        self.raw.as_ptr()
    }

    fn async_fd(&self) -> RawFd {
        // SAFETY: the context is open; the descriptor never changes.
        unsafe { (*self.raw()).async_fd }
    }

    /// Its operations.
    pub(super) fn operations(&self) -> &ffi::ibv_context_ops {
        // SAFETY: the table is filled when the context is opened and not changed afterwards.
        unsafe { &(*self.raw()).ops }
    }

    /// How many interrupts its completion channels can be spread over.
    pub(super) fn vectors(&self) -> i32 {
        // SAFETY: the context is open; the number never changes.
        unsafe { (*self.raw()).num_comp_vectors }.max(1)
    }

    /// The first port that is active and has an address.
    ///
    /// # Errors
    /// What the device says; none where no port is active.
    pub(in crate::transport) fn active_port(&self) -> Result<Option<Port>, VerbsError> {
        let mut attributes = ffi::ibv_device_attr::default();
        // SAFETY: the context is open; the call fills `attributes`.
        let queried = unsafe { ffi::ibv_query_device(self.raw(), &raw mut attributes) };
        VerbsError::check("ibv_query_device", queried)?;
        for number in 1..=attributes.phys_port_cnt {
            let mut port = ffi::ibv_port_attr::default();
            // SAFETY: the context is open; the call fills at most a `ibv_port_attr`, under the name that it had formerly.
            let queried = unsafe { ffi::ibv_query_port(self.raw(), number, (&raw mut port).cast()) };
            VerbsError::check("ibv_query_port", queried)?;
            if port.state != ffi::ibv_port_state::IBV_PORT_ACTIVE {
                continue;
            }
            if let Some((gid_index, gid)) = self.best_gid(number)? {
                return Ok(Some(Port {
                    number,
                    gid_index,
                    gid,
                    lid: port.lid,
                    mtu: port.active_mtu,
                    message_bytes: port.max_msg_sz,
                }));
            }
        }
        Ok(None)
    }

    /// The address of a port that reaches farthest. Their order in the table is nobody's promise.
    fn best_gid(&self, port: u8) -> Result<Option<(u8, [u8; 16])>, VerbsError> {
        const ENTRIES: usize = 256;
        let mut table = vec![ffi::ibv_gid_entry::default(); ENTRIES];
        let entry_bytes = std::mem::size_of::<ffi::ibv_gid_entry>();
        // SAFETY: the call fills at most `ENTRIES` entries of the size given.
        let got = unsafe { ffi::_ibv_query_gid_table(self.raw(), table.as_mut_ptr(), ENTRIES, 0, entry_bytes) };
        let got = usize::try_from(got).map_err(|_| VerbsError {
            call: "ibv_query_gid_table",
            source: io::Error::from_raw_os_error(got.unsigned_abs() as i32),
        })?;
        let of_port = table[..got].iter().filter(|entry| entry.port_num == u32::from(port));
        let best = of_port
            // SAFETY: all 16 bytes of the union were set, whichever view set them.
            .map(|entry| (entry, unsafe { entry.gid.raw }))
            .filter(|(_, gid)| *gid != [0; 16])
            .max_by_key(|(entry, gid)| (reach(gid, entry.gid_type), std::cmp::Reverse(entry.gid_index)));
        Ok(best.and_then(|(entry, gid)| Some((u8::try_from(entry.gid_index).ok()?, gid))))
    }
}

/// How far an address reaches: routable ones before link-local ones, RoCE version 2 before version 1.
fn reach(gid: &[u8; 16], kind: u32) -> u8 {
    let link_local = gid[0] == 0xfe && gid[1] & 0xc0 == 0x80;
    let mapped = gid[..10] == [0; 10] && gid[10..12] == [0xff; 2];
    let version_1 = u8::from(kind != ffi::IBV_GID_TYPE_ROCE_V1);
    match (mapped, link_local) {
        (true, _) => 4 + version_1,
        (false, false) => 2 + version_1,
        (false, true) => version_1,
    }
}

/// An active port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::transport) struct Port {
    pub(in crate::transport) number: u8,
    pub(in crate::transport) gid_index: u8,
    pub(in crate::transport) gid: [u8; 16],
    /// Of InfiniBand; zero on Ethernet.
    pub(in crate::transport) lid: u16,
    /// As verbs count it: 3 is 1024 bytes, 5 is 4096.
    pub(in crate::transport) mtu: u32,
    /// Largest message.
    pub(in crate::transport) message_bytes: u32,
}

/// What a device says unasked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::transport) enum AsyncEvent {
    /// A port lost its link.
    PortDown,
    /// The whole device failed.
    DeviceFailed,
    /// One queue pair failed.
    QueuePairFailed {
        /// Its number.
        number: u32,
    },
    /// Nothing that ends a connection.
    Other {
        /// As verbs number it.
        kind: u32,
    },
}

struct EventFd(Arc<Context>);

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.async_fd()
    }
}

/// The events of one device. One of these per device: an event is told once.
pub(in crate::transport) struct AsyncEvents(AsyncFd<EventFd>);

impl AsyncEvents {
    /// # Errors
    /// Where the descriptor cannot be watched.
    pub(in crate::transport) fn of(context: &Arc<Context>) -> io::Result<Self> {
        let descriptor = EventFd(Arc::clone(context));
        // SAFETY: the context that the result holds keeps the descriptor open and never changes it.
        let registered = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
        Ok(Self(registered?))
    }

    /// The next event. Cancel safe.
    ///
    /// # Errors
    /// Where the device gives no events any more.
    pub(in crate::transport) async fn next(&self) -> io::Result<AsyncEvent> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|descriptor| take_event(&descriptor.get_ref().0)) {
                Ok(event) => return event,
                Err(_would_block) => {}
            }
        }
    }
}

fn take_event(context: &Context) -> io::Result<AsyncEvent> {
    // SAFETY: plain integers and pointers, for which zeros are values.
    let mut event: ffi::ibv_async_event = unsafe { std::mem::zeroed() };
    // SAFETY: the context is open; the call fills `event`. The descriptor does not block.
    if unsafe { ffi::ibv_get_async_event(context.raw(), &raw mut event) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let told = match event.event_type {
        ffi::IBV_EVENT_PORT_ERR => AsyncEvent::PortDown,
        ffi::IBV_EVENT_DEVICE_FATAL => AsyncEvent::DeviceFailed,
        ffi::IBV_EVENT_QP_FATAL | ffi::IBV_EVENT_QP_REQ_ERR | ffi::IBV_EVENT_QP_ACCESS_ERR => {
            // SAFETY: these events name a queue pair, which `ibv_destroy_qp` does not free before the event is acknowledged.
            let number = unsafe { (*event.element.qp).qp_num };
            AsyncEvent::QueuePairFailed { number }
        }
        kind => AsyncEvent::Other { kind },
    };
    // SAFETY: acknowledged once. Whoever destroys the object waits for that.
    unsafe { ffi::ibv_ack_async_event(&raw mut event) };
    Ok(told)
}

/// Calls on the descriptor return instead of waiting.
pub(super) fn set_nonblocking(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: the descriptor belongs to a living context or channel; only its flags are read.
    let flags = unsafe { libc::fcntl(descriptor, libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above; only its flags are set.
    match unsafe { libc::fcntl(descriptor, libc::F_SETFL, flags | libc::O_NONBLOCK) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routable_addresses_come_first() {
        let mut mapped = [0; 16];
        mapped[10..].copy_from_slice(&[0xff, 0xff, 10, 99, 0, 1]);
        let mut global = [0; 16];
        global[0] = 0x20;
        let mut local = [0; 16];
        local[..2].copy_from_slice(&[0xfe, 0x80]);
        let (v1, v2) = (ffi::IBV_GID_TYPE_ROCE_V1, ffi::IBV_GID_TYPE_ROCE_V2);
        let order = [
            (local, v1),
            (local, v2),
            (global, v1),
            (global, v2),
            (mapped, v1),
            (mapped, v2),
        ];
        assert!(order.map(|(gid, kind)| reach(&gid, kind)).is_sorted());
    }
}
