//! The blocks of one request on their way out: which are finished, in which layers, which were pushed, which the receiver
//! wants.
//!
//! Blocks of all chunks but the last leave whole, as few large extents, while the next chunk is computed. The last chunk has
//! no next one to hide behind, so its blocks leave by groups of layers while its further layers are computed: what is exposed
//! of it is about one group.

use baton_engine::BlockTable;
use baton_kv_transfer::{Granted, Outgoing, TransferError};
use baton_types::{BlockId, KvGeometry};
use std::ops::Range;
use std::sync::Arc;

/// A group has so many layers that its part of a block has at least this many bytes: below, what each extent costs (a
/// descriptor, a header, a notification) outweighs what sending earlier gains.
const EXTENT_BYTES_MIN: usize = 64 << 10;

/// After how many layers of a last chunk its blocks are pushed: groups as small as [`EXTENT_BYTES_MIN`] allows, as even as
/// they can be, the last border being all layers. Blocks smaller than two groups are not cut.
pub(crate) fn layer_borders(geometry: &KvGeometry) -> Arc<[u32]> {
    let layers_min = EXTENT_BYTES_MIN.div_ceil(geometry.layer_bytes().max(1));
    let groups = (geometry.layers as usize / layers_min).max(1);
    let groups = u32::try_from(groups).unwrap_or(geometry.layers);
    // Widened, since the product of two u32 may not fit one; the quotient is at most the number of layers.
    let border = |group: u32| u64::from(group) * u64::from(geometry.layers) / u64::from(groups);
    (1..=groups)
        .map(|group| u32::try_from(border(group)).unwrap_or(geometry.layers))
        .collect()
}

/// What of a request's context is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finished {
    /// All layers of this many leading tokens. More come, so that a partly filled block is not finished.
    Tokens(usize),
    /// This many leading layers of all tokens of the context, of which there are so many.
    Layers { tokens: usize, layers: u32 },
}

/// What was pushed of one grant.
pub(crate) struct Pushed {
    wanted: Range<u32>,
    geometry: KvGeometry,
    /// How many leading layers were pushed of each wanted block that any was pushed of. Counted per block, because a step
    /// that is broken off is computed anew in other chunks.
    layers: Vec<u32>,
    /// How many wanted blocks, from the first, were pushed whole.
    whole: usize,
}

impl Pushed {
    pub fn new(granted: Granted, geometry: KvGeometry) -> Self {
        Self {
            wanted: granted.wanted,
            geometry,
            layers: Vec::new(),
            whole: 0,
        }
    }

    /// Pushes what is finished, wanted, and was not pushed before. Each push claims the table, so that its blocks stay as
    /// they are until they were sent.
    pub fn push(
        &mut self,
        outgoing: &Outgoing,
        table: &Arc<BlockTable>,
        finished: Finished,
    ) -> Result<(), TransferError> {
        self.cut(table.blocks(), finished, |ordinal, layers, source| {
            outgoing.push(ordinal, layers, source, table.clone())
        })
    }

