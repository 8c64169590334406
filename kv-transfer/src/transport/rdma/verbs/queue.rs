//! Completion queues with their channels, and queue pairs.

#![allow(unsafe_code)]

use super::context::set_nonblocking;
use super::work::receives;
use super::{Chain, Completion, Context, Part, Port, ProtectionDomain, VerbsError};
use ibverbs_sys as ffi;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Tells when a queue that was armed has completions.
struct Channel {
    raw: NonNull<ffi::ibv_comp_channel>,
    _context: Arc<Context>,
}

// SAFETY: verbs are thread safe.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        // SAFETY: the channel lives; its descriptor never changes.
        unsafe { self.raw.as_ref() }.fd
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: created by us, destroyed once, after the one queue that uses it (see `CompletionQueue`).
        unsafe { ffi::ibv_destroy_comp_channel(self.raw.as_ptr()) };
    }
}

/// Where the completions of queue pairs come, and how their owner sleeps until they do.
pub(in crate::transport) struct CompletionQueue {
    raw: NonNull<ffi::ibv_cq>,
    channel: AsyncFd<Channel>,
    context: Arc<Context>,
}

// SAFETY: verbs are thread safe.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: created by us, destroyed once; its queue pairs hold an `Arc` of it, so none is left, and every event was
        // acknowledged when it was taken. The channel goes after it.
        unsafe { ffi::ibv_destroy_cq(self.raw.as_ptr()) };
    }
}

impl CompletionQueue {
    /// A queue of `entries`; `nth` spreads queues over the device's interrupts.
    ///
    /// # Errors
    /// What the device says.
    pub(in crate::transport) fn new(context: &Arc<Context>, entries: u32, nth: usize) -> Result<Arc<Self>, VerbsError> {
        // SAFETY: the context is open and kept so by the `Arc`.
        let raw = NonNull::new(unsafe { ffi::ibv_create_comp_channel(context.raw()) });
        let channel = Channel {
            raw: raw.ok_or_else(|| VerbsError::last("ibv_create_comp_channel"))?,
            _context: Arc::clone(context),
        };
        let watch = |source| VerbsError {
            call: "completion channel",
            source,
        };
        set_nonblocking(channel.as_raw_fd()).map_err(watch)?;
        // SAFETY: the channel keeps its descriptor open until it drops and never changes it.
        let channel = unsafe { AsyncFd::register_with_interest(channel, Interest::READABLE) };
        let channel = channel.map_err(|error| watch(error.into()))?;
        let vectors = usize::try_from(context.vectors()).unwrap_or(1);
        let vector = i32::try_from(nth % vectors).unwrap_or(0);
        let entries = i32::try_from(entries).unwrap_or(i32::MAX);
        let raw = channel.get_ref().raw.as_ptr();
        // SAFETY: context and channel live and are kept so by the result.
        let raw = unsafe { ffi::ibv_create_cq(context.raw(), entries, std::ptr::null_mut(), raw, vector) };
        Ok(Arc::new(Self {
            raw: NonNull::new(raw).ok_or_else(|| VerbsError::last("ibv_create_cq"))?,
            channel,
            context: Arc::clone(context),
        }))
    }

    /// Appends what has completed; says how many.
    ///
    /// # Errors
    /// Where the queue is broken.
    pub(in crate::transport) fn poll(&self, into: &mut Vec<Completion>) -> Result<usize, VerbsError> {
        const AT_ONCE: usize = 32;
        let poll = self.context.operations().poll_cq;
        let poll = poll.ok_or_else(|| VerbsError::missing("ibv_poll_cq"))?;
        let mut entries = [ffi::ibv_wc::default(); AT_ONCE];
        // SAFETY: the queue lives; the call fills at most so many entries.
        let got = unsafe { poll(self.raw.as_ptr(), AT_ONCE as i32, entries.as_mut_ptr()) };
        let got = usize::try_from(got).map_err(|_| VerbsError::last("ibv_poll_cq"))?;
        into.extend(entries[..got].iter().map(Completion::of));
        Ok(got)
    }

    /// Asks for an event at the next completion. One that came before is not told: poll once more after this.
    ///
    /// # Errors
    /// Where the queue is broken.
    pub(in crate::transport) fn arm(&self) -> Result<(), VerbsError> {
        let arm = self.context.operations().req_notify_cq;
        let arm = arm.ok_or_else(|| VerbsError::missing("ibv_req_notify_cq"))?;
        // SAFETY: the queue lives.
        VerbsError::check("ibv_req_notify_cq", unsafe { arm(self.raw.as_ptr(), 0) })
    }

    /// Waits for the event that [`Self::arm`] asked for. Cancel safe.
    ///
    /// # Errors
    /// Where the channel is broken.
    pub(in crate::transport) async fn event(&self) -> Result<(), VerbsError> {
        let broken = |source| VerbsError {
            call: "ibv_get_cq_event",
            source,
        };
        loop {
            let mut ready = self.channel.readable().await.map_err(broken)?;
            match ready.try_io(|channel| take_event(channel.get_ref())) {
                Ok(taken) => return taken.map_err(broken),
                Err(_would_block) => {}
            }
        }
    }
}

