//! A short generation through the real step before the node says that it is ready: damaged weights, a wrong instruction-set
//! path or an arena of another shape show here and not in the first request.

use crate::error::BringUpError;
use baton_engine::{Backend, BlockPool, Slice, Unobserved, WantedLogits, sample};
use baton_types::{ArenaView, SamplingParams};
use std::sync::Arc;

const PROMPT_TOKENS: u32 = 8;
const DRAWN_TOKENS: usize = 3;

/// Runs it; the pool is as before afterwards.
///
/// # Errors
/// A step that fails, or logits that are no numbers.
pub fn run(backend: &mut dyn Backend, arena: &ArenaView, pool: &Arc<BlockPool>) -> Result<(), BringUpError> {
    let vocab = backend.config().vocab;
    let prompt: Vec<u32> = (0..PROMPT_TOKENS).map(|token| token % vocab).collect();
    let blocks = arena.geometry().blocks_for(prompt.len() + DRAWN_TOKENS);
    let Ok(table) = pool.acquire(&[], 0, blocks) else {
        // An arena that small was refused before, unless its blocks are of very few tokens.
        return Ok(());
    };
    let greedy = SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    };
    let mut tokens = prompt.clone();
    let mut start = 0;
    for _ in 0..DRAWN_TOKENS {
        let slice = Slice {
            tokens: &tokens[start..],
            start,
            blocks: table.blocks(),
            logits: WantedLogits::Last,
        };
        let output = backend
            .step(arena, &[slice], &mut Unobserved)
            .map_err(BringUpError::SelfTest)?;
        let row = output.row(0);
        // Impossible tokens (minus infinity) are allowed, as long as something is possible.
        if let Some(found) = row
            .iter()
            .copied()
            .find(|logit| logit.is_nan() || *logit == f32::INFINITY)
        {
            return Err(BringUpError::SelfTestOutput { found });
        }
        if !row.iter().any(|logit| logit.is_finite()) {
            return Err(BringUpError::SelfTestOutput {
                found: f32::NEG_INFINITY,
            });
        }
        start = tokens.len();
        tokens.push(sample(row, &greedy, &prompt, &tokens[prompt.len()..]).token);
    }
    Ok(())
}
