//! Every task of a process runs under its supervisor, which counts and names the tasks, ends them together, and turns a
//! panic in any of them into an orderly end of the process: a task that is missing would be a request that hangs.
//! The supervisor owns the set of living tasks and the shutdown token.

use futures::FutureExt;
use std::any::Any;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinHandle};
use tokio_util::sync::CancellationToken;

/// The tasks of one process. Clones share them.
#[derive(Clone, Default)]
pub struct Supervisor(Arc<Shared>);

#[derive(Default)]
struct Shared {
    next: AtomicU64,
    tasks: Mutex<BTreeMap<u64, &'static str>>,
    ended: Notify,
    shutdown: CancellationToken,
    fatal: Mutex<Option<String>>,
}

/// A running task. Dropping the handle lets the task run on.
pub struct TaskHandle {
    name: &'static str,
    abort: AbortHandle,
    join: JoinHandle<()>,
}

/// A running thread. Dropping the handle lets it run on.
pub struct ThreadHandle {
    ended: CancellationToken,
}

impl ThreadHandle {
    /// Waits for its end, whether it returned or panicked. Cancel safe.
    pub async fn join(&self) {
        self.ended.cancelled().await;
    }
}

/// Takes the task off the books when it ends, however it ends.
struct Entry {
    shared: Arc<Shared>,
    id: u64,
}

impl Supervisor {
    /// One without tasks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `future` as a task. It should end soon after [`Self::shutdown_token`] is cancelled.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn spawn(&self, name: &'static str, future: impl Future<Output = ()> + Send + 'static) -> TaskHandle {
        let entry = self.enter(name);
        let this = self.clone();
        let join = tokio::spawn(async move {
            // Declared before the future is polled, hence dropped after it: whoever joins finds its resources given back.
            let _entry = entry;
            if let Err(panic) = AssertUnwindSafe(future).catch_unwind().await {
                this.panicked(name, panic);
            }
        });
        TaskHandle {
            name,
            abort: join.abort_handle(),
            join,
        }
    }

    /// Runs `work` on a thread where it may block. It cannot be aborted once it runs.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn spawn_blocking(&self, name: &'static str, work: impl FnOnce() + Send + 'static) -> TaskHandle {
        let entry = self.enter(name);
        let this = self.clone();
        let join = tokio::task::spawn_blocking(move || {
            let _entry = entry;
            if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(work)) {
                this.panicked(name, panic);
            }
        });
        TaskHandle {
            name,
            abort: join.abort_handle(),
            join,
        }
    }

    /// Runs `work` on a thread of its own, inside the present runtime: for work that polls or waits in the system for as long
    /// as it lives, of which a runtime has too few threads. It cannot be aborted.
    ///
    /// # Errors
    /// The system gives no thread.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn spawn_thread(&self, name: &'static str, work: impl FnOnce() + Send + 'static) -> io::Result<ThreadHandle> {
        let entry = self.enter(name);
        let (this, runtime) = (self.clone(), tokio::runtime::Handle::current());
        let ended = CancellationToken::new();
        let end = ended.clone().drop_guard();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Dropped last, in this order: whoever joins finds the books right and what the thread held given back.
            let _end = end;
            let _entry = entry;
            let _inside = runtime.enter();
            if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(work)) {
                this.panicked(name, panic);
            }
        })?;
        Ok(ThreadHandle { ended })
    }

    /// How many tasks are alive.
    pub fn tasks(&self) -> usize {
        self.0.tasks().len()
    }

    /// The names of the tasks that are alive, oldest first.
    pub fn task_names(&self) -> Vec<&'static str> {
        self.0.tasks().values().copied().collect()
    }

    /// Cancelled when the process is to end.
    pub fn shutdown_token(&self) -> CancellationToken {
        self.0.shutdown.clone()
    }

    /// Asks every task to end.
    pub fn begin_shutdown(&self) {
        self.0.shutdown.cancel();
    }

    /// Asks every task to end because the process cannot go on; [`Self::fatal`] tells the first reason given.
    pub fn fail(&self, reason: impl Into<String>) {
        lock(&self.0.fatal).get_or_insert(reason.into());
        self.begin_shutdown();
    }

    /// Why the process cannot go on; none while it can.
    pub fn fatal(&self) -> Option<String> {
        lock(&self.0.fatal).clone()
    }

    /// Waits until no task is left.
    ///
    /// # Errors
    /// The names of the tasks that still run after `deadline`.
    pub async fn join(&self, deadline: Duration) -> Result<(), Vec<&'static str>> {
        let all_ended = async {
            loop {
                let ended = self.0.ended.notified();
                tokio::pin!(ended);
                // Listens before it looks, so that an end in between is not missed.
                ended.as_mut().enable();
                if self.tasks() == 0 {
                    return;
                }
                ended.await;
            }
        };
        match tokio::time::timeout(deadline, all_ended).await {
            Ok(()) => Ok(()),
            Err(_) => match self.task_names() {
                names if names.is_empty() => Ok(()),
                names => Err(names),
            },
        }
    }

    fn enter(&self, name: &'static str) -> Entry {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        self.0.tasks().insert(id, name);
        Entry {
            shared: Arc::clone(&self.0),
            id,
        }
    }

    fn panicked(&self, name: &'static str, panic: Box<dyn Any + Send>) {
        let message = panic_message(&*panic);
        metrics::counter!("baton_runtime_task_panics_total").increment(1);
        tracing::error!(task = name, error = message, "task panicked");
        self.fail(format!("task {name} panicked: {message}"));
    }
}

