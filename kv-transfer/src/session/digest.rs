//! The digest of a hand-over: a wrapping sum over its (ordinal, layer) pairs of a mix of ordinal, layer, and the CRC-64/NVME of
//! the layer's bytes. A sum, so that neither the order nor the number of writes matters; a mix, so that two layers in each
//! other's place are seen.

use std::ops::Range;

/// What one layer of one block adds.
pub(crate) fn mix(ordinal: u32, layer: u32, crc: u64) -> u64 {
    // The finisher of MurmurHash3 (fmix64), over each part in turn.
    let fmix = |mut x: u64| {
        x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        x ^ (x >> 33)
    };
    fmix(crc ^ fmix((u64::from(ordinal) << 32 | u64::from(layer)).wrapping_add(1)))
}

/// The sums of blocks, as they are made.
#[derive(Debug)]
pub(super) struct Sums {
    first: u32,
    layers: u32,
    /// Of each block: layers that are in, and their sum.
    blocks: Vec<(u32, u64)>,
}

impl Sums {
    pub(super) fn new(ordinals: Range<u32>, layers: u32) -> Self {
        Self {
            first: ordinals.start,
            layers,
            blocks: vec![(0, 0); ordinals.len()],
        }
    }

    pub(super) fn add(&mut self, ordinal: u32, layers: u32, sum: u64) {
        let at = ordinal
            .checked_sub(self.first)
            .and_then(|at| self.blocks.get_mut(at as usize));
        if let Some((done, total)) = at {
            *done += layers;
            *total = total.wrapping_add(sum);
        }
    }

    /// The digest of these ordinals, once all their layers are in.
    pub(super) fn of(&self, ordinals: Range<u32>) -> Option<u64> {
        let start = ordinals.start.checked_sub(self.first)? as usize;
        let end = ordinals.end.checked_sub(self.first)? as usize;
        self.blocks
            .get(start..end)?
            .iter()
            .try_fold(0_u64, |digest, (done, sum)| {
                (*done == self.layers).then(|| digest.wrapping_add(*sum))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_of_everything_in_any_order() {
        let mut sums = Sums::new(3..5, 2);
        assert_eq!(sums.of(5..5), Some(0));
        for (ordinal, layer) in [(4, 1), (3, 0), (3, 1)] {
            sums.add(ordinal, 1, mix(ordinal, layer, 7));
        }
        assert_eq!(sums.of(3..5), None, "one layer is lacking");
        sums.add(4, 1, mix(4, 0, 7));
        let pairs = [(3, 0), (3, 1), (4, 0), (4, 1)];
        let digest = |pairs: &[(u32, u32)]| pairs.iter().fold(0_u64, |sum, (o, l)| sum.wrapping_add(mix(*o, *l, 7)));
        assert_eq!(sums.of(3..5), Some(digest(&pairs)));
        assert_eq!(sums.of(4..5), Some(digest(&pairs[2..])));
        assert_eq!((sums.of(2..5), sums.of(3..6)), (None, None));
        sums.add(9, 1, 1);
    }

    #[test]
    fn places_matter() {
        let (a, b) = (11, 22);
        let right = mix(0, 0, a).wrapping_add(mix(0, 1, b));
        for wrong in [
            mix(0, 0, b).wrapping_add(mix(0, 1, a)),
            mix(1, 0, a).wrapping_add(mix(0, 1, b)),
            mix(0, 0, a).wrapping_add(mix(1, 0, b)),
        ] {
            assert_ne!(right, wrong);
        }
    }
}