    fn cut<E>(
        &mut self,
        table: &[BlockId],
        finished: Finished,
        mut push: impl FnMut(u32, Range<u32>, BlockId) -> Result<(), E>,
    ) -> Result<(), E> {
        let (blocks, layers) = match finished {
            Finished::Tokens(tokens) => (tokens / self.geometry.block_tokens as usize, self.geometry.layers),
            Finished::Layers { tokens, layers } => (self.geometry.blocks_for(tokens), layers),
        };
        let ordinals = (0u32..).zip(table).take(blocks);
        let wanted = ordinals.filter(|(ordinal, _)| self.wanted.contains(ordinal));
        for (place, (ordinal, source)) in wanted.enumerate().skip(self.whole) {
            if place == self.layers.len() {
                self.layers.push(0);
            }
            let pushed = &mut self.layers[place];
            if *pushed < layers {
                push(ordinal, *pushed..layers, *source)?;
                *pushed = layers;
            }
            if *pushed == self.geometry.layers && place == self.whole {
                self.whole += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_types::{Epoch, KvDtype};
    use std::collections::BTreeSet;
    use std::convert::Infallible;

    fn geometry(layers: u32, kv_heads: u32, head_dim: u32) -> KvGeometry {
        KvGeometry {
            layers,
            kv_heads,
            head_dim,
            block_tokens: 16,
            dtype: KvDtype::F16,
        }
    }

    #[test]
    fn groups_are_as_small_as_an_extent_may_be() {
        let borders = |layers, kv_heads, head_dim| layer_borders(&geometry(layers, kv_heads, head_dim)).to_vec();
        assert_eq!(borders(30, 3, 64), [6, 12, 18, 24, 30], "SmolLM2-135M: 72 KiB each");
        assert_eq!(
            borders(32, 8, 128),
            (1..=32).collect::<Vec<_>>(),
            "Llama-3.1-8B: 64 KiB each"
        );
        assert_eq!(borders(80, 8, 128).len(), 80);
        assert_eq!(borders(28, 8, 64), (1..=14).map(|n| 2 * n).collect::<Vec<_>>());
        assert_eq!(borders(4, 2, 32), [4], "a block of 32 KiB is not cut");
        for layers in 1..100 {
            let shape = geometry(layers, 2, 96);
            let borders = layer_borders(&shape);
            assert_eq!(borders.last(), Some(&layers));
            let mut before = 0;
            for border in borders.iter() {
                let bytes = (border - before) as usize * shape.layer_bytes();
                assert!(
                    bytes >= EXTENT_BYTES_MIN.min(shape.block_bytes()),
                    "{layers}: {borders:?}"
                );
                before = *border;
            }
        }
    }

    struct Case {
        pushed: Pushed,
        table: Vec<BlockId>,
        /// Every (ordinal, layer) that was pushed.
        seen: BTreeSet<(u32, u32)>,
        extents: Vec<(u32, Range<u32>)>,
    }

    impl Case {
        fn new(wanted: Range<u32>, blocks: u32) -> Self {
            let granted = Granted {
                epoch: Epoch(1),
                held: wanted.start as usize,
                wanted,
            };
            Self {
                pushed: Pushed::new(granted, geometry(6, 2, 64)),
                table: (0..blocks).map(|n| BlockId(100 + n)).collect(),
                seen: BTreeSet::new(),
                extents: Vec::new(),
            }
        }

        fn push(&mut self, finished: Finished) -> &[(u32, Range<u32>)] {
            self.extents.clear();
            let (seen, extents, table) = (&mut self.seen, &mut self.extents, &self.table);
            let Ok(()) = self.pushed.cut(table, finished, |ordinal, layers, source| {
                assert_eq!(source, BlockId(100 + ordinal));
                for layer in layers.clone() {
                    assert!(seen.insert((ordinal, layer)), "{ordinal}, {layer} was pushed twice");
                }
                extents.push((ordinal, layers));
                Ok::<_, Infallible>(())
            });
            &self.extents
        }
    }

    #[test]
    fn whole_blocks_then_groups_of_layers_overlap_nowhere() {
        let mut case = Case::new(1..5, 5);
        assert_eq!(case.push(Finished::Tokens(15)), []);
        assert_eq!(
            case.push(Finished::Tokens(47)),
            [(1, 0..6)],
            "block 0 is held, block 2 is not full"
        );
        let half = Finished::Layers { tokens: 70, layers: 3 };
        assert_eq!(case.push(half), [(2, 0..3), (3, 0..3), (4, 0..3)]);
        assert_eq!(case.push(half), []);
        assert_eq!(
            case.push(Finished::Layers { tokens: 70, layers: 6 }),
            [(2, 3..6), (3, 3..6), (4, 3..6)]
        );
        assert_eq!(case.push(Finished::Tokens(70)), []);
        assert_eq!(case.seen.len(), 4 * 6);
    }

    #[test]
    fn a_step_that_is_computed_anew_in_other_chunks_sends_only_what_lacks() {
        let mut case = Case::new(0..4, 4);
        case.push(Finished::Layers { tokens: 64, layers: 4 });
        // Broken off; the next step has room for half of it.
        assert_eq!(case.push(Finished::Tokens(32)), [(0, 4..6), (1, 4..6)]);
        assert_eq!(case.push(Finished::Layers { tokens: 64, layers: 2 }), []);
        assert_eq!(
            case.push(Finished::Layers { tokens: 64, layers: 6 }),
            [(2, 4..6), (3, 4..6)]
        );
        assert_eq!(case.seen.len(), 4 * 6);
    }

    #[test]
    fn nothing_wanted_is_nothing_pushed() {
        let mut case = Case::new(4..4, 4);
        assert_eq!(case.push(Finished::Layers { tokens: 64, layers: 6 }), []);
    }
}
