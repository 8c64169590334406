//! The shape of KV in memory, and the states that a block can be in.

use serde::{Deserialize, Serialize};

/// Element type of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// IEEE half precision.
    #[default]
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision.
    F32,
    /// Eight-bit integers; each row (one token's key or value of one head) has a scale in half precision.
    Q8,
}

impl KvDtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Q8 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    /// Bytes of one row's scale; 0 where rows have none.
    pub fn scale_bytes(self) -> usize {
        match self {
            Self::Q8 => 2,
            Self::F16 | Self::Bf16 | Self::F32 => 0,
        }
    }
}

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvPart {
    /// Keys, rotated.
    Key,
    /// Values.
    Value,
}

/// The shape of one model's KV. Block-major layout, `[block][layer][k|v][kv_head]` and then a lane: one block of all
/// layers is one contiguous extent; one layer of it is a contiguous part of that extent.
///
/// A lane of keys is `[head_dim][token]`, so that attention finds the same element of neighbouring tokens side by side; a
/// lane of values is `[token][head_dim]`. Behind them stand the lane's scales, `[token]`, where the type has any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KvGeometry {
    /// Transformer layers.
    pub layers: u32,
    /// Key/value heads per layer.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Element type.
    pub dtype: KvDtype,
}

/// Two nodes whose KV has different shapes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("KV geometry differs in {field}: {ours} here, {theirs} there")]
pub struct GeometryMismatch {
    /// Name of the first differing field.
    pub field: &'static str,
    /// This node's value.
    pub ours: String,
    /// The other's value.
    pub theirs: String,
}

impl KvGeometry {
    /// Bytes of a lane: one head's keys (or values) of one layer in one block, `(block_tokens, head_dim)` elements and
    /// their scales.
    pub fn head_bytes(&self) -> usize {
        self.block_tokens as usize * (self.head_dim as usize * self.dtype.bytes() + self.dtype.scale_bytes())
    }

    /// First byte of a lane within its block.
    pub fn lane_at(&self, layer: usize, part: KvPart, head: usize) -> usize {
        let heads_before = match part {
            KvPart::Key => 0,
            KvPart::Value => self.kv_heads as usize,
        };
        layer * self.layer_bytes() + (heads_before + head) * self.head_bytes()
    }

    /// First byte, within its lane, of element `dim` of the token in `slot`.
    pub fn element_at(&self, part: KvPart, slot: usize, dim: usize) -> usize {
        let element = match part {
            KvPart::Key => dim * self.block_tokens as usize + slot,
            KvPart::Value => slot * self.head_dim as usize + dim,
        };
        element * self.dtype.bytes()
    }

    /// First byte, within its lane, of the scale of the token in `slot`.
    pub fn scale_at(&self, slot: usize) -> usize {
        self.block_tokens as usize * self.head_dim as usize * self.dtype.bytes() + slot * self.dtype.scale_bytes()
    }

    /// Bytes of one layer, keys and values, of one block.
    pub fn layer_bytes(&self) -> usize {
        2 * self.kv_heads as usize * self.head_bytes()
    }

    /// Bytes of one block, all layers: the distance between two blocks in the arena.
    pub fn block_bytes(&self) -> usize {
        self.layers as usize * self.layer_bytes()
    }

    /// Bytes that one token takes.
    pub fn token_bytes(&self) -> usize {
        self.block_bytes() / self.block_tokens as usize
    }

    /// Blocks that hold `tokens` tokens.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens as usize)
    }

    /// Refuses a peer whose KV has another shape.
    ///
    /// # Errors
    /// The first differing field, by name.
    pub fn check_same(&self, theirs: &Self) -> Result<(), GeometryMismatch> {
        let fields = [
            ("layers", self.layers.to_string(), theirs.layers.to_string()),
            ("kv_heads", self.kv_heads.to_string(), theirs.kv_heads.to_string()),
            ("head_dim", self.head_dim.to_string(), theirs.head_dim.to_string()),
            (
                "block_tokens",
                self.block_tokens.to_string(),
                theirs.block_tokens.to_string(),
            ),
            ("dtype", format!("{:?}", self.dtype), format!("{:?}", theirs.dtype)),
        ];
        match fields.into_iter().find(|(_, ours, theirs)| ours != theirs) {
            Some((field, ours, theirs)) => Err(GeometryMismatch { field, ours, theirs }),
            None => Ok(()),
        }
    }
}

/// How many blocks of an arena are in each state. Every block is in exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BlockCounts {
    /// All of them.
    pub total: u32,
    /// Hold nothing.
    pub free: u32,
    /// Hold a committed prefix that no sequence uses.
    pub cached: u32,
    /// Stand in a sequence's table, or a hand-over reads from them.
    pub referenced: u32,
    /// Granted to a writer on another node.
    pub reserved: u32,
    /// Given up, but not yet proven unwritable.
    pub quarantined: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMOL: KvGeometry = KvGeometry {
        layers: 30,
        kv_heads: 3,
        head_dim: 64,
        block_tokens: 16,
        dtype: KvDtype::F16,
    };

    #[test]
    fn sizes_of_a_known_model() {
        assert_eq!(SMOL.token_bytes(), 23_040);
        assert_eq!(SMOL.block_bytes(), 368_640);
        assert_eq!(SMOL.blocks_for(0), 0);
        assert_eq!(SMOL.blocks_for(16), 1);
        assert_eq!(SMOL.blocks_for(17), 2);
    }

    #[test]
    fn eight_bits_take_half_and_the_scales() {
        let q8 = KvGeometry {
            dtype: KvDtype::Q8,
            ..SMOL
        };
        assert_eq!(q8.head_bytes(), 16 * 64 + 16 * 2);
        assert_eq!((q8.block_bytes(), q8.token_bytes()), (190_080, 11_880));
        assert_eq!(q8.check_same(&SMOL).map_err(|e| e.field), Err("dtype"));
    }

    #[test]
    fn the_elements_of_a_block_do_not_overlap() {
        for dtype in [KvDtype::F16, KvDtype::F32, KvDtype::Q8] {
            let small = KvGeometry {
                layers: 2,
                kv_heads: 3,
                head_dim: 6,
                block_tokens: 5,
                dtype,
            };
            let mut taken = vec![0; small.block_bytes()];
            for (layer, head, part) in (0..2)
                .flat_map(|layer| (0..3).map(move |head| (layer, head)))
                .flat_map(|(layer, head)| [KvPart::Key, KvPart::Value].map(|part| (layer, head, part)))
            {
                let lane = small.lane_at(layer, part, head);
                for slot in 0..5 {
                    let elements = (0..6).map(|dim| (small.element_at(part, slot, dim), dtype.bytes()));
                    for (at, len) in elements.chain([(small.scale_at(slot), dtype.scale_bytes())]) {
                        taken[lane + at..lane + at + len]
                            .iter_mut()
                            .for_each(|count| *count += 1);
                    }
                }
            }
            assert!(taken.iter().all(|count| *count == 1), "{dtype:?}");
        }
    }

    #[test]
    fn a_mismatch_names_its_field() {
        let other = KvGeometry {
            block_tokens: 32,
            ..SMOL
        };
        assert_eq!(SMOL.check_same(&other).map_err(|e| e.field), Err("block_tokens"));
        assert_eq!(SMOL.check_same(&SMOL), Ok(()));
    }
}
