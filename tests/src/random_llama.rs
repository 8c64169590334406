//! Small Llama models with random weights, as Hugging Face folders: for machines that are too slow for a real model. The
//! same shape gives the same bytes everywhere.

use anyhow::Result;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// A model's shape.
#[derive(Clone, Copy, Debug)]
pub struct RandomLlama {
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads; each key/value head serves one.
    pub heads: usize,
    /// Width of the feed-forward part.
    pub ffn: usize,
    /// Longest sequence.
    pub context_tokens: usize,
}

/// One token per byte.
const BYTES: usize = 256;
/// The token that ends a text, behind the bytes.
const END: &str = "<|end|>";

impl RandomLlama {
    /// 4 layers of 128: about a million operations a token.
    pub const TINY: Self = Self {
        layers: 4,
        hidden: 128,
        heads: 4,
        ffn: 128,
        context_tokens: 2048,
    };

    /// Writes config, tokenizer and weights into `folder`, which exists.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        fs::write(folder.join("config.json"), self.config().to_string())?;
        fs::write(folder.join("tokenizer.json"), tokenizer().to_string())?;
        let template = "{% for message in messages %}{{ message.content }}\n{% endfor %}";
        let tokenizer_config = json!({"eos_token": END, "add_bos_token": false, "chat_template": template});
        fs::write(folder.join("tokenizer_config.json"), tokenizer_config.to_string())?;
        fs::write(folder.join("model.safetensors"), self.weights())?;
        Ok(())
    }

    fn vocab(&self) -> usize {
        BYTES + 1
    }

    fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab(),
            "max_position_embeddings": self.context_tokens,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": false,
            "eos_token_id": BYTES,
        })
    }

    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let square = vec![self.hidden, self.hidden];
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_owned(), vec![self.vocab(), self.hidden]),
            ("model.norm.weight".to_owned(), vec![self.hidden]),
            ("lm_head.weight".to_owned(), vec![self.vocab(), self.hidden]),
        ];
        for layer in 0..self.layers {
            let parts = [
                ("input_layernorm", vec![self.hidden]),
                ("self_attn.q_proj", square.clone()),
                ("self_attn.k_proj", square.clone()),
                ("self_attn.v_proj", square.clone()),
                ("self_attn.o_proj", square.clone()),
                ("post_attention_layernorm", vec![self.hidden]),
                ("mlp.gate_proj", vec![self.ffn, self.hidden]),
                ("mlp.up_proj", vec![self.ffn, self.hidden]),
                ("mlp.down_proj", vec![self.hidden, self.ffn]),
            ];
            tensors.extend(
                parts
                    .into_iter()
                    .map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)),
            );
        }
        tensors
    }

    /// A safetensors file: the header's length, the header in JSON, the elements.
    fn weights(&self) -> Vec<u8> {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
        for (name, shape) in self.tensors() {
            let begin = data.len();
            data.extend(elements(&name, &shape).flat_map(f32::to_le_bytes));
            let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]});
            header.insert(name, entry);
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.append(&mut header);
        file.append(&mut data);
        file
    }
}

/// Elements of a tensor, by its name alone (SplitMix64 from FNV-1a of the name); wide enough that attention is sharp and
/// each token of the context counts.
fn elements(name: &str, shape: &[usize]) -> impl Iterator<Item = f32> + use<> {
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    let count: usize = shape.iter().product();
    let is_norm = name.ends_with("norm.weight");
    let scale = 4.0 / (*shape.last().unwrap_or(&1) as f32).sqrt();
    (1..=count as u64).map(move |i| {
        let mut z = seed.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        let unit = (z >> 40) as f32 / 16_777_216.0 - 0.5;
        if is_norm { 1.0 + unit * 0.5 } else { unit * scale }
    })
}

/// Byte-level, without merges: each byte is a token, its id the byte's place in GPT-2's alphabet of printable characters.
fn tokenizer() -> Value {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut vocab = serde_json::Map::new();
    let mut others = 0;
    for byte in 0..BYTES as u32 {
        let shown = if printable(byte) {
            byte
        } else {
            others += 1;
            255 + others
        };
        let character = char::from_u32(shown).expect("below the surrogates");
        vocab.insert(character.to_string(), json!(byte));
    }
    vocab.insert(END.to_owned(), json!(BYTES));
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0",
        "added_tokens": [{"id": BYTES, "content": END, "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_has_what_a_node_reads() {
        let folder = tempfile::tempdir().expect("a folder");
        RandomLlama::TINY.write(folder.path()).expect("written");
        let weights = fs::read(folder.path().join("model.safetensors")).expect("read");
        let header = u64::from_le_bytes(weights[..8].try_into().expect("eight bytes")) as usize;
        let tensors: Value = serde_json::from_slice(&weights[8..8 + header]).expect("JSON");
        assert_eq!(tensors.as_object().map(serde_json::Map::len), Some(3 + 9 * 4));
        let elements = 2 * 257 * 128 + 128 + 4 * (2 * 128 + 7 * 128 * 128);
        assert_eq!(weights.len(), 8 + header + 4 * elements);
        assert_eq!(
            tokenizer()["model"]["vocab"].as_object().map(serde_json::Map::len),
            Some(257)
        );
    }
}
