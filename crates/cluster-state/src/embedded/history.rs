//! All versions of all keys since the last compaction, and the log of changes that watches read. No IO, no clock.
//!
//! A revision is one atomic change of the whole store. Changes gather in `open` under the next revision until
//! [`History::commit`] makes them one entry of the log. The log keeps the compacted revision itself, so that a watch may
//! start there, as in etcd.

use super::range::KeyRange;
use super::refusal::Refusal;
use etcd_client::EventType;
use etcd_client::proto::{PbEvent, PbKeyValue};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// How much history is kept. Past twice of either, it is compacted down to once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Retention {
    pub(super) revisions: usize,
    pub(super) bytes: usize,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            revisions: 10_000,
            bytes: 32 << 20,
        }
    }
}

#[derive(Debug)]
enum Version {
    Live(Arc<PbKeyValue>),
    Gone(i64),
}

impl Version {
    fn revision(&self) -> i64 {
        match self {
            Self::Live(kv) => kv.mod_revision,
            Self::Gone(revision) => *revision,
        }
    }

    fn live(&self) -> Option<&Arc<PbKeyValue>> {
        match self {
            Self::Live(kv) => Some(kv),
            Self::Gone(_) => None,
        }
    }
}

/// One key's change within a revision.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) now: Option<Arc<PbKeyValue>>,
    pub(super) before: Option<Arc<PbKeyValue>>,
    key: Vec<u8>,
    revision: i64,
}

impl Change {
    pub(super) fn key(&self) -> &[u8] {
        &self.key
    }

    pub(super) fn event(&self, prev_kv: bool) -> PbEvent {
        let (kind, kv) = match &self.now {
            Some(kv) => (EventType::Put, kv.as_ref().clone()),
            None => (
                EventType::Delete,
                PbKeyValue {
                    key: self.key.clone(),
                    mod_revision: self.revision,
                    ..PbKeyValue::default()
                },
            ),
        };
        let prev_kv = self.before.as_ref().filter(|_| prev_kv).map(|kv| kv.as_ref().clone());
        PbEvent {
            r#type: kind.into(),
            kv: Some(kv),
            prev_kv,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let of = |kv: &Option<Arc<PbKeyValue>>| kv.as_ref().map_or(0, |kv| kv.value.len());
        128 + self.key.len() + of(&self.now) + of(&self.before)
    }
}

/// One atomic change.
#[derive(Debug)]
pub(super) struct Revision {
    pub(super) number: i64,
    pub(super) changes: Vec<Change>,
}

#[derive(Debug)]
pub(super) struct History {
    revision: i64,
    compacted: i64,
    keys: BTreeMap<Vec<u8>, Vec<Version>>,
    log: VecDeque<Revision>,
    log_bytes: usize,
    open: Vec<Change>,
    retention: Retention,
}

impl History {
    pub(super) fn new(retention: Retention) -> Self {
        Self {
            revision: 1,
            compacted: 0,
            keys: BTreeMap::new(),
            log: VecDeque::new(),
            log_bytes: 0,
            open: Vec::new(),
            retention,
        }
    }

    /// The last committed revision.
    pub(super) fn revision(&self) -> i64 {
        self.revision
    }

    /// What lies before it is forgotten.
    pub(super) fn compacted(&self) -> i64 {
        self.compacted
    }

    /// A key's present value, uncommitted changes included.
    pub(super) fn get(&self, key: &[u8]) -> Option<&Arc<PbKeyValue>> {
        self.keys.get(key)?.last()?.live()
    }

    /// Refuses a revision that is forgotten or not yet there. 0 means now.
    pub(super) fn check_readable(&self, revision: i64) -> Result<(), Refusal> {
        if revision > self.revision {
            Err(Refusal::FutureRevision)
        } else if revision > 0 && revision < self.compacted {
            Err(Refusal::Compacted)
        } else {
            Ok(())
        }
    }

