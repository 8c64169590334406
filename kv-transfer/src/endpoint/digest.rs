//! Digests of what is sent and of what arrived, made off the lock, on a blocking thread.

use crate::session::mix;
use crate::transport::{Extent, PathError, Still};
use baton_node_runtime::Supervisor;
use baton_types::{ArenaView, BlockId, Epoch, OutOfArena};
use tokio::sync::oneshot;

/// A digest that the sender gave, and the blocks that should have it. The machine holds them until it is answered.
pub(super) struct Comparison {
    pub epoch: Epoch,
    pub blocks: Vec<(u32, BlockId)>,
    pub digest: u64,
}

/// Makes digests.
#[derive(Clone)]
pub(super) struct Digester {
    pub arena: ArenaView,
    pub supervisor: Supervisor,
}

impl Digester {
    /// Whether the blocks have the digest. Blocks that the arena does not have have none.
    pub(super) async fn compare(&self, comparison: Comparison) -> bool {
        let arena = self.arena.clone();
        let layers = arena.geometry().layers;
        let made = self.blocking(move || {
            comparison.blocks.iter().try_fold(0_u64, |digest, (ordinal, block)| {
                let still = Still::arrived(&arena, *block)?;
                Ok::<u64, OutOfArena>(digest.wrapping_add(sum(*ordinal, 0..layers, &still)))
            }) == Ok(comparison.digest)
        });
        made.await.unwrap_or(false)
    }

    /// The sum of each extent, in order.
    ///
    /// # Errors
    /// An extent that the arena does not have.
    pub(super) async fn sums(&self, extents: Vec<Extent>) -> Result<Vec<u64>, PathError> {
        let arena = self.arena.clone();
        let made = self.blocking(move || {
            extents
                .iter()
                .map(|extent| {
                    Ok(sum(
                        extent.ordinal,
                        extent.layers.clone(),
                        &Still::source(&arena, extent)?,
                    ))
                })
                .collect()
        });
        made.await.unwrap_or(Err(PathError::Closed))
    }

    /// None where the process is ending.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (done, made) = oneshot::channel();
        let work = move || {
            // Nobody may wait for it any more.
            let _ = done.send(work());
        };
        drop(self.supervisor.spawn_blocking("transfer-digest", work));
        made.await.ok()
    }
}

fn sum(ordinal: u32, layers: std::ops::Range<u32>, still: &Still) -> u64 {
    layers
        .zip(still.layer_crcs())
        .fold(0, |sum: u64, (layer, crc)| sum.wrapping_add(mix(ordinal, layer, crc)))
}
