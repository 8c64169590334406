//! The last requests, as a controller wants to know them. Each request's task writes its own entry; whoever looks reads all.
//! Bounded by time and by count; where no controller runs there is no record, and all of this does nothing.

use baton_node_runtime::Moment;
use baton_planner::Nanos;
use baton_planner::control::Past;
use baton_types::BlockHash;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// More requests than this are not kept, however short the time is in which they came.
const REQUESTS_MAX: usize = 16_384;
/// Blocks of all their prompts, 16 bytes each; prompts beyond are kept without their blocks.
const BLOCKS_MAX: usize = 1 << 20;

/// The last requests. Clones share them; the default keeps none.
#[derive(Clone, Default)]
pub(crate) struct Record(Option<Arc<Inner>>);

struct Inner {
    began: Moment,
    window: Duration,
    /// Gaps between tokens beyond this are late.
    itl: Option<Duration>,
    log: Mutex<Log>,
    /// Of all prompts that are kept.
    blocks: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Log {
    /// In the order in which they came, about.
    last: VecDeque<Arc<Entry>>,
    /// Those that came before, and are not over.
    open: Vec<Arc<Entry>>,
}

/// One request.
struct Entry {
    at: Moment,
    model: String,
    known: Mutex<Known>,
    blocks: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Known {
    input: u32,
    tokens: u32,
    ttft: Option<Duration>,
    last: Option<Moment>,
    late: f64,
    fate: Fate,
    chain: Vec<BlockHash>,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Fate {
    #[default]
    Open,
    Done,
    /// It was refused, or failed.
    Lost,
    /// Its client is at fault, or went away before there was a token: it says nothing.
    Void,
}

/// One request's place in the record. Dropped before its end is told, the request says nothing.
pub(crate) struct Recording(Option<Arc<Entry>>);

/// What the record shows, in the words of a controller's observation.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Seen {
    pub(crate) past: Vec<Past>,
    pub(crate) open: Vec<Past>,
    pub(crate) chains: Vec<Vec<u32>>,
}

impl Record {
    /// Keeps those of the last `window`.
    pub(crate) fn new(began: Moment, window: Duration, itl: Option<Duration>) -> Self {
        Self(Some(Arc::new(Inner {
            began,
            window,
            itl,
            log: Mutex::default(),
            blocks: Arc::default(),
        })))
    }

    /// A request came; its prompt has about so many tokens, of which `input` is asked where there is a record.
    pub(crate) fn arrived(&self, at: Moment, model: &str, input: impl FnOnce() -> u32) -> Recording {
        let Some(inner) = &self.0 else { return Recording(None) };
        let entry = Arc::new(Entry {
            at,
            model: model.to_owned(),
            known: Mutex::new(Known {
                input: input(),
                ..Known::default()
            }),
            blocks: Arc::clone(&inner.blocks),
        });
        let mut log = lock(&inner.log);
        log.forget(at, inner.window);
        log.last.push_back(Arc::clone(&entry));
        Recording(Some(entry))
    }

    /// The last requests for a model, as of `now`. Takes time in proportion to them: not for a thread that serves.
    pub(crate) fn look(&self, now: Moment, model: &str) -> Seen {
        let Some(inner) = &self.0 else { return Seen::default() };
        let (last, open) = {
            let mut log = lock(&inner.log);
            log.forget(now, inner.window);
            log.open.retain(|entry| lock(&entry.known).fate == Fate::Open);
            let of_model = |entries: &mut dyn Iterator<Item = &Arc<Entry>>| -> Vec<Arc<Entry>> {
                entries.filter(|entry| entry.model == model).cloned().collect()
            };
            (of_model(&mut log.last.iter()), of_model(&mut log.open.iter()))
        };
        let mut past: Vec<(Past, bool, Vec<BlockHash>)> = Vec::with_capacity(last.len());
        for entry in &last {
            let known = lock(&entry.known);
            if known.fate != Fate::Void {
                past.push((inner.past(entry, &known), known.fate == Fate::Open, known.chain.clone()));
            }
        }
        // Tasks that came at once may have entered in another order.
        past.sort_by_key(|(past, ..)| past.at);
        let before = open.iter().map(|entry| inner.past(entry, &lock(&entry.known)));
        let mut seen = Seen {
            open: before
                .chain(past.iter().filter(|(_, open, _)| *open).map(|(past, ..)| *past))
                .collect(),
            ..Seen::default()
        };
        let mut names: HashMap<BlockHash, u32> = HashMap::new();
        for (past, _, chain) in past {
            let name = |hash| {
                let next = u32::try_from(names.len()).unwrap_or(u32::MAX);
                *names.entry(hash).or_insert(next)
            };
            seen.chains.push(chain.into_iter().map(name).collect());
            seen.past.push(past);
        }
        seen
    }

