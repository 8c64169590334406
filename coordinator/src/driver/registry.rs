//! The requests that run, by name, so that they can be cancelled and counted.

use baton_node_runtime::CancellationToken;
use baton_types::RequestId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// All of them. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Registry(Arc<Mutex<HashMap<RequestId, CancellationToken>>>);

/// One request's entry, taken out when dropped.
pub(super) struct Entry {
    registry: Registry,
    request_id: RequestId,
}

impl Registry {
    /// Counts all.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.lock().len()).unwrap_or(u32::MAX)
    }

    /// Enters a request where fewer than `max` are there, `None` where that many are; the token cancels it.
    pub(super) fn enter(&self, request_id: RequestId, max: u32, token: CancellationToken) -> Option<Entry> {
        let mut requests = self.lock();
        if requests.len() >= max as usize {
            return None;
        }
        requests.insert(request_id, token);
        show(requests.len());
        Some(Entry {
            registry: self.clone(),
            request_id,
        })
    }

    /// False: no such request runs.
    pub(super) fn cancel(&self, request_id: RequestId) -> bool {
        let token = self.lock().get(&request_id).cloned();
        token.is_some_and(|token| {
            token.cancel();
            true
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, CancellationToken>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// Takes the request off the books; dropping does the same.
    pub(super) fn leave(&self) {
        let mut requests = self.registry.lock();
        requests.remove(&self.request_id);
        show(requests.len());
    }
}

fn show(requests: usize) {
    metrics::gauge!("baton_coordinator_requests").set(requests as f64);
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.leave();
    }
}
