//! Leases and the keys that hang on them. No clock: every call is told the time.

use super::refusal::Refusal;
use baton_node_runtime::Moment;
use baton_types::fill_random;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// As in etcd: 9 billion seconds.
const TTL_SECONDS_MAX: i64 = 9_000_000_000;

#[derive(Debug)]
struct Lease {
    ttl_seconds: i64,
    expires: Moment,
    keys: BTreeSet<Vec<u8>>,
}

/// What a lease is at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LeaseView {
    pub(super) granted_seconds: i64,
    pub(super) left_seconds: i64,
    pub(super) keys: Vec<Vec<u8>>,
}

#[derive(Debug, Default)]
pub(super) struct Leases {
    leases: BTreeMap<i64, Lease>,
    due: BTreeSet<(Moment, i64)>,
}

fn expiry(now: Moment, ttl_seconds: i64) -> Moment {
    now + Duration::from_secs(ttl_seconds.unsigned_abs())
}

impl Leases {
    /// Grants a lease; `id` 0 lets the store choose. Gives id and granted seconds.
    pub(super) fn grant(&mut self, id: i64, ttl_seconds: i64, now: Moment) -> Result<(i64, i64), Refusal> {
        if ttl_seconds > TTL_SECONDS_MAX {
            return Err(Refusal::LeaseTtlTooLarge);
        }
        let id = if id == 0 { self.free_id() } else { id };
        if self.leases.contains_key(&id) {
            return Err(Refusal::LeaseExists);
        }
        let ttl_seconds = ttl_seconds.max(1);
        let expires = expiry(now, ttl_seconds);
        self.leases.insert(
            id,
            Lease {
                ttl_seconds,
                expires,
                keys: BTreeSet::new(),
            },
        );
        self.due.insert((expires, id));
        Ok((id, ttl_seconds))
    }

    /// Renews a lease; `None` where it is unknown.
    pub(super) fn keep_alive(&mut self, id: i64, now: Moment) -> Option<i64> {
        let lease = self.leases.get_mut(&id)?;
        self.due.remove(&(lease.expires, id));
        lease.expires = expiry(now, lease.ttl_seconds);
        self.due.insert((lease.expires, id));
        Some(lease.ttl_seconds)
    }

    /// Ends a lease; gives the keys that hung on it.
    pub(super) fn revoke(&mut self, id: i64) -> Option<BTreeSet<Vec<u8>>> {
        let lease = self.leases.remove(&id)?;
        self.due.remove(&(lease.expires, id));
        Some(lease.keys)
    }

    /// The leases that have run out.
    pub(super) fn expired(&self, now: Moment) -> Vec<i64> {
        self.due
            .iter()
            .take_while(|(expires, _)| *expires <= now)
            .map(|(_, id)| *id)
            .collect()
    }

    /// When the next one runs out.
    pub(super) fn next_expiry(&self) -> Option<Moment> {
        self.due.first().map(|(expires, _)| *expires)
    }

    pub(super) fn contains(&self, id: i64) -> bool {
        self.leases.contains_key(&id)
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = i64> {
        self.leases.keys().copied()
    }

    pub(super) fn view(&self, id: i64, now: Moment) -> Option<LeaseView> {
        let lease = self.leases.get(&id)?;
        let left = lease.expires.saturating_since(now).as_secs();
        Some(LeaseView {
            granted_seconds: lease.ttl_seconds,
            left_seconds: i64::try_from(left).unwrap_or(i64::MAX),
            keys: lease.keys.iter().cloned().collect(),
        })
    }

    /// Moves a key from the lease that it hung on to another; 0 is none.
    pub(super) fn attach(&mut self, key: &[u8], from: i64, to: i64) {
        if let Some(lease) = self.leases.get_mut(&from) {
            lease.keys.remove(key);
        }
        if let Some(lease) = self.leases.get_mut(&to) {
            lease.keys.insert(key.to_vec());
        }
    }

    fn free_id(&self) -> i64 {
        loop {
            let mut bytes = [0; 8];
            fill_random(&mut bytes);
            let id = i64::from_be_bytes(bytes) & i64::MAX;
            if id != 0 && !self.leases.contains_key(&id) {
                return id;
            }
        }
    }
}
