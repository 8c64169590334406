//! A hash table from random 64-bit keys to numbers, made for looking up many keys at a time: one place in memory for each,
//! known before it is read, so that all of them are fetched at once. Open addressing with linear probing; removing shifts
//! back what follows. Source: Knuth, *The Art of Computer Programming*, volume 3, section 6.4, algorithms L and R.

use std::hint::black_box;

/// No value; stands in an empty place.
pub(crate) const NOTHING: u64 = u64::MAX;
const PLACES_MIN: usize = 16;

/// The table. Its places are a power of two, three quarters of them taken at most.
#[derive(Debug)]
pub(crate) struct Table {
    places: Vec<(u64, u64)>,
    len: usize,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self {
            places: vec![(0, NOTHING); PLACES_MIN],
            len: 0,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.places.capacity() * size_of::<(u64, u64)>()
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn home(&self, key: u64) -> usize {
        (key >> (u64::BITS - self.places.len().trailing_zeros())) as usize
    }

    fn after(&self, at: usize) -> usize {
        (at + 1) & (self.places.len() - 1)
    }

    /// Where the key is, or the empty place where it would be.
    fn find(&self, key: u64) -> usize {
        let mut at = self.home(key);
        while self.places[at].1 != NOTHING && self.places[at].0 != key {
            at = self.after(at);
        }
        at
    }

    /// The value, or [`NOTHING`].
    pub(crate) fn get(&self, key: u64) -> u64 {
        self.places[self.find(key)].1
    }

    /// The values of several keys.
    pub(crate) fn get_all<const N: usize>(&self, keys: &[u64; N]) -> [u64; N] {
        // Nothing here waits for anything before it: memory is asked for all of them at once.
        let near = keys.iter().fold(0, |all, key| all ^ self.places[self.home(*key)].1);
        black_box(near);
        keys.map(|key| self.get(key))
    }

    /// Sets the key's value, which is not [`NOTHING`].
    pub(crate) fn set(&mut self, key: u64, value: u64) {
        let mut at = self.find(key);
        if self.places[at].1 == NOTHING {
            if (self.len + 1) * 4 > self.places.len() * 3 {
                self.grow();
                at = self.find(key);
            }
            self.len += 1;
        }
        self.places[at] = (key, value);
    }

    fn grow(&mut self) {
        let larger = vec![(0, NOTHING); self.places.len() * 2];
        let before = std::mem::replace(&mut self.places, larger);
        for (key, value) in before.into_iter().filter(|(_, value)| *value != NOTHING) {
            let at = self.find(key);
            self.places[at] = (key, value);
        }
    }

    /// The key has no value any more.
    pub(crate) fn remove(&mut self, key: u64) {
        let mut hole = self.find(key);
        if self.places[hole].1 == NOTHING {
            return;
        }
        self.len -= 1;
        let mask = self.places.len() - 1;
        let mut at = self.after(hole);
        while self.places[at].1 != NOTHING {
            // What would be found from its home without passing the hole stays.
            let from_home = at.wrapping_sub(self.home(self.places[at].0)) & mask;
            if from_home >= at.wrapping_sub(hole) & mask {
                self.places[hole] = self.places[at];
                hole = at;
            }
            at = self.after(at);
        }
        self.places[hole] = (0, NOTHING);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// Few homes, at both ends of the table, so that keys get into each other's way.
    fn key() -> impl Strategy<Value = u64> {
        (
            0u64..40,
            prop_oneof![Just(0u64), Just(1), Just(u64::MAX >> 2), Just(u64::MAX - 60)],
        )
            .prop_map(|(low, high)| if high > 1 { high + low } else { high << 60 | low })
    }

    proptest! {
        #[test]
        fn it_is_a_map(changes in prop::collection::vec((key(), prop::option::weighted(0.6, 0u64..9)), 0..200)) {
            let (mut table, mut model) = (Table::new(), HashMap::new());
            for (key, value) in changes {
                match value {
                    Some(value) => {
                        table.set(key, value);
                        model.insert(key, value);
                    }
                    None => {
                        table.remove(key);
                        model.remove(&key);
                    }
                }
                prop_assert_eq!(table.get(key), value.unwrap_or(NOTHING));
            }
            prop_assert_eq!(table.len(), model.len());
            for (key, value) in model {
                prop_assert_eq!(table.get_all(&[key, key ^ 1 << 50]), [value, NOTHING]);
            }
        }
    }
}
