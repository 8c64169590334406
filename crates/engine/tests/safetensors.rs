//! Random models in Hugging Face folders (Llama, Qwen2, Qwen3) against transformers in float32 on the same weights
//! (tests/golden/engine_random.py).

#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

mod common;

use baton_engine::{Architecture, WantedLogits};
use baton_types::KvDtype;
use common::{Rig, golden, options, paths, random_model};

/// Logits lie within -6..6. Only the order of additions differs: 0.0000035 at most.
const TOLERANCE: f32 = 0.00003;
/// The rounding of keys and values: 0.0023 (f16) and 0.025 (bf16) at most.
const TOLERANCE_F16: f32 = 0.01;
const TOLERANCE_BF16: f32 = 0.08;

#[test]
fn logits_are_those_of_the_reference() {
    for model in golden("engine_random.json").as_array().unwrap() {
        let label = model["label"].as_str().unwrap();
        let folder = tempfile::tempdir().unwrap();
        random_model::write(folder.path(), model);
        let tokens: Vec<u32> = model["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap() as u32)
            .collect();
        for isa in paths() {
            let dtypes = [
                (KvDtype::F32, TOLERANCE),
                (KvDtype::F16, TOLERANCE_F16),
                (KvDtype::Bf16, TOLERANCE_BF16),
            ];
            for (dtype, tolerance) in dtypes {
                let mut rig = Rig::new(folder.path(), &options(2, dtype, Some(isa)), 64);
                let rows = rig.run(&tokens, &[17, 5, 64], WantedLogits::All);
                let mut worst = 0.0f32;
                for row in model["rows"].as_array().unwrap() {
                    let ours = &rows[row["position"].as_u64().unwrap() as usize];
                    let theirs = row["logits"].as_array().unwrap();
                    assert_eq!(ours.len(), theirs.len());
                    for (x, y) in ours.iter().zip(theirs) {
                        worst = worst.max((x - y.as_f64().unwrap() as f32).abs());
                    }
                }
                println!("{label}, {isa}, KV {dtype:?}: largest difference {worst:.7}");
                assert!(
                    worst < tolerance,
                    "{label}, {isa}, KV {dtype:?}: a logit differs by {worst}"
                );
            }
        }
    }
}

#[test]
fn configurations_are_understood() {
    let models = golden("engine_random.json");
    let configs: Vec<_> = models
        .as_array()
        .unwrap()
        .iter()
        .map(|model| {
            let folder = tempfile::tempdir().unwrap();
            random_model::write(folder.path(), model);
            Rig::new(folder.path(), &options(1, KvDtype::F16, None), 16)
                .backend
                .config()
                .clone()
        })
        .collect();
    assert_eq!(configs[0].architecture, Architecture::Llama);
    assert_eq!((configs[0].head_dim, configs[0].tied_embeddings), (16, false));
    assert_eq!((configs[1].rope_theta, configs[1].tied_embeddings), (50_000.0, true));
    assert_eq!(
        (configs[2].architecture, configs[2].qkv_bias),
        (Architecture::Qwen2, true)
    );
    assert_eq!(configs[2].eos_tokens, [2, 5]);
    assert_eq!(
        (configs[3].architecture, configs[3].qk_norm),
        (Architecture::Qwen3, true)
    );
    assert_eq!(
        (configs[3].head_dim, configs[3].kv_heads, configs[3].vocab),
        (32, 2, 256)
    );
}
