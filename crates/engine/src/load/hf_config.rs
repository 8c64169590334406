//! Hugging Face's config.json: Llama, Qwen2, Qwen3.

use super::limits;
use crate::error::LoadError;
use crate::model::{Architecture, ModelConfig, RopeScaling, RopeStyle};
use serde_json::Value;
use std::path::Path;

/// Parses `config.json` (and end tokens of `generation_config.json`, where there is one) of a model in `folder`.
///
/// # Errors
/// See [`LoadError`].
pub(super) fn read(folder: &Path) -> Result<ModelConfig, LoadError> {
    let path = folder.join("config.json");
    let json = parse(&path)?;
    let mut config = Reader {
        path: &path,
        json: &json,
    }
    .config(folder)?;
    let generation = folder.join("generation_config.json");
    if generation.is_file() {
        let json = parse(&generation)?;
        for token in (Reader {
            path: &generation,
            json: &json,
        })
        .eos_tokens()?
        {
            if !config.eos_tokens.contains(&token) {
                config.eos_tokens.push(token);
            }
        }
    }
    limits::check(&path, &config, hf_field)?;
    Ok(config)
}

fn parse(path: &Path) -> Result<Value, LoadError> {
    let bytes = std::fs::read(path).map_err(|source| LoadError::Io {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&bytes).map_err(|error| LoadError::Corrupt {
        path: path.to_owned(),
        field: "JSON".into(),
        reason: error.to_string(),
    })
}

struct Reader<'a> {
    path: &'a Path,
    json: &'a Value,
}

