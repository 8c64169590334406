//! A set of (block ordinal, layer): what arrived, and what is arriving. A set, not a counter: duplicates and order do not
//! matter.

use std::ops::Range;

/// Why an extent cannot be taken into the set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Misfit {
    /// Outside the ordinals or layers of the set, or empty.
    Outside,
    /// All of it is in already, or on its way.
    Duplicate,
    /// Part of it is in or on its way, the rest is not: no honest writer cuts extents like that.
    Overlap,
}

/// All layers of a range of ordinals.
#[derive(Debug, Clone)]
pub(super) struct Arrival {
    ordinals: Range<u32>,
    layers: u32,
    /// One bit per (ordinal, layer): asked for; a bit stays while the extent is on its way and once it is in.
    taken: Vec<u64>,
    /// Layers that each ordinal still lacks.
    lacking: Vec<u32>,
    /// (ordinal, layer) pairs not yet in.
    missing: u64,
}

impl Arrival {
    pub(super) fn new(ordinals: Range<u32>, layers: u32) -> Self {
        let blocks = ordinals.len();
        let pairs = blocks as u64 * u64::from(layers);
        let words = usize::try_from(pairs.div_ceil(64)).expect("the pairs of one hand-over fit an address space");
        Self {
            ordinals,
            layers,
            taken: vec![0; words],
            lacking: vec![layers; blocks],
            missing: pairs,
        }
    }

    pub(super) fn layers(&self) -> u32 {
        self.layers
    }

    /// Everything is in.
    pub(super) fn is_full(&self) -> bool {
        self.missing == 0
    }

    /// (ordinal, layer) pairs that are not in.
    pub(super) fn missing(&self) -> u64 {
        self.missing
    }

    /// Takes an extent that is on its way. Each pair can be on its way once: nobody else may write it then.
    pub(super) fn take(&mut self, ordinal: u32, layers: &Range<u32>) -> Result<(), Misfit> {
        if !self.ordinals.contains(&ordinal) || layers.is_empty() || layers.end > self.layers {
            return Err(Misfit::Outside);
        }
        let taken = layers.clone().filter(|layer| self.is_taken(ordinal, *layer)).count();
        match taken {
            0 => {
                layers.clone().for_each(|layer| self.flip(ordinal, layer));
                Ok(())
            }
            some if some == layers.len() => Err(Misfit::Duplicate),
            _ => Err(Misfit::Overlap),
        }
    }

    /// An extent that was taken is in. Says whether its block is whole now.
    pub(super) fn land(&mut self, ordinal: u32, layers: &Range<u32>) -> bool {
        let count = layers.end - layers.start;
        let lacking = &mut self.lacking[(ordinal - self.ordinals.start) as usize];
        if planted!(DuplicateCounts) {
            self.missing = self.missing.saturating_sub(u64::from(count));
            *lacking = lacking.saturating_sub(count);
            return *lacking == 0;
        }
        self.missing -= u64::from(count);
        *lacking -= count;
        *lacking == 0
    }

    /// Leading ordinals that are whole.
    pub(super) fn leading(&self) -> u32 {
        self.lacking
            .iter()
            .zip(0..)
            .find_map(|(lacking, at)| (*lacking > 0).then_some(at))
            .unwrap_or(self.ordinals.end - self.ordinals.start)
    }

    fn bit(&self, ordinal: u32, layer: u32) -> (usize, u64) {
        let index = (u64::from(ordinal - self.ordinals.start)) * u64::from(self.layers) + u64::from(layer);
        ((index / 64) as usize, 1 << (index % 64))
    }

    fn is_taken(&self, ordinal: u32, layer: u32) -> bool {
        let (word, mask) = self.bit(ordinal, layer);
        self.taken[word] & mask != 0
    }

    fn flip(&mut self, ordinal: u32, layer: u32) {
        let (word, mask) = self.bit(ordinal, layer);
        self.taken[word] ^= mask;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_wanted_is_full_at_once() {
        assert!(Arrival::new(3..3, 30).is_full());
        assert!(Arrival::new(0..0, 30).is_full());
    }

    #[test]
    fn a_duplicate_is_not_counted_twice() {
        let mut set = Arrival::new(2..4, 3);
        assert_eq!(set.take(2, &(0..3)), Ok(()));
        assert_eq!(set.take(2, &(0..3)), Err(Misfit::Duplicate));
        assert!(set.land(2, &(0..3)));
        assert_eq!(set.take(2, &(1..2)), Err(Misfit::Duplicate));
        assert!(!set.is_full());
        assert_eq!(set.take(3, &(1..2)), Ok(()));
        assert_eq!(set.take(3, &(0..3)), Err(Misfit::Overlap));
        assert_eq!(set.take(3, &(0..1)), Ok(()));
        assert_eq!(set.take(3, &(2..3)), Ok(()));
        assert!(!set.land(3, &(2..3)));
        assert!(!set.land(3, &(1..2)));
        assert!(!set.is_full());
        assert!(set.land(3, &(0..1)));
        assert!(set.is_full());
    }

    #[test]
    fn what_is_outside_is_refused() {
        let mut set = Arrival::new(2..4, 3);
        for (ordinal, layers) in [(1, 0..3), (4, 0..3), (2, 0..4), (2, 1..1), (u32::MAX, 0..1)] {
            assert_eq!(set.take(ordinal, &layers), Err(Misfit::Outside));
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_set_of_pairs(
            extents in proptest::collection::vec((0u32..6, 0u32..5, 1u32..6), 0..60)
        ) {
            let mut set = Arrival::new(1..5, 5);
            let mut model = std::collections::BTreeSet::new();
            for (ordinal, start, len) in extents {
                let layers = start..start + len;
                let pairs: Vec<_> = layers.clone().map(|layer| (ordinal, layer)).collect();
                let inside = (1..5).contains(&ordinal) && layers.end <= 5;
                let present = pairs.iter().filter(|pair| model.contains(*pair)).count();
                let expected = match present {
                    _ if !inside => Err(Misfit::Outside),
                    0 => Ok(()),
                    n if n == pairs.len() => Err(Misfit::Duplicate),
                    _ => Err(Misfit::Overlap),
                };
                prop_assert_eq!(set.take(ordinal, &layers), expected);
                if expected.is_ok() {
                    model.extend(pairs);
                    let whole = model.iter().filter(|(o, _)| *o == ordinal).count() == 5;
                    prop_assert_eq!(set.land(ordinal, &layers), whole);
                }
                prop_assert_eq!(set.is_full(), model.len() == 20);
            }
        }
    }
}
