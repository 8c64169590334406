//! When a sequence has its last token.

use baton_engine::ModelConfig;
use baton_types::{FinishReason, SamplingParams};
use std::sync::Arc;

/// The model's limits that end a sequence. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Ending {
    eos_tokens: Arc<[u32]>,
    context_tokens: usize,
}

impl Ending {
    /// Of this model, with `more` tokens that end a text.
    pub fn new(config: &ModelConfig, more: &[u32]) -> Self {
        let mut eos_tokens: Vec<u32> = config.eos_tokens.iter().chain(more).copied().collect();
        eos_tokens.sort_unstable();
        eos_tokens.dedup();
        Self {
            eos_tokens: eos_tokens.into(),
            context_tokens: config.context_tokens as usize,
        }
    }

    /// The longest sequence, in tokens.
    pub fn context_tokens(&self) -> usize {
        self.context_tokens
    }

    /// Whether `token`, number `index` among the generated ones and preceded by `before` tokens in all, is the last.
    pub fn finish(&self, sampling: &SamplingParams, before: usize, index: u32, token: u32) -> Option<FinishReason> {
        if !sampling.ignore_eos && self.eos_tokens.contains(&token) {
            Some(FinishReason::Stop)
        } else if index.saturating_add(1) >= sampling.max_tokens || before + 1 >= self.context_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}
