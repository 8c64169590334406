//! Refuses a step that cannot be computed, before anything is written.

use crate::backend::Slice;
use crate::error::StepError;
use crate::model::ModelConfig;
use baton_types::{ArenaView, KvDtype};
use std::collections::HashMap;

/// Checks arena and batch against the model.
///
/// # Errors
/// The first thing that is wrong.
pub(super) fn check(
    config: &ModelConfig,
    dtype: KvDtype,
    arena: &ArenaView,
    batch: &[Slice<'_>],
) -> Result<(), StepError> {
    let geometry = arena.geometry();
    config.kv_geometry(geometry.block_tokens, dtype).check_same(geometry)?;
    let block_tokens = geometry.block_tokens as usize;
    let mut written = HashMap::new();
    for (index, slice) in batch.iter().enumerate() {
        if slice.tokens.is_empty() {
            return Err(StepError::EmptySlice { slice: index });
        }
        if let Some(token) = slice.tokens.iter().find(|token| **token >= config.vocab) {
            return Err(StepError::TokenOutOfRange {
                slice: index,
                token: *token,
                vocab: config.vocab,
            });
        }
        let end = slice.start.saturating_add(slice.tokens.len());
        if end > config.context_tokens as usize {
            return Err(StepError::BeyondContext {
                slice: index,
                end,
                context_tokens: config.context_tokens,
            });
        }
        let blocks = slice.blocks.len();
        if blocks < geometry.blocks_for(end) {
            let block_tokens = geometry.block_tokens;
            return Err(StepError::TooFewBlocks {
                slice: index,
                end,
                blocks,
                block_tokens,
            });
        }
        let used = &slice.blocks[..geometry.blocks_for(end)];
        for block in used {
            let whole = arena.block_ptr(*block, 0, geometry.block_bytes());
            whole.map_err(|source| StepError::OutOfArena { slice: index, source })?;
        }
        for block in &used[slice.start / block_tokens..] {
            if written.insert(*block, index).is_some() {
                return Err(StepError::BlockConflict {
                    slice: index,
                    block: *block,
                });
            }
        }
    }
    for (index, slice) in batch.iter().enumerate() {
        let read = &slice.blocks[..slice.start / block_tokens];
        if let Some(block) = read.iter().find(|block| written.contains_key(block)) {
            return Err(StepError::BlockConflict {
                slice: index,
                block: *block,
            });
        }
    }
    Ok(())
}
