//! Checks that hyperparameters of either format must pass before anything is computed from them.

use crate::error::LoadError;
use crate::model::{ModelConfig, RopeScaling};
use std::path::Path;

/// Far above every known model, far below what overflows.
const LAYERS_MAX: u32 = 4_096;
const WIDTH_MAX: u32 = 1 << 20;
const HEADS_MAX: u32 = 4_096;
const HEAD_DIM_MAX: u32 = 4_096;
const VOCAB_MAX: u32 = 1 << 24;

/// Refuses a configuration that makes no sense. `field` gives a field's name in the file's words.
pub(super) fn check(path: &Path, config: &ModelConfig, field: impl Fn(&str) -> String) -> Result<(), LoadError> {
    let within = |name: &str, value: u32, max: u32| {
        if value >= 1 && value <= max {
            Ok(())
        } else {
            Err(invalid(path, field(name), value, format!("1 to {max}")))
        }
    };
    within("layers", config.layers, LAYERS_MAX)?;
    within("hidden", config.hidden, WIDTH_MAX)?;
    within("ffn", config.ffn, WIDTH_MAX)?;
    within("heads", config.heads, HEADS_MAX)?;
    within("kv_heads", config.kv_heads, HEADS_MAX)?;
    within("head_dim", config.head_dim, HEAD_DIM_MAX)?;
    within("vocab", config.vocab, VOCAB_MAX)?;
    within("context", config.context_tokens, u32::MAX)?;
    if !config.heads.is_multiple_of(config.kv_heads) {
        return Err(invalid(
            path,
            field("kv_heads"),
            config.kv_heads,
            format!("a divisor of {} heads", config.heads),
        ));
    }
    if !config.head_dim.is_multiple_of(2) {
        return Err(invalid(
            path,
            field("head_dim"),
            config.head_dim,
            "an even number".into(),
        ));
    }
    let positive = |name: &str, value: f32| {
        if value.is_finite() && value > 0.0 {
            Ok(())
        } else {
            Err(invalid(path, field(name), value, "a positive number".into()))
        }
    };
    positive("rope_theta", config.rope_theta)?;
    positive("rms_eps", config.rms_eps)?;
    match &config.rope_scaling {
        RopeScaling::None => Ok(()),
        RopeScaling::Linear { factor } => positive("rope_factor", *factor),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } => {
            positive("rope_factor", *factor)?;
            positive("low_freq_factor", *low_freq_factor)?;
            positive("high_freq_factor", *high_freq_factor)?;
            positive("original_context", *original_context as f32)?;
            positive("high_freq_factor", high_freq_factor - low_freq_factor)
        }
        RopeScaling::Factors(factors) => factors.iter().try_for_each(|factor| positive("rope_factor", *factor)),
    }
}

/// A value that makes no sense.
pub(super) fn invalid(path: &Path, field: String, found: impl ToString, expected: String) -> LoadError {
    LoadError::InvalidField {
        path: path.to_owned(),
        field,
        found: found.to_string(),
        expected,
    }
}
