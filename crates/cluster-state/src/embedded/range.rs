//! The keys that a request means: one, a half-open range, or all from one on.

use std::ops::Bound;

type Bounds<'a> = (Bound<&'a [u8]>, Bound<&'a [u8]>);

/// A set of keys, as etcd's pair of `key` and `range_end` gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeyRange {
    from: Vec<u8>,
    end: End,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Single,
    Before(Vec<u8>),
    Open,
}

impl KeyRange {
    /// No `range_end` means one key, a zero byte means all from `key` on.
    pub(super) fn new(key: &[u8], range_end: &[u8]) -> Self {
        let end = match range_end {
            [] => End::Single,
            [0] => End::Open,
            end => End::Before(end.to_vec()),
        };
        Self {
            from: key.to_vec(),
            end,
        }
    }

    pub(super) fn contains(&self, key: &[u8]) -> bool {
        match &self.end {
            End::Single => key == self.from,
            End::Before(end) => key >= self.from.as_slice() && key < end.as_slice(),
            End::Open => key >= self.from.as_slice(),
        }
    }

    /// For an ordered map; `None` where nothing can lie inside.
    pub(super) fn bounds(&self) -> Option<Bounds<'_>> {
        let from = Bound::Included(self.from.as_slice());
        match &self.end {
            End::Single => Some((from, Bound::Included(&self.from))),
            End::Before(end) if *end <= self.from => None,
            End::Before(end) => Some((from, Bound::Excluded(end))),
            End::Open => Some((from, Bound::Unbounded)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn bounds_and_contains_agree(key: Vec<u8>, end: Vec<u8>, keys in prop::collection::btree_set(any::<Vec<u8>>(), 0..20)) {
            let range = KeyRange::new(&key, &end);
            let by_bounds: BTreeSet<Vec<u8>> = match range.bounds() {
                Some(bounds) => keys.range::<[u8], _>(bounds).cloned().collect(),
                None => BTreeSet::new(),
            };
            let by_test: BTreeSet<Vec<u8>> = keys.into_iter().filter(|key| range.contains(key)).collect();
            prop_assert_eq!(by_bounds, by_test);
        }
    }
}
