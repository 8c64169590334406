//! What is measured: blocks of some size, or the blocks of real models.

use baton_types::{KvDtype, KvGeometry};

/// One kind of block.
#[derive(Debug, Clone)]
pub struct Case {
    /// The model whose block it is, where it is one's.
    pub model: Option<&'static str>,
    pub geometry: KvGeometry,
    /// Bytes of a block, as asked for.
    pub bytes: usize,
}

/// A model's KV per token, in elements of 2 bytes: layers, and heads and width such that keys and values are
/// `2 * heads * width` elements.
pub struct Model {
    name: &'static str,
    layers: u32,
    heads: u32,
    width: u32,
}

/// Whole blocks of these are measured by `--pages`.
pub const PAGES: [Model; 6] = [
    model("Llama-3.1-8B", 32, 8, 128),
    model("Llama-3.1-70B", 80, 8, 128),
    model("Llama-3.1-70B TP8 rank", 80, 1, 128),
    model("Qwen3-8B", 36, 8, 128),
    model("Qwen3-235B", 94, 4, 128),
    // One latent of 576 elements instead of keys and values: the same bytes as two halves of 288.
    model("DeepSeek-V3 MLA", 61, 1, 288),
];

const fn model(name: &'static str, layers: u32, heads: u32, width: u32) -> Model {
    Model {
        name,
        layers,
        heads,
        width,
    }
}

impl Case {
    /// Blocks of one layer of so many bytes.
    pub fn block(bytes: u32) -> Self {
        let geometry = KvGeometry {
            layers: 1,
            kv_heads: 1,
            head_dim: bytes / 64,
            block_tokens: 16,
            dtype: KvDtype::Bf16,
        };
        Self {
            model: None,
            geometry,
            bytes: bytes as usize,
        }
    }

    /// A model's blocks of 16 and of 64 tokens.
    pub fn pages(model: &Model) -> [Self; 2] {
        [16, 64].map(|block_tokens| {
            let geometry = KvGeometry {
                layers: model.layers,
                kv_heads: model.heads,
                head_dim: model.width,
                block_tokens,
                dtype: KvDtype::Bf16,
            };
            Self {
                model: Some(model.name),
                geometry,
                bytes: geometry.block_bytes(),
            }
        })
    }

    /// Blocks that fit into so many bytes.
    pub fn blocks_in(&self, bytes: usize) -> usize {
        bytes / self.bytes
    }
}
