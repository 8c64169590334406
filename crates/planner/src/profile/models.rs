//! Shapes of public models, from their published configuration files.

use super::ProfileError;

/// One dense transformer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Short name.
    pub name: &'static str,
    /// Layers.
    pub layers: u32,
    /// Width.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// Width of the gated feed-forward.
    pub feed_forward: u32,
    /// Tokens of the vocabulary.
    pub vocab: u32,
    /// The output reuses the embedding.
    pub tied: bool,
    /// Longest context, tokens.
    pub context_max: u32,
}

impl Shape {
    /// Weights that every token passes through: projections, feed-forward, output.
    pub(super) fn active_weights(&self) -> f64 {
        let [hidden, heads, kv, dim, ff, vocab, layers] = [
            self.hidden,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.feed_forward,
            self.vocab,
            self.layers,
        ]
        .map(f64::from);
        let attention = hidden * heads * dim * 2.0 + hidden * kv * dim * 2.0;
        layers * (attention + 3.0 * hidden * ff) + vocab * hidden
    }

    /// All weights.
    pub(super) fn weights(&self) -> f64 {
        let embedding = f64::from(self.vocab) * f64::from(self.hidden);
        self.active_weights() + if self.tied { 0.0 } else { embedding }
    }

    /// Elements of KV of one token.
    pub(super) fn kv_elements(&self) -> f64 {
        2.0 * f64::from(self.layers) * f64::from(self.kv_heads) * f64::from(self.head_dim)
    }
}

const fn shape(name: &'static str, sizes: [u32; 8], tied: bool) -> Shape {
    let [
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        feed_forward,
        vocab,
        context_max,
    ] = sizes;
    Shape {
        name,
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        feed_forward,
        vocab,
        tied,
        context_max,
    }
}

/// Those that are known.
pub const MODELS: [Shape; 7] = [
    shape("smollm2-135m", [30, 576, 9, 3, 64, 1536, 49_152, 8192], true),
    shape("llama-3.2-1b", [16, 2048, 32, 8, 64, 8192, 128_256, 131_072], true),
    shape("llama-3.2-3b", [28, 3072, 24, 8, 128, 8192, 128_256, 131_072], true),
    shape("llama-3.1-8b", [32, 4096, 32, 8, 128, 14_336, 128_256, 131_072], false),
    shape("qwen3-8b", [36, 4096, 32, 8, 128, 12_288, 151_936, 40_960], false),
    shape("qwen3-32b", [64, 5120, 64, 8, 128, 25_600, 151_936, 40_960], false),
    shape("llama-3.1-70b", [80, 8192, 64, 8, 128, 28_672, 128_256, 131_072], false),
];

/// The one of this name.
///
/// # Errors
/// Names those that are known.
pub fn model(name: &str) -> Result<&'static Shape, ProfileError> {
    MODELS
        .iter()
        .find(|model| model.name.eq_ignore_ascii_case(name))
        .ok_or_else(|| ProfileError::UnknownModel {
            name: name.to_owned(),
            known: MODELS.map(|model| model.name).join(", "),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_that_the_models_are_named_for() {
        for (name, billions) in [
            ("llama-3.1-8b", 8.03),
            ("llama-3.1-70b", 70.55),
            ("qwen3-32b", 32.76),
            ("smollm2-135m", 0.1345),
        ] {
            let weights = model(name).unwrap().weights() / 1e9;
            assert!((weights / billions - 1.0).abs() < 0.01, "{name}: {weights}");
        }
        assert_eq!(model("llama-3.1-8b").unwrap().kv_elements() * 2.0, 131_072.0);
        assert!(model("gpt").unwrap_err().to_string().contains("qwen3-8b"));
    }
}
