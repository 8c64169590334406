//! Names of weights in the two families of files, and weights as files hold them.

use super::ModelConfig;

/// Element types that files use and we read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum ElementType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
}

impl ElementType {
    /// For messages.
    pub(crate) const SUPPORTED: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1";

    /// Its name in fingerprints and messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
        }
    }

    /// Elements of one block.
    pub(crate) fn block_elements(self) -> u64 {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
        }
    }

    /// Bytes of one block.
    pub(crate) fn block_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
        }
    }
}

/// A weight in its file.
#[derive(Debug, Clone)]
pub(crate) struct Tensor<'a> {
    /// Element type.
    pub element: ElementType,
    /// Outermost dimension first.
    pub shape: Vec<u64>,
    /// Elements in row order.
    pub data: &'a [u8],
}

/// A weight by its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TensorName {
    Embedding,
    FinalNorm,
    Head,
    AttentionNorm(u32),
    Query(u32),
    Key(u32),
    Value(u32),
    QueryBias(u32),
    KeyBias(u32),
    ValueBias(u32),
    QueryNorm(u32),
    KeyNorm(u32),
    AttentionOut(u32),
    FfnNorm(u32),
    Gate(u32),
    Up(u32),
    Down(u32),
}

/// Who named the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    Gguf,
    HuggingFace,
}

impl TensorName {
    /// Its name in a file.
    pub(crate) fn in_file(self, naming: Naming) -> String {
        match naming {
            Naming::Gguf => self.gguf(),
            Naming::HuggingFace => self.hugging_face(),
        }
    }

    fn gguf(self) -> String {
        let (layer, part) = match self {
            Self::Embedding => return "token_embd.weight".into(),
            Self::FinalNorm => return "output_norm.weight".into(),
            Self::Head => return "output.weight".into(),
            Self::AttentionNorm(layer) => (layer, "attn_norm.weight"),
            Self::Query(layer) => (layer, "attn_q.weight"),
            Self::Key(layer) => (layer, "attn_k.weight"),
            Self::Value(layer) => (layer, "attn_v.weight"),
            Self::QueryBias(layer) => (layer, "attn_q.bias"),
            Self::KeyBias(layer) => (layer, "attn_k.bias"),
            Self::ValueBias(layer) => (layer, "attn_v.bias"),
            Self::QueryNorm(layer) => (layer, "attn_q_norm.weight"),
            Self::KeyNorm(layer) => (layer, "attn_k_norm.weight"),
            Self::AttentionOut(layer) => (layer, "attn_output.weight"),
            Self::FfnNorm(layer) => (layer, "ffn_norm.weight"),
            Self::Gate(layer) => (layer, "ffn_gate.weight"),
            Self::Up(layer) => (layer, "ffn_up.weight"),
            Self::Down(layer) => (layer, "ffn_down.weight"),
        };
        format!("blk.{layer}.{part}")
    }

    fn hugging_face(self) -> String {
        let (layer, part) = match self {
            Self::Embedding => return "model.embed_tokens.weight".into(),
            Self::FinalNorm => return "model.norm.weight".into(),
            Self::Head => return "lm_head.weight".into(),
            Self::AttentionNorm(layer) => (layer, "input_layernorm.weight"),
            Self::Query(layer) => (layer, "self_attn.q_proj.weight"),
            Self::Key(layer) => (layer, "self_attn.k_proj.weight"),
            Self::Value(layer) => (layer, "self_attn.v_proj.weight"),
            Self::QueryBias(layer) => (layer, "self_attn.q_proj.bias"),
            Self::KeyBias(layer) => (layer, "self_attn.k_proj.bias"),
            Self::ValueBias(layer) => (layer, "self_attn.v_proj.bias"),
            Self::QueryNorm(layer) => (layer, "self_attn.q_norm.weight"),
            Self::KeyNorm(layer) => (layer, "self_attn.k_norm.weight"),
            Self::AttentionOut(layer) => (layer, "self_attn.o_proj.weight"),
            Self::FfnNorm(layer) => (layer, "post_attention_layernorm.weight"),
            Self::Gate(layer) => (layer, "mlp.gate_proj.weight"),
            Self::Up(layer) => (layer, "mlp.up_proj.weight"),
            Self::Down(layer) => (layer, "mlp.down_proj.weight"),
        };
        format!("model.layers.{layer}.{part}")
    }

    /// The shape that the hyperparameters ask for, outermost dimension first.
    pub(crate) fn shape(self, config: &ModelConfig) -> Vec<u64> {
        let [hidden, vocab, ffn, q, kv, head] = [
            config.hidden,
            config.vocab,
            config.ffn,
            config.q_width(),
            config.kv_width(),
            config.head_dim,
        ]
        .map(u64::from);
        match self {
            Self::Embedding | Self::Head => vec![vocab, hidden],
            Self::FinalNorm | Self::AttentionNorm(_) | Self::FfnNorm(_) => vec![hidden],
            Self::Query(_) => vec![q, hidden],
            Self::Key(_) | Self::Value(_) => vec![kv, hidden],
            Self::QueryBias(_) => vec![q],
            Self::KeyBias(_) | Self::ValueBias(_) => vec![kv],
            Self::QueryNorm(_) | Self::KeyNorm(_) => vec![head],
            Self::AttentionOut(_) => vec![hidden, q],
            Self::Gate(_) | Self::Up(_) => vec![ffn, hidden],
            Self::Down(_) => vec![hidden, ffn],
        }
    }
}
