//! The receiver's half that all transports share: the living connections of writers, and their orderly end.
//!
//! Invariant: [`Landing::closed`] is called exactly once per connection (save one abandoned at the process's end), after its receiving task dropped every claim and its
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
    /// An earlier connection of that writer is still being ended.
    Leaving,
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
        self.enter_book(self.book(), instance)
    }

    /// As [`Self::enter`], but not while another connection of that writer is being ended.
    pub(super) fn enter_unless_leaving(self: &Arc<Self>, instance: Instance) -> Result<WriterEntry, NoEntry> {
        let book = self.book();
        let mut of_it = book.living.values().filter(|living| living.instance == instance);
        if of_it.any(|living| living.stop.is_cancelled()) && !self.stop.is_cancelled() {
            return Err(NoEntry::Leaving);
        }
        self.enter_book(book, instance)
    }

    fn enter_book(
        self: &Arc<Self>,
        mut book: MutexGuard<'_, Book>,
        instance: Instance,
    ) -> Result<WriterEntry, NoEntry> {
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
            state: EntryState::Over,
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

/// What the drop of an entry means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EntryState {
    /// The connection is over: nothing is written through it any more.
    Over,
    /// The writer has memory of ours.
    Lent,
    /// It has, and nobody cares any more.
    Abandoned,
}

/// One living connection, kept by its receiving task.
pub(super) struct WriterEntry {
    writers: Arc<Writers>,
    from: WriterConnection,
    stop: CancellationToken,
    state: EntryState,
}

impl WriterEntry {
    /// The writer is given memory that cannot be taken back from it: from now on the end of the task proves nothing.
    pub(super) fn lend(&mut self) {
        self.state = EntryState::Lent;
    }

    /// It is proven that this writer writes no more.
    pub(super) fn given_back(&mut self) {
        self.state = EntryState::Over;
    }

    /// Nothing is proven and this process ends: nobody is to wait any longer.
    pub(super) fn abandon(mut self) {
        self.state = EntryState::Abandoned;
    }

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
        match self.state {
            EntryState::Over => self.writers.landing.closed(&self.from),
            EntryState::Abandoned => {}
            // The task panicked. The writer stays in the book: who waits for its end goes on waiting.
            EntryState::Lent => return,
        }
        let mut book = self.writers.book();
        let living = book.living.remove(&self.from.connection);
        metric::writers(self.writers.path, book.living.len());
        drop(book);
        if let Some(living) = living {
            living.ended.cancel();
        }
    }
}