impl TaskHandle {
    /// What the task is called.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Ends the task at its next await. Does not wait for it.
    pub fn abort(&self) {
        self.abort.abort();
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.join.is_finished()
    }

    /// Waits for its end, whether it returned, panicked or was aborted.
    pub async fn join(self) {
        // A panic was caught and reported inside, so what is left of an error here is cancellation: an end like another.
        let _ = self.join.await;
    }
}

impl Shared {
    fn tasks(&self) -> MutexGuard<'_, BTreeMap<u64, &'static str>> {
        lock(&self.tasks)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.shared.tasks().remove(&self.id);
        self.shared.ended.notify_waiters();
    }
}

/// What a panic said.
pub(crate) fn panic_message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// No code that can panic runs under these locks, so what they guard is whole even where the lock says otherwise.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn counts_names_and_joins() {
        let supervisor = Supervisor::new();
        let token = supervisor.shutdown_token();
        let task = supervisor.spawn("waiter", async move { token.cancelled().await });
        assert_eq!(supervisor.tasks(), 1);
        assert_eq!(task.name(), "waiter");
        supervisor.begin_shutdown();
        assert_eq!(supervisor.join(Duration::from_secs(5)).await, Ok(()));
        task.join().await;
        assert_eq!(supervisor.fatal(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn names_what_does_not_end() {
        let supervisor = Supervisor::new();
        let stuck = supervisor.spawn("stuck", std::future::pending());
        assert_eq!(supervisor.join(Duration::from_secs(1)).await, Err(vec!["stuck"]));
        stuck.abort();
        assert_eq!(supervisor.join(Duration::from_secs(1)).await, Ok(()));
    }

    #[tokio::test]
    async fn a_panic_ends_the_process_in_order() {
        let supervisor = Supervisor::new();
        supervisor.spawn("bad", async { panic!("no {}", "way") }).join().await;
        supervisor.shutdown_token().cancelled().await;
        assert_eq!(supervisor.fatal().as_deref(), Some("task bad panicked: no way"));
        assert_eq!(supervisor.join(Duration::from_secs(5)).await, Ok(()));
    }

    #[tokio::test]
    async fn blocking_work_is_supervised_too() {
        let supervisor = Supervisor::new();
        supervisor.spawn_blocking("thread", || panic!("oh")).join().await;
        assert_eq!(supervisor.fatal().as_deref(), Some("task thread panicked: oh"));
        assert_eq!(supervisor.tasks(), 0);
    }

    #[tokio::test]
    async fn threads_are_supervised_too() {
        let supervisor = Supervisor::new();
        let inside = supervisor.clone();
        let work = move || drop(inside.spawn("from a thread", async {}));
        supervisor.spawn_thread("thread", work).unwrap().join().await;
        assert_eq!(supervisor.fatal(), None);
        supervisor.spawn_thread("bad", || panic!("oh")).unwrap().join().await;
        assert_eq!(supervisor.fatal().as_deref(), Some("task bad panicked: oh"));
        assert_eq!(supervisor.join(Duration::from_secs(5)).await, Ok(()));
    }

    #[tokio::test]
    async fn a_joined_task_has_dropped_what_it_held() {
        let supervisor = Supervisor::new();
        let held = Arc::new(());
        let inside = Arc::clone(&held);
        let task = supervisor.spawn("holder", async move {
            let _inside = inside;
            std::future::pending::<()>().await;
        });
        tokio::task::yield_now().await;
        task.abort();
        assert_eq!(supervisor.join(Duration::from_secs(5)).await, Ok(()));
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
