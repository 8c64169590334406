//! Hyperparameters of a model, as every part of the engine needs them. Made and checked by the loaders.

use baton_types::{KvDtype, KvGeometry};

/// Families of models that run here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama and what shares its shape (SmolLM2, ...).
    Llama,
    /// Llama's shape with a bias on q, k and v.
    Qwen2,
    /// Llama's shape with an RMS norm on each head of q and k.
    Qwen3,
}

impl Architecture {
    /// Its name as GGUF writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// Which elements of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RopeStyle {
    /// `(2i, 2i + 1)`: GGUF files of the llama architecture, whose Q/K rows are permuted for it.
    Interleaved,
    /// `(i, i + head_dim / 2)`: Hugging Face's order.
    HalfSplit,
}

/// How rotary frequencies are stretched beyond the trained context.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// Divisor.
        factor: f32,
    },
    /// Llama 3.1: by wavelength, smoothly between two borders.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f32,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Wavelengths below `original_context / high_freq_factor` stay.
        high_freq_factor: f32,
        /// Context that the model was first trained with, in tokens.
        original_context: u32,
    },
    /// Frequency `i` divided by `factors[i]`: how GGUF files carry Llama 3.1's. `(head_dim / 2,)`.
    Factors(Vec<f32>),
}

/// Hyperparameters. Checked: every count is positive, heads are a multiple of kv_heads, head_dim is even.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// What the file calls itself.
    pub name: String,
    /// Family.
    pub architecture: Architecture,
    /// Transformer layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// Width of the feed-forward layer.
    pub ffn: u32,
    /// Token ids are below it.
    pub vocab: u32,
    /// Longest sequence, in tokens.
    pub context_tokens: u32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Which elements rotate together.
    pub rope_style: RopeStyle,
    /// How frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// Added to the mean square in RMS norms.
    pub rms_eps: f32,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether each head of q and k has an RMS norm.
    pub qk_norm: bool,
    /// Whether the output matrix is the embedding.
    pub tied_embeddings: bool,
    /// Tokens that end a text.
    pub eos_tokens: Vec<u32>,
}

impl ModelConfig {
    /// Width of all query heads together.
    pub fn q_width(&self) -> u32 {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> u32 {
        self.kv_heads * self.head_dim
    }

    /// The shape of this model's KV.
    pub fn kv_geometry(&self, block_tokens: u32, dtype: KvDtype) -> KvGeometry {
        KvGeometry {
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            block_tokens,
            dtype,
        }
    }
}