    /// The pairs of a range in order of their keys, as of a readable revision.
    pub(super) fn range<'a>(
        &'a self,
        range: &'a KeyRange,
        revision: i64,
    ) -> impl Iterator<Item = &'a Arc<PbKeyValue>> + 'a {
        let at = if revision <= 0 { i64::MAX } else { revision };
        let keys = range
            .bounds()
            .into_iter()
            .flat_map(|bounds| self.keys.range::<[u8], _>(bounds));
        keys.filter_map(move |(_, versions)| {
            let known = versions.partition_point(|version| version.revision() <= at);
            versions[..known].last()?.live()
        })
    }

    /// Writes a pair under the open revision; gives the one before.
    pub(super) fn put(&mut self, key: &[u8], value: Vec<u8>, lease: i64) -> Option<Arc<PbKeyValue>> {
        let revision = self.revision + 1;
        let before = self.get(key).cloned();
        let now = Arc::new(PbKeyValue {
            key: key.to_vec(),
            value,
            lease,
            mod_revision: revision,
            create_revision: before.as_ref().map_or(revision, |kv| kv.create_revision),
            version: before.as_ref().map_or(1, |kv| kv.version + 1),
        });
        self.keys
            .entry(key.to_vec())
            .or_default()
            .push(Version::Live(Arc::clone(&now)));
        self.open.push(Change {
            now: Some(now),
            before: before.clone(),
            key: key.to_vec(),
            revision,
        });
        before
    }

    /// Deletes a pair under the open revision; gives it, where there was one.
    pub(super) fn delete(&mut self, key: &[u8]) -> Option<Arc<PbKeyValue>> {
        let revision = self.revision + 1;
        let before = self.get(key).cloned()?;
        self.keys.entry(key.to_vec()).or_default().push(Version::Gone(revision));
        self.open.push(Change {
            now: None,
            before: Some(Arc::clone(&before)),
            key: key.to_vec(),
            revision,
        });
        Some(before)
    }

    /// Closes the open revision. Without changes there is none.
    pub(super) fn commit(&mut self) {
        if self.open.is_empty() {
            return;
        }
        self.revision += 1;
        let changes = std::mem::take(&mut self.open);
        self.log_bytes += changes.iter().map(Change::bytes).sum::<usize>();
        self.log.push_back(Revision {
            number: self.revision,
            changes,
        });
        let Retention { revisions, bytes } = self.retention;
        if self.log.len() > 2 * revisions || self.log_bytes > 2 * bytes {
            let mut left = self.log_bytes;
            let mut keep = self.log.len();
            for revision in &self.log {
                if keep <= revisions.max(1) && left <= bytes || keep == 1 {
                    break;
                }
                left -= revision.changes.iter().map(Change::bytes).sum::<usize>();
                keep -= 1;
            }
            let first_kept = self.log[self.log.len() - keep].number;
            self.forget_before(first_kept);
        }
    }

    /// Forgets what was overwritten before `revision`.
    pub(super) fn compact(&mut self, revision: i64) -> Result<(), Refusal> {
        if revision <= self.compacted {
            return Err(Refusal::Compacted);
        }
        if revision > self.revision {
            return Err(Refusal::FutureRevision);
        }
        self.forget_before(revision);
        Ok(())
    }

    /// The log from `revision` on, which must not be forgotten.
    pub(super) fn since(&self, revision: i64) -> impl Iterator<Item = &Revision> {
        let from = self.log.partition_point(|entry| entry.number < revision);
        self.log.range(from..)
    }