    /// A moment, as observations count time.
    pub(crate) fn nanos(&self, moment: Moment) -> Nanos {
        self.0.as_ref().map_or(Nanos::ZERO, |inner| inner.nanos(moment))
    }

    fn itl(&self) -> Option<Duration> {
        self.0.as_ref()?.itl
    }
}

impl Inner {
    fn nanos(&self, moment: Moment) -> Nanos {
        nanos(moment.saturating_since(self.began))
    }

    fn past(&self, entry: &Entry, known: &Known) -> Past {
        let done = known.fate == Fate::Done;
        let gaps = f64::from(known.tokens.saturating_sub(1)).max(1.0);
        let whole = known.last.map(|last| nanos(last.saturating_since(entry.at)));
        Past {
            at: self.nanos(entry.at),
            input: known.input,
            tokens: known.tokens,
            output: done.then_some(known.tokens),
            ttft: known.ttft.map(nanos),
            e2e: whole.filter(|_| done),
            late_gaps: if done { known.late / gaps } else { 0.0 },
            lost: known.fate == Fate::Lost,
        }
    }
}

impl Log {
    fn forget(&mut self, now: Moment, window: Duration) {
        while let Some(first) = self.last.front()
            && (first.at + window < now || self.last.len() >= REQUESTS_MAX)
        {
            let first = self.last.pop_front();
            self.open
                .extend(first.filter(|entry| lock(&entry.known).fate == Fate::Open));
        }
    }
}

impl Recording {
    /// The length of its prompt is known, tokens.
    pub(crate) fn prompt(&self, tokens: usize) {
        self.change(|known| known.input = u32::try_from(tokens).unwrap_or(u32::MAX));
    }

    /// So are the names of its full blocks; the first ones count.
    pub(crate) fn blocks(&self, hashes: &[BlockHash]) {
        let Some(entry) = &self.0 else { return };
        let mut known = lock(&entry.known);
        if known.chain.is_empty() && entry.blocks.load(Ordering::Relaxed) + hashes.len() <= BLOCKS_MAX {
            entry.blocks.fetch_add(hashes.len(), Ordering::Relaxed);
            known.chain = hashes.to_vec();
        }
    }

    /// So many tokens went to the client. Those of one delivery share the time since the one before, as clients see it.
    pub(crate) fn delivered(&self, tokens: usize, now: Moment, record: &Record) {
        let Some(entry) = &self.0 else { return };
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        let mut known = lock(&entry.known);
        if let Some(last) = known.last {
            let gap = now.saturating_since(last) / tokens.max(1);
            if record.itl().is_some_and(|bound| gap > bound) {
                known.late += f64::from(tokens);
            }
        } else {
            known.ttft = Some(now.saturating_since(entry.at));
        }
        known.tokens = known.tokens.saturating_add(tokens);
        known.last = Some(now);
    }

    /// It is over. One that got no token, because its client went away, says nothing.
    pub(crate) fn done(&self) {
        self.change(|known| known.fate = if known.tokens > 0 { Fate::Done } else { Fate::Void });
    }

    /// The cluster did not serve it.
    pub(crate) fn lost(&self) {
        self.change(|known| known.fate = Fate::Lost);
    }