impl Reader<'_> {
    fn config(&self, folder: &Path) -> Result<ModelConfig, LoadError> {
        let architecture = self.architecture()?;
        self.refuse_features()?;
        let heads = self.count("num_attention_heads")?;
        let hidden = self.count("hidden_size")?;
        let head_dim = match self.optional_count("head_dim")? {
            Some(dim) => dim,
            None if heads == 0 || hidden % heads != 0 => {
                let expected = format!("a divisor of hidden_size {hidden}");
                return Err(limits::invalid(
                    self.path,
                    "num_attention_heads".into(),
                    heads,
                    expected,
                ));
            }
            None => hidden / heads,
        };
        let (rope_theta, rope_scaling) = self.rope()?;
        let name = folder
            .file_name()
            .map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
        Ok(ModelConfig {
            name: self
                .text("_name_or_path")
                .filter(|name| !name.is_empty())
                .map_or(name, str::to_owned),
            architecture,
            layers: self.count("num_hidden_layers")?,
            hidden,
            heads,
            kv_heads: self.optional_count("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            ffn: self.count("intermediate_size")?,
            vocab: self.count("vocab_size")?,
            context_tokens: self.count("max_position_embeddings")?,
            rope_theta,
            rope_style: RopeStyle::HalfSplit,
            rope_scaling,
            rms_eps: self
                .number(self.json, "rms_norm_eps")?
                .ok_or_else(|| self.missing("rms_norm_eps"))?,
            qkv_bias: architecture == Architecture::Qwen2,
            qk_norm: architecture == Architecture::Qwen3,
            tied_embeddings: self.flag("tie_word_embeddings"),
            eos_tokens: self.eos_tokens()?,
        })
    }

    fn architecture(&self) -> Result<Architecture, LoadError> {
        let first = self.json["architectures"].get(0).and_then(Value::as_str);
        let found = first
            .or_else(|| self.text("model_type"))
            .ok_or_else(|| self.missing("architectures"))?;
        match found {
            "LlamaForCausalLM" | "llama" => Ok(Architecture::Llama),
            "Qwen2ForCausalLM" | "qwen2" => Ok(Architecture::Qwen2),
            "Qwen3ForCausalLM" | "qwen3" => Ok(Architecture::Qwen3),
            other => Err(LoadError::UnsupportedArchitecture {
                path: self.path.to_owned(),
                found: other.to_owned(),
                supported: "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
            }),
        }
    }

    /// What would change the output if it were ignored.
    fn refuse_features(&self) -> Result<(), LoadError> {
        if let Some(act) = self.text("hidden_act").filter(|act| *act != "silu") {
            return Err(self.unsupported("hidden_act", act, "silu"));
        }
        for key in ["attention_bias", "mlp_bias", "use_sliding_window"] {
            if self.flag(key) {
                return Err(self.unsupported(key, true, "false"));
            }
        }
        if !self.json["quantization_config"].is_null() {
            return Err(self.unsupported("quantization_config", "present", "none: F32, F16 or BF16 weights"));
        }
        if let Some(kinds) = self.json["layer_types"].as_array()
            && let Some(other) = kinds.iter().find(|kind| kind.as_str() != Some("full_attention"))
        {
            return Err(self.unsupported("layer_types", other, "full_attention in each layer"));
        }
        let partial = self.number(self.json, "partial_rotary_factor")?;
        if let Some(factor) = partial.filter(|factor| *factor != 1.0) {
            return Err(self.unsupported("partial_rotary_factor", factor, "1"));
        }
        Ok(())
    }

    /// Base and scaling: `rope_theta` with `rope_scaling`, or both within `rope_parameters`.
    fn rope(&self) -> Result<(f32, RopeScaling), LoadError> {
        let nested = &self.json["rope_parameters"];
        let theta = match self.number(self.json, "rope_theta")? {
            Some(theta) => Some(theta),
            None => self.number(nested, "rope_theta")?,
        };
        let scaling = if nested.is_object() {
            nested
        } else {
            &self.json["rope_scaling"]
        };
        Ok((theta.unwrap_or(10_000.0), self.rope_scaling(scaling)?))
    }

    fn rope_scaling(&self, json: &Value) -> Result<RopeScaling, LoadError> {
        if json.is_null() {
            return Ok(RopeScaling::None);
        }
        let need = |key: &str| {
            self.number(json, key)?
                .ok_or_else(|| self.missing(&format!("rope_scaling.{key}")))
        };
        let kind = json
            .get("rope_type")
            .or_else(|| json.get("type"))
            .and_then(Value::as_str)
            .unwrap_or("default");
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear {
                factor: need("factor")?,
            }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_context: need("original_max_position_embeddings")? as u32,
            }),
            other => Err(self.unsupported("rope_scaling.rope_type", other, "default, linear or llama3")),
        }
    }

    /// `eos_token_id`: absent, one, or a list.
    fn eos_tokens(&self) -> Result<Vec<u32>, LoadError> {
        let value = &self.json["eos_token_id"];
        let one = |value: &Value| {
            let token = value.as_u64().and_then(|token| u32::try_from(token).ok());
            token.ok_or_else(|| limits::invalid(self.path, "eos_token_id".into(), value, "token ids".into()))
        };
        match value {
            Value::Null => Ok(Vec::new()),
            Value::Array(tokens) => tokens.iter().map(one).collect(),
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => Ok(vec![one(value)?]),
        }
    }

    fn count(&self, key: &str) -> Result<u32, LoadError> {
        self.optional_count(key)?.ok_or_else(|| self.missing(key))
    }

    fn optional_count(&self, key: &str) -> Result<Option<u32>, LoadError> {
        let value = &self.json[key];
        if value.is_null() {
            return Ok(None);
        }
        let count = value.as_u64().and_then(|count| u32::try_from(count).ok());
        let wrong = || limits::invalid(self.path, key.to_owned(), value, "a non-negative 32-bit integer".into());
        count.map(Some).ok_or_else(wrong)
    }

    fn number(&self, json: &Value, key: &str) -> Result<Option<f32>, LoadError> {
        match &json[key] {
            Value::Null => Ok(None),
            value => {
                let wrong = || limits::invalid(self.path, key.to_owned(), value, "a number".into());
                value.as_f64().map(|x| Some(x as f32)).ok_or_else(wrong)
            }
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.json[key].as_str()
    }

    fn flag(&self, key: &str) -> bool {
        self.json[key].as_bool().unwrap_or(false)
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

fn hf_field(name: &str) -> String {
    let key = match name {
        "layers" => "num_hidden_layers",
        "hidden" => "hidden_size",
        "ffn" => "intermediate_size",
        "heads" => "num_attention_heads",
        "kv_heads" => "num_key_value_heads",
        "vocab" => "vocab_size",
        "context" => "max_position_embeddings",
        "rms_eps" => "rms_norm_eps",
        "rope_factor" => "rope_scaling.factor",
        "low_freq_factor" | "high_freq_factor" => "rope_scaling.high_freq_factor less low_freq_factor",
        "original_context" => "rope_scaling.original_max_position_embeddings",
        other => other,
    };
    key.to_owned()
}
