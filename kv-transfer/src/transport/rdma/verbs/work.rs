//! Work requests and their completions.

#![allow(unsafe_code)]

use ibverbs_sys as ffi;
use std::io::ErrorKind;

/// Bytes of a registered region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::transport) struct Part {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) key: u32,
}

impl Part {
    /// Extends it by bytes that follow it in the same region, where they do.
    pub(in crate::transport) fn join(&mut self, next: &Self) -> bool {
        let follows = self.address + u64::from(self.len) == next.address && self.key == next.key;
        match self.len.checked_add(next.len) {
            Some(len) if follows => {
                self.len = len;
                true
            }
            Some(_) | None => false,
        }
    }

    pub(in crate::transport) fn len(&self) -> u32 {
        self.len
    }

    /// Some of its bytes.
    pub(in crate::transport) fn slice(&self, from: u32, len: u32) -> Self {
        debug_assert!(from + len <= self.len);
        Self {
            address: self.address + u64::from(from),
            len,
            key: self.key,
        }
    }

    #[cfg(test)]
    pub(in crate::transport) fn fake_address(&self) -> u64 {
        self.address
    }

    /// For tests of what is made of parts.
    #[cfg(test)]
    pub(in crate::transport) fn fake(address: u64, len: u32, key: u32) -> Self {
        Self { address, len, key }
    }
}

/// A place in a peer's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::transport) struct Remote {
    pub(in crate::transport) address: u64,
    pub(in crate::transport) key: u32,
}

/// What a work request does.
#[derive(Debug, Clone, Copy)]
pub(in crate::transport) enum Work {
    /// Writes into the peer's memory, unseen by its processor.
    Write(Remote),
    /// As above, and tells the peer by a word.
    WriteAndTell(Remote, u32),
    /// Sends a message.
    Send,
}

/// Work requests that are posted by one call.
#[derive(Default)]
pub(in crate::transport) struct Chain {
    requests: Vec<ffi::ibv_send_wr>,
    parts: Vec<ffi::ibv_sge>,
}

// SAFETY: its pointers are null, or were set by the post that was over before anybody could move the chain.
unsafe impl Send for Chain {}

impl Chain {
    pub(in crate::transport) fn len(&self) -> usize {
        self.requests.len()
    }

    pub(in crate::transport) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Appends a request.
    pub(in crate::transport) fn push(&mut self, id: u64, work: Work, parts: impl IntoIterator<Item = Part>) {
        let before = self.parts.len();
        self.parts.extend(parts.into_iter().map(|part| ffi::ibv_sge {
            addr: part.address,
            length: part.len,
            lkey: part.key,
        }));
        // SAFETY: plain integers, pointers and unions of them, for which zeros are values.
        let mut request: ffi::ibv_send_wr = unsafe { std::mem::zeroed() };
        request.wr_id = id;
        request.num_sge = i32::try_from(self.parts.len() - before).expect("a request gathers few parts");
        let place = match work {
            Work::Write(place) => {
                request.opcode = ffi::ibv_wr_opcode::IBV_WR_RDMA_WRITE;
                Some(place)
            }
            Work::WriteAndTell(place, word) => {
                request.opcode = ffi::ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM;
                request.__bindgen_anon_1.imm_data = word.to_be();
                Some(place)
            }
            Work::Send => {
                request.opcode = ffi::ibv_wr_opcode::IBV_WR_SEND;
                None
            }
        };
        if let Some(place) = place {
            request.wr.rdma.remote_addr = place.address;
            request.wr.rdma.rkey = place.key;
        }
        self.requests.push(request);
    }

    /// Asks for a completion of the last request, and so for the news that all before it are over.
    pub(in crate::transport) fn signal(&mut self) {
        if let Some(last) = self.requests.last_mut() {
            last.send_flags |= ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
    }

    pub(in crate::transport) fn clear(&mut self) {
        self.requests.clear();
        self.parts.clear();
    }

    /// Links the requests to each other and to their parts; gives the first, or null where there is none. The pointers are
    /// good until the chain is changed.
    pub(super) fn link(&mut self) -> *mut ffi::ibv_send_wr {
        let parts = self.parts.as_mut_ptr();
        let requests = self.requests.as_mut_ptr();
        let mut at = 0;
        for index in 0..self.requests.len() {
            let last = index + 1 == self.requests.len();
            let request = &mut self.requests[index];
            request.sg_list = parts.wrapping_add(at);
            request.next = match last {
                true => std::ptr::null_mut(),
                false => requests.wrapping_add(index + 1),
            };
            at += usize::try_from(request.num_sge).unwrap_or(0);
        }
        match self.requests.is_empty() {
            true => std::ptr::null_mut(),
            false => requests,
        }
    }
}

/// A work request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::transport) struct Failure(u32);

impl Failure {
    /// As verbs name it.
    pub(in crate::transport) fn name(self) -> &'static str {
        use ffi::ibv_wc_status as status;
        match self.0 {
            status::IBV_WC_LOC_LEN_ERR => "LOC_LEN_ERR",
            status::IBV_WC_LOC_QP_OP_ERR => "LOC_QP_OP_ERR",
            status::IBV_WC_LOC_PROT_ERR => "LOC_PROT_ERR",
            status::IBV_WC_WR_FLUSH_ERR => "WR_FLUSH_ERR",
            status::IBV_WC_LOC_ACCESS_ERR => "LOC_ACCESS_ERR",
            status::IBV_WC_REM_INV_REQ_ERR => "REM_INV_REQ_ERR",
            status::IBV_WC_REM_ACCESS_ERR => "REM_ACCESS_ERR",
            status::IBV_WC_REM_OP_ERR => "REM_OP_ERR",
            status::IBV_WC_RETRY_EXC_ERR => "RETRY_EXC_ERR",
            status::IBV_WC_RNR_RETRY_EXC_ERR => "RNR_RETRY_EXC_ERR",
            status::IBV_WC_FATAL_ERR => "FATAL_ERR",
            _ => "another status",
        }
    }