    fn forget_before(&mut self, revision: i64) {
        self.compacted = revision;
        let mut touched = BTreeSet::new();
        while self.log.front().is_some_and(|entry| entry.number < revision) {
            let Some(entry) = self.log.pop_front() else { break };
            for change in entry.changes {
                self.log_bytes -= change.bytes();
                touched.insert(change.key);
            }
        }
        if let Some(entry) = self.log.front().filter(|entry| entry.number == revision) {
            touched.extend(entry.changes.iter().map(|change| change.key.clone()));
        }
        for key in touched {
            let Some(versions) = self.keys.get_mut(&key) else {
                continue;
            };
            let known = versions.partition_point(|version| version.revision() <= revision);
            let stale = match versions[..known].last() {
                Some(Version::Live(_)) => known - 1,
                Some(Version::Gone(_)) => known,
                None => 0,
            };
            versions.drain(..stale);
            if versions.is_empty() {
                self.keys.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all() -> KeyRange {
        KeyRange::new(&[0], &[0])
    }

    fn contents(history: &History, revision: i64) -> Vec<(Vec<u8>, Vec<u8>)> {
        history
            .range(&all(), revision)
            .map(|kv| (kv.key.clone(), kv.value.clone()))
            .collect()
    }

    #[derive(Debug, Clone)]
    enum Step {
        Put(u8, u8),
        Delete(u8),
        Commit,
        Compact(u8),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0u8..5, any::<u8>()).prop_map(|(key, value)| Step::Put(key, value)),
            (0u8..5).prop_map(Step::Delete),
            Just(Step::Commit),
            any::<u8>().prop_map(Step::Compact),
        ];
        prop::collection::vec(step, 0..80)
    }

    proptest! {
        /// Every readable revision shows exactly what a model kept for it, whatever was compacted before it, and a replay
        /// of the log from any readable revision leads to the present.
        #[test]
        fn every_revision_reads_as_it_was(steps in steps(), small: bool) {
            let retention = if small { Retention { revisions: 3, bytes: 1 << 20 } } else { Retention::default() };
            let mut history = History::new(retention);
            let mut now = BTreeMap::new();
            let mut past = BTreeMap::from([(1, now.clone())]);
            let mut dirty = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Put(key, value) => if dirty.insert(key) {
                        history.put(&[key], vec![value], 0);
                        now.insert(vec![key], vec![value]);
                    },
                    Step::Delete(key) => if dirty.insert(key) {
                        let had = history.delete(&[key]).is_some();
                        prop_assert_eq!(now.remove(&vec![key]).is_some(), had);
                    },
                    Step::Commit => {
                        history.commit();
                        dirty.clear();
                        past.insert(history.revision(), now.clone());
                    }
                    Step::Compact(share) => {
                        history.commit();
                        dirty.clear();
                        past.insert(history.revision(), now.clone());
                        let at = history.revision() * i64::from(share) / 255;
                        let before = history.compacted();
                        prop_assert_eq!(history.compact(at).is_ok(), at > before);
                    }
                }
            }
            history.commit();
            past.insert(history.revision(), now.clone());
            for (revision, expected) in &past {
                if history.check_readable(*revision).is_err() {
                    prop_assert!(*revision < history.compacted());
                    continue;
                }
                let seen: BTreeMap<_, _> = contents(&history, *revision).into_iter().collect();
                prop_assert_eq!(&seen, expected);
                let mut replayed = expected.clone();
                for change in history.since(revision + 1).flat_map(|entry| &entry.changes) {
                    match &change.now {
                        Some(kv) => replayed.insert(kv.key.clone(), kv.value.clone()),
                        None => replayed.remove(change.key()),
                    };
                }
                prop_assert_eq!(&replayed, &now);
            }
        }
    }

    #[test]
    fn history_stays_bounded() {
        let mut history = History::new(Retention {
            revisions: 10,
            bytes: 10_000,
        });
        for i in 0..1000u32 {
            history.put(b"key", i.to_le_bytes().to_vec(), 0);
            history.commit();
        }
        assert!(history.log.len() <= 20);
        assert!(history.keys[b"key".as_slice()].len() <= 21);
        assert_eq!(history.get(b"key").map(|kv| kv.version), Some(1000));
        for _ in 0..20 {
            history.put(b"large", vec![0; 5_000], 0);
            history.commit();
        }
        assert!(history.log_bytes <= 20_000, "{}", history.log_bytes);
        assert!(history.delete(b"large").is_some());
        history.commit();
        history.compact(history.revision()).unwrap();
        assert!(!history.keys.contains_key(b"large".as_slice()));
        assert_eq!(history.check_readable(history.revision() - 1), Err(Refusal::Compacted));
    }
}
