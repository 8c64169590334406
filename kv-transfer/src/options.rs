//! The endpoint's limits and addresses. None of them is infinite.

use crate::{PathKind, StartError};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

/// How an endpoint listens and what it bounds.
#[derive(Debug, Clone)]
pub struct EndpointOptions {
    /// Where control connections and data arrive. Port 0 lets the system choose.
    pub listen: SocketAddr,
    /// The host that peers are told, where it is not the one listened on.
    pub advertise: Option<String>,
    /// What to offer and use.
    pub transports: Vec<PathKind>,
    /// Leave out those of `transports` that this build or host does not have, instead of refusing to start.
    pub skip_unavailable: bool,
    /// Send over this kind of path only, and fail where it cannot be had. It must be among `transports`.
    pub require_path: Option<PathKind>,
    /// RDMA devices to use by name; all that are active where none is named.
    pub rdma_devices: Vec<String>,
    /// Data connections per pair of processes; see [`default_connections`].
    pub connections_per_peer: usize,
    /// Check each extent's CRC32C on tcp.
    pub crc: bool,
    /// As a sender, tell a digest of everything that was sent, to be compared before the commit. Received ones are always
    /// compared.
    pub digest: bool,
    /// A grant without progress for this long is aborted (never freed).
    pub reservation_lease: Duration,
    /// How long a sender may take to prove that an epoch is over before its connections are destroyed.
    pub fence_timeout: Duration,
    /// Reserved plus quarantined blocks of one peer, as a share of the arena.
    pub quarantine_share: f32,
    /// Bound on connecting, handshake included.
    pub connect_timeout: Duration,
    /// Bound on each step of the peer: an answer to a control message, a write's way into the wire.
    pub progress_timeout: Duration,
    /// Bytes under way on one path at once; what is more waits for its turn.
    pub bytes_in_flight_max: usize,
    /// Hand-overs at once, each direction.
    pub handovers_max: usize,
    /// Silence after which a keep-alive is sent; twice that and the peer is dead.
    pub keep_alive: Duration,
}

impl Default for EndpointOptions {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: None,
            transports: vec![PathKind::Tcp],
            skip_unavailable: false,
            require_path: None,
            rdma_devices: Vec::new(),
            connections_per_peer: default_connections(),
            crc: true,
            digest: false,
            reservation_lease: Duration::from_secs(10),
            fence_timeout: Duration::from_secs(2),
            quarantine_share: 0.25,
            connect_timeout: Duration::from_secs(1),
            progress_timeout: Duration::from_secs(10),
            bytes_in_flight_max: 32 << 20,
            handovers_max: 4096,
            keep_alive: Duration::from_secs(2),
        }
    }
}

/// One data connection for each four cores, at most four: each has a thread at both ends that is busy while bytes flow, and
/// where those threads share cores, one connection is faster than two (on two cores 4.2 against 3.0 GB/s over loopback).
#[must_use]
pub fn default_connections() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (cores / 4).clamp(1, 4)
}

impl EndpointOptions {
    pub(crate) fn validate(&self) -> Result<(), StartError> {
        let check = |ok: bool, option, value: String, reason| {
            if ok {
                Ok(())
            } else {
                Err(StartError::Option { option, value, reason })
            }
        };
        check(
            !self.transports.is_empty(),
            "transports",
            String::new(),
            "at least one is needed",
        )?;
        let required = self.require_path.filter(|path| !self.transports.contains(path));
        check(
            required.is_none(),
            "require_path",
            required.map_or_else(String::new, |path| path.to_string()),
            "it must be among the transports",
        )?;
        let n = self.connections_per_peer;
        check(
            (1..=64).contains(&n),
            "connections_per_peer",
            n.to_string(),
            "it must be 1 to 64",
        )?;
        let share = self.quarantine_share;
        check(
            share > 0.0 && share <= 1.0,
            "quarantine_share",
            share.to_string(),
            "it must be above 0 and at most 1",
        )?;
        let n = self.handovers_max;
        check(
            (1..=1 << 20).contains(&n),
            "handovers_max",
            n.to_string(),
            "it must be 1 to 1048576",
        )?;
        for (option, bound) in [
            ("reservation_lease", self.reservation_lease),
            ("fence_timeout", self.fence_timeout),
            ("connect_timeout", self.connect_timeout),
            ("progress_timeout", self.progress_timeout),
            ("keep_alive", self.keep_alive),
        ] {
            let within = bound >= Duration::from_millis(1) && bound <= Duration::from_secs(3600);
            check(within, option, format!("{bound:?}"), "it must be 1ms to 1h")?;
        }
        Ok(())
    }
}