    /// The nearest of the system's kinds of error.
    pub(in crate::transport) fn kind(self) -> ErrorKind {
        use ffi::ibv_wc_status as status;
        match self.0 {
            status::IBV_WC_RETRY_EXC_ERR | status::IBV_WC_RNR_RETRY_EXC_ERR => ErrorKind::TimedOut,
            status::IBV_WC_LOC_QP_OP_ERR | status::IBV_WC_FATAL_ERR => ErrorKind::NetworkDown,
            status::IBV_WC_REM_ACCESS_ERR | status::IBV_WC_LOC_PROT_ERR => ErrorKind::PermissionDenied,
            status::IBV_WC_WR_FLUSH_ERR => ErrorKind::ConnectionAborted,
            _ => ErrorKind::Other,
        }
    }
}

/// A work request is over.
#[derive(Debug, Clone, Copy)]
pub(in crate::transport) struct Completion {
    /// As it was posted.
    pub(in crate::transport) id: u64,
    /// Bytes of a received message, or why it failed.
    pub(in crate::transport) outcome: Result<usize, Failure>,
    /// The word that came along.
    pub(in crate::transport) word: Option<u32>,
}

impl Completion {
    pub(super) fn of(raw: &ffi::ibv_wc) -> Self {
        Self {
            id: raw.wr_id(),
            outcome: raw.error().map_or(Ok(raw.len()), |(status, _)| Err(Failure(status))),
            word: raw.imm_data().map(u32::from_be),
        }
    }
}

/// A chain of receives, and what it points to.
pub(super) fn receives(wanted: &[(u64, Part)]) -> (Vec<ffi::ibv_recv_wr>, Vec<ffi::ibv_sge>) {
    let mut parts: Vec<_> = wanted
        .iter()
        .map(|(_, part)| ffi::ibv_sge {
            addr: part.address,
            length: part.len,
            lkey: part.key,
        })
        .collect();
    let sges = parts.as_mut_ptr();
    let mut requests: Vec<ffi::ibv_recv_wr> = wanted
        .iter()
        .enumerate()
        .map(|(index, (id, _))| ffi::ibv_recv_wr {
            wr_id: *id,
            next: std::ptr::null_mut(),
            sg_list: sges.wrapping_add(index),
            num_sge: 1,
        })
        .collect();
    let base = requests.as_mut_ptr();
    for (index, request) in requests.iter_mut().enumerate().take(wanted.len().saturating_sub(1)) {
        request.next = base.wrapping_add(index + 1);
    }
    (requests, parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_linked_in_order() {
        let mut chain = Chain::default();
        assert!(chain.link().is_null());
        let part = |address| Part::fake(address, 8, 1);
        chain.push(1, Work::Write(Remote { address: 64, key: 2 }), [part(0), part(16)]);
        chain.push(2, Work::WriteAndTell(Remote { address: 96, key: 2 }, 7), [part(32)]);
        chain.push(3, Work::Send, [part(48)]);
        chain.signal();
        let mut at = chain.link();
        let mut seen = Vec::new();
        while !at.is_null() {
            // SAFETY: `link` was the last to touch the chain, which lives on.
            let request = unsafe { &*at };
            // SAFETY: as above; every request has at least one part.
            let part = unsafe { &*request.sg_list };
            seen.push((request.wr_id, part.addr, request.num_sge, request.send_flags));
            at = request.next;
        }
        assert_eq!(seen, [(1, 0, 2, 0), (2, 32, 1, 0), (3, 48, 1, 2)]);
    }

    #[test]
    fn parts_join_where_they_touch_within_a_region() {
        let mut part = Part::fake(0, 8, 1);
        assert!(part.join(&Part::fake(8, 8, 1)));
        assert_eq!(part, Part::fake(0, 16, 1));
        assert!(!part.join(&Part::fake(16, 8, 2)));
        assert!(!part.join(&Part::fake(17, 8, 1)));
        assert!(!part.join(&Part::fake(16, u32::MAX, 1)));
    }
}