fn take_event(channel: &Channel) -> io::Result<()> {
    let mut queue = std::ptr::null_mut();
    let mut cookie = std::ptr::null_mut();
    // SAFETY: the channel lives and does not block; the call fills both pointers.
    if unsafe { ffi::ibv_get_cq_event(channel.raw.as_ptr(), &raw mut queue, &raw mut cookie) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the channel's one queue, which waits for this when it is destroyed.
    unsafe { ffi::ibv_ack_cq_events(queue, 1) };
    Ok(())
}

/// How much a queue pair holds.
#[derive(Debug, Clone, Copy)]
pub(in crate::transport) struct Capacity {
    /// Work requests posted and not over.
    pub(in crate::transport) sends: u32,
    /// Receives posted and not over.
    pub(in crate::transport) receives: u32,
    /// Parts that one work request gathers.
    pub(in crate::transport) parts: u32,
}

/// The other end of a reliable connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::transport) struct RemoteEnd {
    pub(in crate::transport) number: u32,
    /// The first packet that it sends has this number.
    pub(in crate::transport) first_packet: u32,
    pub(in crate::transport) gid: [u8; 16],
    pub(in crate::transport) lid: u16,
    pub(in crate::transport) mtu: u32,
}

/// How long one end waits for the other before it sends again: 4.096 us times two to the power of this, so 268 ms.
const ACKNOWLEDGE_TIMEOUT: u8 = 16;
/// How often it sends again before the connection is over. Never 7, which some devices take for "for ever".
const RETRIES: u8 = 6;
/// How often it waits for a receive to be posted. Never 7, which means for ever.
const NOT_READY_RETRIES: u8 = 3;
/// What a receiver without a posted receive asks to wait: 0.64 ms.
const NOT_READY_TIMER: u8 = 12;

/// One end of a reliable connection. Destroying it is the proof that its peer writes nothing through it any more.
pub(in crate::transport) struct QueuePair {
    raw: Option<NonNull<ffi::ibv_qp>>,
    first_packet: u32,
    _completions: Arc<CompletionQueue>,
    domain: Arc<ProtectionDomain>,
}

// SAFETY: verbs are thread safe.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

impl Drop for QueuePair {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "a queue pair cannot be destroyed");
        }
    }
}

