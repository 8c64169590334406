//! GGUF models of the llama architecture.

use super::checkpoint::Checkpoint;
use super::gguf_header;
use super::limits;
use super::mapped::Mapped;
use crate::error::LoadError;
use crate::model::{Architecture, ElementType, ModelConfig, Naming, RopeScaling, RopeStyle};
use baton_gguf::{Header, Value};
use std::path::Path;

/// Maps and checks a file.
///
/// # Errors
/// See [`LoadError`].
pub(super) fn open(path: &Path) -> Result<Checkpoint, LoadError> {
    let file = Mapped::open(path)?;
    let header = gguf_header::parse(path, file.bytes())?;
    let config = Reader { path, header: &header }.config(file.bytes())?;
    let entries = header.tensors.into_iter();
    let entries = entries
        .map(|(name, tensor)| (name, gguf_header::entry(tensor)))
        .collect();
    Ok(Checkpoint {
        config,
        path: path.to_owned(),
        naming: Naming::Gguf,
        files: vec![file],
        entries,
    })
}

/// Reads hyperparameters out of metadata.
struct Reader<'a> {
    path: &'a Path,
    header: &'a Header,
}

impl Reader<'_> {
    fn config(&self, data: &[u8]) -> Result<ModelConfig, LoadError> {
        let architecture = self
            .text("general.architecture")?
            .ok_or_else(|| self.missing("general.architecture"))?;
        if architecture != "llama" {
            return Err(LoadError::UnsupportedArchitecture {
                path: self.path.to_owned(),
                found: architecture.to_owned(),
                supported: "llama (GGUF), and llama, qwen2, qwen3 (safetensors)",
            });
        }
        self.refuse_features()?;
        let heads = self.count("llama.attention.head_count")?;
        let hidden = self.count("llama.embedding_length")?;
        let head_dim = match self.optional_count("llama.attention.key_length")? {
            Some(dim) => dim,
            None if heads == 0 || hidden % heads != 0 => {
                let expected = format!("a divisor of the embedding length {hidden}");
                return Err(limits::invalid(
                    self.path,
                    "llama.attention.head_count".into(),
                    heads,
                    expected,
                ));
            }
            None => hidden / heads,
        };
        self.same("llama.attention.value_length", head_dim)?;
        self.same("llama.rope.dimension_count", head_dim)?;
        let tensors = &self.header.tensors;
        let Some([vocab, _]) = tensors.get("token_embd.weight").map(|tensor| &tensor.shape[..]) else {
            let tensor = "token_embd.weight".to_owned();
            return Err(LoadError::MissingTensor {
                path: self.path.to_owned(),
                tensor,
            });
        };
        let config = ModelConfig {
            name: self.text("general.name")?.unwrap_or("llama").to_owned(),
            architecture: Architecture::Llama,
            layers: self.count("llama.block_count")?,
            hidden,
            heads,
            kv_heads: self.optional_count("llama.attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            ffn: self.count("llama.feed_forward_length")?,
            vocab: u32::try_from(*vocab).unwrap_or(u32::MAX),
            context_tokens: self.count("llama.context_length")?,
            rope_theta: self.number("llama.rope.freq_base")?.unwrap_or(10_000.0),
            rope_style: RopeStyle::Interleaved,
            rope_scaling: self.rope_scaling(data, head_dim)?,
            rms_eps: {
                let key = "llama.attention.layer_norm_rms_epsilon";
                self.number(key)?.ok_or_else(|| self.missing(key))?
            },
            qkv_bias: tensors.contains_key("blk.0.attn_q.bias"),
            qk_norm: false,
            tied_embeddings: !tensors.contains_key("output.weight"),
            eos_tokens: self.eos_tokens()?,
        };
        limits::check(self.path, &config, gguf_field)?;
        Ok(config)
    }

    /// What would change the output if it were ignored.
    fn refuse_features(&self) -> Result<(), LoadError> {
        for key in ["llama.expert_count", "llama.attention.sliding_window"] {
            if let Some(count) = self.optional_count(key)?.filter(|count| *count != 0) {
                return Err(self.unsupported(key, count, "0: mixtures of experts and windows do not run here"));
            }
        }
        Ok(())
    }

    fn rope_scaling(&self, data: &[u8], head_dim: u32) -> Result<RopeScaling, LoadError> {
        let name = "rope_freqs.weight";
        if let Some(tensor) = self.header.tensors.get(name).cloned().map(gguf_header::entry) {
            let expected = vec![u64::from(head_dim / 2)];
            let (path, wrong) = (self.path.to_owned(), name.to_owned());
            if tensor.shape != expected {
                return Err(LoadError::WrongShape {
                    path,
                    tensor: wrong,
                    found: tensor.shape,
                    expected,
                });
            }
            if tensor.element != Ok(ElementType::F32) {
                return Err(LoadError::UnsupportedTensorType {
                    path,
                    tensor: wrong,
                    found: tensor
                        .element
                        .map_or_else(|name| name, |element| element.name().to_owned()),
                    supported: "F32",
                });
            }
            let bytes = data[tensor.bytes].chunks_exact(4);
            return Ok(RopeScaling::Factors(
                bytes.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            ));
        }
        let legacy = self.number("llama.rope.scale_linear")?;
        let factor = self.number("llama.rope.scaling.factor")?.or(legacy);
        match (self.text("llama.rope.scaling.type")?, factor) {
            (Some("none"), _) | (None, None) => Ok(RopeScaling::None),
            (Some("linear") | None, Some(factor)) => Ok(RopeScaling::Linear { factor }),
            (Some("linear"), None) => Err(self.missing("llama.rope.scaling.factor")),
            (Some(other), _) => Err(self.unsupported("llama.rope.scaling.type", other, "none or linear")),
        }
    }

    fn eos_tokens(&self) -> Result<Vec<u32>, LoadError> {
        let mut tokens = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
            tokens.extend(self.optional_count(key)?.filter(|token| !tokens.contains(token)));
        }
        Ok(tokens)
    }

    fn count(&self, key: &str) -> Result<u32, LoadError> {
        self.optional_count(key)?.ok_or_else(|| self.missing(key))
    }

    /// A non-negative integer; of an array (one entry per layer), the value that all entries share.
    fn optional_count(&self, key: &str) -> Result<Option<u32>, LoadError> {
        let Some(value) = self.header.metadata.get(key) else {
            return Ok(None);
        };
        let found = match value.as_integers() {
            Some([first, rest @ ..]) if rest.iter().any(|number| number != first) => {
                return Err(self.unsupported(key, "different in each layer", "one value for all layers"));
            }
            Some(numbers) => numbers.first().and_then(|number| u32::try_from(*number).ok()),
            None => value.as_u32(),
        };
        let expected = || "a non-negative 32-bit integer".to_owned();
        let wrong = || limits::invalid(self.path, key.to_owned(), value, expected());
        found.map(Some).ok_or_else(wrong)
    }

    fn number(&self, key: &str) -> Result<Option<f32>, LoadError> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) => Ok(Some(*x as f32)),
            Some(Value::Integer(n)) => Ok(Some(*n as f32)),
            Some(other) => Err(limits::invalid(self.path, key.to_owned(), other, "a number".into())),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&str>, LoadError> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(limits::invalid(self.path, key.to_owned(), other, "a string".into())),
        }
    }

    fn same(&self, key: &str, expected: u32) -> Result<(), LoadError> {
        match self.optional_count(key)? {
            Some(found) if found != expected => {
                Err(self.unsupported(key, found, &format!("{expected}, the head's size")))
            }
            _ => Ok(()),
        }
    }

    fn missing(&self, field: &str) -> LoadError {
        LoadError::MissingField {
            path: self.path.to_owned(),
            field: field.to_owned(),
        }
    }

    fn unsupported(&self, field: &str, found: impl ToString, expected: &str) -> LoadError {
        LoadError::UnsupportedFeature {
            path: self.path.to_owned(),
            field: field.to_owned(),
            found: found.to_string(),
            expected: expected.to_owned(),
        }
    }
}

fn gguf_field(name: &str) -> String {
    let key = match name {
        "layers" => "llama.block_count",
        "hidden" => "llama.embedding_length",
        "ffn" => "llama.feed_forward_length",
        "heads" => "llama.attention.head_count",
        "kv_heads" => "llama.attention.head_count_kv",
        "head_dim" => "llama.attention.key_length",
        "vocab" => "rows of token_embd.weight",
        "context" => "llama.context_length",
        "rope_theta" => "llama.rope.freq_base",
        "rms_eps" => "llama.attention.layer_norm_rms_epsilon",
        _ => "llama.rope.scaling.factor",
    };
    key.to_owned()
}
