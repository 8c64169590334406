//! The receiver's half that all transports share: the living connections of writers, and their orderly end.
//!
//! Invariant: [`Landing::closed`] is called exactly once per connection, after its receiving task dropped every claim and its
//! socket, whether the task returned, was stopped or panicked. A receiving task keeps its [`WriterEntry`] and declares it
//! before anything that holds a claim or the socket, so that it drops last.

use super::{Landing, WriterConnection, metric};
use crate::PathKind;
use baton_types::Instance;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio_util::sync::CancellationToken;

/// Connections of all writers together. Each costs a task and a descriptor.
pub(super) const CONNECTIONS_MAX: usize = 4096;

/// Why a writer is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoEntry {
    Full,
    ShuttingDown,
}

struct Living {
    instance: Instance,
    stop: CancellationToken,
    ended: CancellationToken,
}

#[derive(Default)]
struct Book {
    last: u64,
    living: HashMap<u64, Living>,
}

/// The living connections of writers to one transport.
pub(super) struct Writers {
    path: PathKind,
    landing: Arc<dyn Landing>,
    /// Cancelled when nobody is let in any more.
    stop: CancellationToken,
    book: Mutex<Book>,
}

impl Writers {
    pub(super) fn new(path: PathKind, landing: Arc<dyn Landing>) -> Arc<Self> {
        metric::describe();
        Arc::new(Self {
            path,
            landing,
            stop: CancellationToken::new(),
            book: Mutex::default(),
        })
    }

    /// Lets a connection in that has shaken hands.
    pub(super) fn enter(self: &Arc<Self>, instance: Instance) -> Result<WriterEntry, NoEntry> {
        let mut book = self.book();
        if self.stop.is_cancelled() {
            return Err(NoEntry::ShuttingDown);
        }
        if book.living.len() >= CONNECTIONS_MAX {
            return Err(NoEntry::Full);
        }
        book.last += 1;
        let from = WriterConnection {
            instance,
            connection: book.last,
        };
        let (stop, ended) = (CancellationToken::new(), CancellationToken::new());
        book.living.insert(
            from.connection,
            Living {
                instance,
                stop: stop.clone(),
                ended,
            },
        );
        metric::writers(self.path, book.living.len());
        Ok(WriterEntry {
            writers: Arc::clone(self),
            from,
            stop,
        })
    }

    /// Ends every connection of one writer, or of all, and waits for their tasks.
    pub(super) async fn disconnect(&self, which: Option<Instance>) {
        let ends: Vec<CancellationToken> = self
            .book()
            .living
            .values()
            .filter(|living| which.is_none_or(|instance| instance == living.instance))
            .map(|living| {
                living.stop.cancel();
                living.ended.clone()
            })
            .collect();
        for ended in ends {
            ended.cancelled().await;
        }
    }

    /// Lets nobody in any more, and begins to end all connections.
    pub(super) fn stop(&self) {
        let book = self.book();
        self.stop.cancel();
        book.living.values().for_each(|living| living.stop.cancel());
    }

    /// Lets nobody in any more, and ends all connections.
    pub(super) async fn shutdown(&self) {
        self.stop();
        self.disconnect(None).await;
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // No code that can panic runs under this lock, so what it guards is whole.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One living connection, kept by its receiving task.
pub(super) struct WriterEntry {
    writers: Arc<Writers>,
    from: WriterConnection,
    stop: CancellationToken,
}

impl WriterEntry {
    pub(super) fn from(&self) -> &WriterConnection {
        &self.from
    }

    /// Cancelled when the connection is to be closed.
    pub(super) fn stopped(&self) -> &CancellationToken {
        &self.stop
    }

    pub(super) fn landing(&self) -> &dyn Landing {
        &*self.writers.landing
    }
}

impl Drop for WriterEntry {
    fn drop(&mut self) {
        self.writers.landing.closed(&self.from);
        let mut book = self.writers.book();
        let living = book.living.remove(&self.from.connection);
        metric::writers(self.writers.path, book.living.len());
        drop(book);
        if let Some(living) = living {
            living.ended.cancel();
        }
    }
}