impl QueuePair {
    /// A new one in the state `INIT`: receives can be posted. `first_packet` should be random, so that packets of an
    /// earlier connection cannot pass for this one's.
    ///
    /// # Errors
    /// What the device says.
    pub(in crate::transport) fn new(
        domain: &Arc<ProtectionDomain>,
        completions: &Arc<CompletionQueue>,
        capacity: Capacity,
        port: &Port,
        first_packet: u32,
    ) -> Result<Self, VerbsError> {
        let queue = completions.raw.as_ptr();
        let mut init = ffi::ibv_qp_init_attr {
            qp_context: std::ptr::null_mut(),
            send_cq: queue,
            recv_cq: queue,
            srq: std::ptr::null_mut(),
            cap: ffi::ibv_qp_cap {
                max_send_wr: capacity.sends,
                max_recv_wr: capacity.receives,
                max_send_sge: capacity.parts,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            qp_type: ffi::ibv_qp_type::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: domain and queue live and are kept so by the result; the call reads and fills `init`.
        let raw = NonNull::new(unsafe { ffi::ibv_create_qp(domain.raw(), &raw mut init) });
        let pair = Self {
            raw: Some(raw.ok_or_else(|| VerbsError::last("ibv_create_qp"))?),
            first_packet: first_packet & 0xff_ffff,
            _completions: Arc::clone(completions),
            domain: Arc::clone(domain),
        };
        use ffi::ibv_qp_attr_mask as mask;
        let mut attributes = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_INIT,
            pkey_index: 0,
            port_num: port.number,
            qp_access_flags: (ffi::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE
                | ffi::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE)
                .0,
            ..Default::default()
        };
        let changed = mask::IBV_QP_STATE | mask::IBV_QP_PKEY_INDEX | mask::IBV_QP_PORT | mask::IBV_QP_ACCESS_FLAGS;
        pair.modify("ibv_modify_qp to INIT", &mut attributes, changed)?;
        Ok(pair)
    }

    fn raw(&self) -> *mut ffi::ibv_qp {
        self.raw.map_or(std::ptr::null_mut(), NonNull::as_ptr)
    }

    /// Its number, which its peer needs.
    pub(in crate::transport) fn number(&self) -> u32 {
        // SAFETY: it lives until `end`, after which nobody has it.
        self.raw.map_or(0, |raw| unsafe { raw.as_ref() }.qp_num)
    }

    pub(in crate::transport) fn first_packet(&self) -> u32 {
        self.first_packet
    }

    fn modify(
        &self,
        call: &'static str,
        attributes: &mut ffi::ibv_qp_attr,
        changed: ffi::ibv_qp_attr_mask,
    ) -> Result<(), VerbsError> {
        let changed = i32::try_from(changed.0).expect("the flags of a queue pair are small");
        // SAFETY: the queue pair lives; the call reads `attributes`.
        VerbsError::check(call, unsafe {
            ffi::ibv_modify_qp(self.raw(), std::ptr::from_mut(attributes), changed)
        })
    }

    /// Joins it to its peer: it receives and sends from now on. The smaller of both MTUs is used.
    ///
    /// # Errors
    /// What the device says.
    pub(in crate::transport) fn connect(&self, port: &Port, remote: &RemoteEnd) -> Result<(), VerbsError> {
        use ffi::ibv_qp_attr_mask as mask;
        let mut attributes = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_RTR,
            path_mtu: port.mtu.min(remote.mtu),
            dest_qp_num: remote.number,
            rq_psn: remote.first_packet & 0xff_ffff,
            max_dest_rd_atomic: 1,
            min_rnr_timer: NOT_READY_TIMER,
            ..Default::default()
        };
        attributes.ah_attr.is_global = 1;
        attributes.ah_attr.dlid = remote.lid;
        attributes.ah_attr.port_num = port.number;
        attributes.ah_attr.grh.dgid.raw = remote.gid;
        attributes.ah_attr.grh.sgid_index = port.gid_index;
        attributes.ah_attr.grh.hop_limit = 64;
        let changed = mask::IBV_QP_STATE
            | mask::IBV_QP_AV
            | mask::IBV_QP_PATH_MTU
            | mask::IBV_QP_DEST_QPN
            | mask::IBV_QP_RQ_PSN
            | mask::IBV_QP_MAX_DEST_RD_ATOMIC
            | mask::IBV_QP_MIN_RNR_TIMER;
        self.modify("ibv_modify_qp to RTR", &mut attributes, changed)?;
        let mut attributes = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_RTS,
            sq_psn: self.first_packet,
            timeout: ACKNOWLEDGE_TIMEOUT,
            retry_cnt: RETRIES,
            rnr_retry: NOT_READY_RETRIES,
            max_rd_atomic: 1,
            ..Default::default()
        };
        let changed = mask::IBV_QP_STATE
            | mask::IBV_QP_TIMEOUT
            | mask::IBV_QP_RETRY_CNT
            | mask::IBV_QP_RNR_RETRY
            | mask::IBV_QP_SQ_PSN
            | mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify("ibv_modify_qp to RTS", &mut attributes, changed)
    }

    /// Posts all of a chain by one call, and empties it. Whoever posts sees to it that there is room for all of it.
    ///
    /// # Errors
    /// Where the device refuses one; those before it were posted. The connection is to be ended then.
    pub(in crate::transport) fn post(&self, chain: &mut Chain) -> Result<(), VerbsError> {
        let post = self.domain.context().operations().post_send;
        let post = post.ok_or_else(|| VerbsError::missing("ibv_post_send"))?;
        let first = chain.link();
        let mut refused = std::ptr::null_mut();
        // SAFETY: the queue pair lives; the chain was linked just now and lives through the call, which copies it. The parts
        // are of registered memory, by their construction; should the registration have ended, the device refuses them.
        let posted = VerbsError::check("ibv_post_send", unsafe { post(self.raw(), first, &raw mut refused) });
        chain.clear();
        posted
    }

    /// Posts receives, each with its number.
    ///
    /// # Errors
    /// Where the device refuses one; those before it were posted. The connection is to be ended then.
    pub(in crate::transport) fn receive(&self, wanted: &[(u64, Part)]) -> Result<(), VerbsError> {
        if wanted.is_empty() {
            return Ok(());
        }
        let post = self.domain.context().operations().post_recv;
        let post = post.ok_or_else(|| VerbsError::missing("ibv_post_recv"))?;
        let (mut requests, _parts) = receives(wanted);
        let mut refused = std::ptr::null_mut();
        // SAFETY: as in `post`; the requests and their parts live through the call, which copies them.
        VerbsError::check("ibv_post_recv", unsafe {
            post(self.raw(), requests.as_mut_ptr(), &raw mut refused)
        })
    }

    /// Destroys it. Once this returned without an error, its device accepts no packet for it any more.
    ///
    /// # Errors
    /// What the device says: then nothing is proven, and it is never tried again.
    pub(in crate::transport) fn destroy(mut self) -> Result<(), VerbsError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), VerbsError> {
        match self.raw.take() {
            // SAFETY: created by us, destroyed once. Events of it were acknowledged when they were taken.
            Some(raw) => VerbsError::check("ibv_destroy_qp", unsafe { ffi::ibv_destroy_qp(raw.as_ptr()) }),
            None => Ok(()),
        }
    }
}
