//! Word that who is there, or how loaded they are, has changed. Whoever waits longest hears first, so that a run of the same
//! events is the same run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::Notify;

/// Tells. Clones are one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Changes(Arc<Told>);

#[derive(Debug, Default)]
struct Told {
    version: AtomicU64,
    told: Notify,
}

/// Listens.
#[derive(Debug)]
pub(crate) struct Listener {
    changes: Changes,
    seen: u64,
}

impl Changes {
    /// Something changed.
    pub(crate) fn tell(&self) {
        self.0.version.fetch_add(1, Ordering::Release);
        self.0.told.notify_waiters();
    }

    /// Listens from now on.
    pub(crate) fn listen(&self) -> Listener {
        Listener {
            changes: self.clone(),
            seen: self.version(),
        }
    }

    fn version(&self) -> u64 {
        self.0.version.load(Ordering::Acquire)
    }
}

impl Listener {
    /// What has changed up to now is known.
    pub(crate) fn mark_unchanged(&mut self) {
        self.seen = self.changes.version();
    }

    /// Waits for a change that is not known.
    pub(crate) async fn changed(&mut self) {
        loop {
            let told = self.changes.0.told.notified();
            let mut told = std::pin::pin!(told);
            // In line before the look, so that no change falls between the two.
            told.as_mut().enable();
            let version = self.changes.version();
            if version != self.seen {
                self.seen = version;
                return;
            }
            told.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn a_change_is_heard_once_and_never_missed() {
        let changes = Changes::default();
        let mut listener = changes.listen();
        assert!(listener.changed().now_or_never().is_none());
        changes.tell();
        changes.tell();
        listener.changed().await;
        assert!(listener.changed().now_or_never().is_none());
        changes.tell();
        listener.mark_unchanged();
        assert!(listener.changed().now_or_never().is_none());
        let mut waiting = Box::pin(listener.changed());
        assert!(waiting.as_mut().now_or_never().is_none());
        changes.tell();
        waiting.await;
    }
}
