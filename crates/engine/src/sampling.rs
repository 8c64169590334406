//! Drawing a token from logits: pure, keyed by (seed, index).

use baton_types::{SamplingParams, TokenLogprobs};

/// A drawn token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its log probability and the alternatives', where they were asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Draws token number `generated.len()`.
pub fn sample(_logits: &[f32], _params: &SamplingParams, _prompt: &[u32], _generated: &[u32]) -> Sampled {
    todo!()
}
