//! The devices of a transport: opened once, the arena registered with each, their events watched.

use super::arena::{ArenaOptions, LocalArena, NotRegistered};
use super::verbs::{AsyncEvent, AsyncEvents, Context, Port, ProtectionDomain, VerbsError};
use baton_types::ArenaView;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio_util::sync::CancellationToken;

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum DeviceError {
    #[error("this host has no rdma device")]
    None,
    #[error("there is no rdma device `{name}`: there are {have:?}")]
    Unknown { name: String, have: Vec<String> },
    #[error("rdma device {name}: {source}")]
    Verbs { name: String, source: VerbsError },
    #[error("rdma device {name}: {source}")]
    Arena { name: String, source: NotRegistered },
}

/// One device.
pub(super) struct Device {
    context: Arc<Context>,
    domain: Arc<ProtectionDomain>,
    arena: LocalArena,
    /// Queue pairs by number, and what ends their connections.
    pairs: Mutex<HashMap<u32, CancellationToken>>,
    queues: AtomicUsize,
}

impl Device {
    /// Opens those named, or all that there are, and registers the arena with each. Takes a while for a large arena.
    ///
    /// # Errors
    /// No devices, unknown names, and what a device says.
    pub(super) fn open_all(
        names: &[String],
        arena: &ArenaView,
        options: &ArenaOptions,
    ) -> Result<Vec<Arc<Self>>, DeviceError> {
        let have = Context::names().map_err(|source| DeviceError::Verbs {
            name: "list".to_owned(),
            source,
        })?;
        if have.is_empty() {
            return Err(DeviceError::None);
        }
        let wanted = if names.is_empty() { &have } else { names };
        wanted
            .iter()
            .map(|name| Self::open(name, &have, arena, options).map(Arc::new))
            .collect()
    }

    fn open(name: &str, have: &[String], arena: &ArenaView, options: &ArenaOptions) -> Result<Self, DeviceError> {
        let named = |source| DeviceError::Verbs {
            name: name.to_owned(),
            source,
        };
        let context = Context::open(name)
            .map_err(named)?
            .ok_or_else(|| DeviceError::Unknown {
                name: name.to_owned(),
                have: have.to_vec(),
            })?;
        let domain = ProtectionDomain::new(&context).map_err(named)?;
        let arena = LocalArena::register(&domain, arena, options).map_err(|source| DeviceError::Arena {
            name: name.to_owned(),
            source,
        })?;
        tracing::info!(device = name, registration = ?arena.registration(), "rdma device opened");
        Ok(Self {
            context,
            domain,
            arena,
            pairs: Mutex::default(),
            queues: AtomicUsize::new(0),
        })
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(super) fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    pub(super) fn arena(&self) -> &LocalArena {
        &self.arena
    }

    /// Its port, where one is active now.
    pub(super) fn port(&self) -> Option<Port> {
        self.context.active_port().unwrap_or_else(|error| {
            tracing::warn!(device = self.context.name(), %error, "cannot ask the device for its ports");
            None
        })
    }

    /// Counts its completion queues, to spread them over interrupts.
    pub(super) fn next_queue(&self) -> usize {
        self.queues.fetch_add(1, Ordering::Relaxed)
    }

    /// Cancelled when the device says that this queue pair, its port or all of it failed.
    pub(super) fn watch_pair(self: &Arc<Self>, number: u32) -> PairWatch {
        let failed = CancellationToken::new();
        self.pairs().insert(number, failed.clone());
        PairWatch {
            device: Arc::clone(self),
            number,
            failed,
        }
    }

    /// Ends connections as the device's events demand, until the device gives no events any more.
    pub(super) async fn watch(&self) {
        let device = self.context.name();
        let events = match AsyncEvents::of(&self.context) {
            Ok(events) => events,
            Err(error) => {
                tracing::warn!(device, %error, "the device's events cannot be watched");
                return;
            }
        };
        loop {
            match events.next().await {
                Ok(AsyncEvent::PortDown) => {
                    tracing::warn!(device, "the port lost its link: its connections end");
                    self.pairs().values().for_each(CancellationToken::cancel);
                }
                Ok(AsyncEvent::DeviceFailed) => {
                    tracing::error!(device, "the device failed: its connections end");
                    self.pairs().values().for_each(CancellationToken::cancel);
                }
                Ok(AsyncEvent::QueuePairFailed { number }) => {
                    tracing::warn!(device, number, "a queue pair failed: its connection ends");
                    if let Some(failed) = self.pairs().get(&number) {
                        failed.cancel();
                    }
                }
                Ok(AsyncEvent::Other { kind }) => tracing::debug!(device, kind, "event of the device"),
                Err(error) => {
                    tracing::error!(device, %error, "the device gives no events any more");
                    return;
                }
            }
        }
    }

    fn pairs(&self) -> MutexGuard<'_, HashMap<u32, CancellationToken>> {
        // No code that can panic runs under this lock, so what it guards is whole.
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device's word on one queue pair.
pub(super) struct PairWatch {
    device: Arc<Device>,
    number: u32,
    failed: CancellationToken,
}

impl PairWatch {
    pub(super) async fn failed(&self) {
        self.failed.cancelled().await;
    }
}

impl Drop for PairWatch {
    fn drop(&mut self) {
        self.device.pairs().remove(&self.number);
    }
}

/// The device for a peer's address: one in the same subnet before any other, which the longest common beginning of the two
/// addresses tells; among equals, by turns.
pub(super) fn nearest(ports: &[(usize, Port)], peer: &[u8; 16], turn: usize) -> Option<(usize, Port)> {
    let common = |port: &Port| {
        let mut differ = port.gid.iter().zip(peer).map(|(a, b)| (a ^ b).leading_zeros());
        let whole = differ.clone().take_while(|bits| *bits == 8).count();
        whole as u32 * 8 + differ.nth(whole).unwrap_or(0)
    };
    // Beyond 120 bits they are neighbours all the same: /24 of an IPv4 network.
    let rank = |port: &Port| common(port).min(120);
    let best = ports.iter().map(|(_, port)| rank(port)).max()?;
    let equal: Vec<_> = ports.iter().filter(|(_, port)| rank(port) == best).collect();
    equal.get(turn % equal.len()).map(|found| **found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(address: [u8; 4]) -> Port {
        let mut gid = [0; 16];
        gid[10..12].copy_from_slice(&[0xff; 2]);
        gid[12..].copy_from_slice(&address);
        Port {
            number: 1,
            gid_index: 1,
            gid,
            lid: 0,
            mtu: 5,
            message_bytes: 1 << 23,
        }
    }

    #[test]
    fn the_same_subnet_comes_first_and_equals_take_turns() {
        let ports = [
            (0, port([10, 1, 0, 1])),
            (1, port([10, 2, 0, 1])),
            (2, port([10, 2, 0, 7])),
        ];
        let choose = |address, turn| nearest(&ports, &port(address).gid, turn).map(|(index, _)| index);
        assert_eq!(choose([10, 1, 0, 9], 0), Some(0));
        assert_eq!(choose([10, 1, 0, 9], 1), Some(0));
        assert_eq!(choose([10, 2, 0, 9], 0), Some(1));
        assert_eq!(choose([10, 2, 0, 9], 1), Some(2));
        assert_eq!(nearest(&[], &[0; 16], 0), None);
    }
}