    fn change(&self, change: impl FnOnce(&mut Known)) {
        if let Some(entry) = &self.0 {
            change(&mut lock(&entry.known));
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.change(|known| {
            if known.fate == Fate::Open {
                known.fate = Fate::Void;
            }
        });
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let chain = self.known.get_mut().unwrap_or_else(PoisonError::into_inner).chain.len();
        self.blocks.fetch_sub(chain, Ordering::Relaxed);
    }
}

fn nanos(duration: Duration) -> Nanos {
    Nanos(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_node_runtime::Clock;

    const MS: Duration = Duration::from_millis(1);
    const WINDOW: Duration = Duration::from_secs(60);

    fn record() -> (Record, Moment) {
        let now = Clock::new().now();
        (Record::new(now, WINDOW, Some(10 * MS)), now)
    }

    #[tokio::test]
    async fn a_request_is_told_from_its_arrival_to_its_end() {
        let (record, began) = record();
        let request = record.arrived(began + MS, "m", || 7);
        let seen = |at| record.look(began + at, "m").past;
        assert_eq!((seen(2 * MS)[0].input, seen(2 * MS)[0].ttft), (7, None));
        request.prompt(9);
        request.blocks(&[BlockHash([1; 16]), BlockHash([2; 16])]);
        request.delivered(1, began + 5 * MS, &record);
        request.delivered(2, began + 45 * MS, &record);
        request.delivered(2, began + 50 * MS, &record);
        let running = seen(60 * MS)[0];
        assert_eq!((running.tokens, running.output, running.e2e), (5, None, None));
        assert_eq!(record.look(began + 60 * MS, "m").open, [running]);
        request.done();
        let other = record.arrived(began + 2 * MS, "m", || 1);
        other.blocks(&[BlockHash([1; 16])]);
        let seen = record.look(began + 60 * MS, "m");
        let done = seen.past[0];
        assert_eq!((done.at, done.input, done.output), (Nanos(1_000_000), 9, Some(5)));
        assert_eq!((done.ttft, done.e2e), (Some(Nanos(4_000_000)), Some(Nanos(49_000_000))));
        assert!(
            (done.late_gaps - 0.5).abs() < 1e-9,
            "two of four gaps: {}",
            done.late_gaps
        );
        assert_eq!(seen.chains, [vec![0, 1], vec![0]]);
        assert_eq!(record.look(began, "other"), Seen::default());
    }

    #[tokio::test]
    async fn what_says_nothing_of_the_cluster_is_left_out() {
        let (record, began) = record();
        drop(record.arrived(began, "m", || 1));
        record.arrived(began, "m", || 1).done();
        record.arrived(began, "m", || 1).lost();
        let seen = record.look(began, "m");
        assert!(
            seen.past.len() == 1 && seen.past[0].lost && seen.open.is_empty(),
            "{seen:?}"
        );
        let off = Record::default();
        let request = off.arrived(began, "m", || panic!("nobody asks"));
        request.delivered(1, began, &off);
        assert_eq!(off.look(began, "m"), Seen::default());
    }

    #[tokio::test]
    async fn it_is_bounded_and_forgets_nobody_who_still_waits() {
        let (record, began) = record();
        let waits = record.arrived(began, "m", || 1);
        let mut others = Vec::new();
        for index in 0..REQUESTS_MAX {
            let request = record.arrived(began + MS, "m", || 1);
            request.blocks(&[BlockHash([index as u8; 16]); 100]);
            request.delivered(1, began + MS, &record);
            request.done();
            others.push(request);
        }
        let seen = record.look(began + 2 * MS, "m");
        assert_eq!((seen.past.len(), seen.open.len()), (REQUESTS_MAX - 1, 1));
        assert!(seen.chains.iter().flatten().count() <= BLOCKS_MAX);
        drop(others);
        let later = began + WINDOW + 10 * MS;
        let seen = record.look(later, "m");
        assert_eq!((seen.past.len(), seen.open.len()), (0, 1), "all are too old");
        let inner = record.0.as_ref().unwrap();
        assert_eq!(inner.blocks.load(Ordering::Relaxed), 0, "their blocks went with them");
        waits.lost();
        assert!(record.look(later, "m").open.is_empty());
    }
}
