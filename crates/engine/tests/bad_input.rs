//! Broken files and impossible steps: each an error that names what is wrong, none a panic.

#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

mod common;

use baton_engine::{LoadError, Slice, StepError, Unobserved, WantedLogits, load};
use baton_types::{ArenaView, BlockId, KvDtype};
use common::{Rig, golden, options, random_model, real_model};
use serde_json::{Value, json};
use std::path::Path;

fn load_error(path: &Path) -> LoadError {
    let error = load(path, &options(1, KvDtype::F16, None), &mut |_, _| {})
        .err()
        .expect("it must not load");
    assert!(!error.is_retryable());
    error
}

/// A GGUF header, field by field.
#[derive(Default)]
struct Header {
    metadata: Vec<(String, u32, Vec<u8>)>,
    /// Name, dimensions (innermost first), type, offset.
    tensors: Vec<(String, Vec<u64>, u32, u64)>,
    data: Vec<u8>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl Header {
    /// A llama of one layer: hidden 32, two heads, ffn 32, vocab 4, with f32 weights.
    fn llama() -> Self {
        let mut header = Self::default();
        header.put("general.architecture", 8, &text("llama"));
        for (key, value) in [
            ("block_count", 1u32),
            ("embedding_length", 32),
            ("feed_forward_length", 32),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("context_length", 64),
        ] {
            header.put(&format!("llama.{key}"), 4, &value.to_le_bytes());
        }
        header.put("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes());
        for (name, shape) in [
            ("token_embd.weight", &[32, 4][..]),
            ("output_norm.weight", &[32]),
            ("blk.0.attn_norm.weight", &[32]),
            ("blk.0.attn_q.weight", &[32, 32]),
            ("blk.0.attn_k.weight", &[32, 16]),
            ("blk.0.attn_v.weight", &[32, 16]),
            ("blk.0.attn_output.weight", &[32, 32]),
            ("blk.0.ffn_norm.weight", &[32]),
            ("blk.0.ffn_gate.weight", &[32, 32]),
            ("blk.0.ffn_up.weight", &[32, 32]),
            ("blk.0.ffn_down.weight", &[32, 32]),
        ] {
            let offset = header.data.len() as u64;
            header.tensors.push((name.into(), shape.to_vec(), 0, offset));
            header
                .data
                .resize(header.data.len() + 4 * shape.iter().product::<u64>() as usize, 0);
        }
        header
    }

    fn put(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.metadata.retain(|(old, _, _)| old != key);
        self.metadata.push((key.into(), kind, value.to_vec()));
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Vec<u64>, u32, u64) {
        self.tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.metadata {
            out.extend(text(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        for (name, shape, kind, offset) in &self.tensors {
            out.extend(text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            out.extend(shape.iter().flat_map(|n| n.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }

    fn error(&self) -> LoadError {
        error_of(&self.bytes())
    }
}

fn error_of(bytes: &[u8]) -> LoadError {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let error = load_error(&path);
    assert!(error.to_string().contains("model.gguf"), "{error}");
    error
}

fn changed(change: impl FnOnce(&mut Header)) -> LoadError {
    let mut header = Header::llama();
    change(&mut header);
    header.error()
}

#[test]
fn the_unchanged_example_loads_and_runs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, Header::llama().bytes()).unwrap();
    let rows = Rig::new(&path, &options(1, KvDtype::F16, None), 16).run(&[1, 2, 3], &[3], WantedLogits::Last);
    assert_eq!(rows, [vec![0.0; 4]]);
}

#[test]
fn a_truncated_gguf_says_which_part_is_missing_wherever_it_is_cut() {
    let bytes = Header::llama().bytes();
    for len in (0..bytes.len()).filter(|len| *len < 1_200 || len % 997 == 0) {
        match error_of(&bytes[..len]) {
            LoadError::Truncated {
                needed, present, field, ..
            } => {
                assert!(needed > present && present == len as u64 && !field.is_empty());
            }
            // An empty file cannot be mapped on every system.
            LoadError::Io { .. } if len == 0 => {}
            other => panic!("cut at {len}: {other}"),
        }
    }
}

#[test]
fn the_real_file_cut_short_is_truncated() {
    let bytes = std::fs::read(real_model()).unwrap();
    let error = error_of(&bytes[..bytes.len() - 1]);
    assert!(matches!(error, LoadError::Truncated { .. }), "{error}");
    assert!(error.to_string().contains("download it again"), "{error}");
}

#[test]
fn unsupported_things_are_named() {
    let error = changed(|h| h.put("general.architecture", 8, &text("gemma3")));
    assert!(
        matches!(&error, LoadError::UnsupportedArchitecture { found, .. } if found == "gemma3"),
        "{error}"
    );
    let error = changed(|h| h.tensor("blk.0.attn_q.weight").2 = 14);
    assert!(
        matches!(&error, LoadError::UnsupportedTensorType { tensor, found, .. } if tensor == "blk.0.attn_q.weight" && found == "Q6_K"),
        "{error}"
    );
    let error = changed(|h| h.put("llama.expert_count", 4, &8u32.to_le_bytes()));
    assert!(
        matches!(&error, LoadError::UnsupportedFeature { field, .. } if field == "llama.expert_count"),
        "{error}"
    );
    let error = changed(|h| h.put("llama.rope.scaling.type", 8, &text("yarn")));
    assert!(
        matches!(&error, LoadError::UnsupportedFeature { found, .. } if found == "yarn"),
        "{error}"
    );
    let error = error_of(b"GGUF\0\0\0\x03aaaaaaaaaaaaaaaaaaaaaaaaaaa");
    assert!(
        matches!(&error, LoadError::UnsupportedFeature { found, .. } if found == "big-endian"),
        "{error}"
    );
    assert!(matches!(
        error_of(b"PK\x03\x04 a zip file, say"),
        LoadError::NotAModel { .. }
    ));
}

#[test]
fn missing_and_misshapen_weights_are_named() {
    let error = changed(|h| h.tensors.retain(|tensor| tensor.0 != "blk.0.ffn_up.weight"));
    assert!(
        matches!(&error, LoadError::MissingTensor { tensor, .. } if tensor == "blk.0.ffn_up.weight"),
        "{error}"
    );
    let error = changed(|h| h.tensors.retain(|tensor| tensor.0 != "token_embd.weight"));
    assert!(
        matches!(&error, LoadError::MissingTensor { tensor, .. } if tensor == "token_embd.weight"),
        "{error}"
    );
    let error = changed(|h| h.tensor("blk.0.attn_k.weight").1 = vec![32, 8]);
    match error {
        LoadError::WrongShape {
            tensor,
            found,
            expected,
            ..
        } => {
            assert_eq!(
                (tensor.as_str(), found, expected),
                ("blk.0.attn_k.weight", vec![8, 32], vec![16, 32])
            );
        }
        other => panic!("{other}"),
    }
}

#[test]
fn senseless_hyperparameters_are_named() {
    let with = |key: &str, value: u32| changed(|h| h.put(&format!("llama.{key}"), 4, &value.to_le_bytes()));
    let field = |error: LoadError| match error {
        LoadError::InvalidField { field, .. } => field,
        other => panic!("{other}"),
    };
    assert_eq!(field(with("attention.head_count", 0)), "llama.attention.head_count");
    assert_eq!(field(with("attention.head_count", 3)), "llama.attention.head_count");
    assert_eq!(
        field(with("attention.head_count_kv", 0)),
        "llama.attention.head_count_kv"
    );
    assert_eq!(
        field(with("attention.head_count_kv", 3)),
        "llama.attention.head_count_kv"
    );
    assert_eq!(field(with("block_count", 0)), "llama.block_count");
    assert_eq!(field(with("block_count", u32::MAX)), "llama.block_count");
    assert_eq!(field(with("embedding_length", u32::MAX - 1)), "llama.embedding_length");
    assert_eq!(field(with("context_length", 0)), "llama.context_length");
    assert_eq!(
        field(changed(|h| h.put("llama.rope.freq_base", 6, &f32::NAN.to_le_bytes()))),
        "llama.rope.freq_base"
    );
    assert_eq!(
        field(changed(|h| h.put("llama.block_count", 8, &text("many")))),
        "llama.block_count"
    );
    let error = changed(|h| h.metadata.retain(|entry| entry.0 != "llama.embedding_length"));
    assert!(
        matches!(&error, LoadError::MissingField { field, .. } if field == "llama.embedding_length"),
        "{error}"
    );
}

#[test]
fn hostile_headers_neither_panic_nor_allocate() {
    // Counts and lengths beyond any file.
    let mut bytes = Header::llama().bytes();
    bytes[8..16].fill(0xFF);
    assert!(matches!(
        error_of(&bytes),
        LoadError::Truncated { .. } | LoadError::Corrupt { .. }
    ));
    let mut bytes = Header::llama().bytes();
    bytes[16..24].fill(0xFF);
    assert!(matches!(
        error_of(&bytes),
        LoadError::Truncated { .. } | LoadError::Corrupt { .. }
    ));
    let huge = [&4u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
    assert!(matches!(
        changed(|h| h.put("a", 9, &huge)),
        LoadError::Corrupt { .. } | LoadError::Truncated { .. }
    ));
    let nested: Vec<u8> = (0..50)
        .flat_map(|_| [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat())
        .collect();
    assert!(matches!(changed(|h| h.put("a", 9, &nested)), LoadError::Corrupt { .. }));
    assert!(matches!(changed(|h| h.put("a", 77, &[])), LoadError::Corrupt { .. }));
    assert!(matches!(
        changed(|h| h.put("general.alignment", 4, &3u32.to_le_bytes())),
        LoadError::Corrupt { .. }
    ));
    assert!(matches!(
        changed(|h| h.tensor("output_norm.weight").1 = vec![u64::MAX; 4]),
        LoadError::Corrupt { .. }
    ));
    assert!(matches!(
        changed(|h| h.tensor("output_norm.weight").1 = vec![1; 9]),
        LoadError::Corrupt { .. }
    ));
    assert!(matches!(
        changed(|h| h.tensor("output_norm.weight").3 = 7),
        LoadError::Corrupt { .. }
    ));
    let far = u64::MAX - 31;
    assert!(matches!(
        changed(|h| h.tensor("output_norm.weight").3 = far),
        LoadError::Truncated { .. }
    ));
    // Every single byte of the header turned over: an error or a model, never a panic.
    let bytes = Header::llama().bytes();
    let header = bytes.len() - Header::llama().data.len();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for at in 0..header {
        for mask in [0xFF, 0x80, 0x01] {
            let mut bytes = bytes.clone();
            bytes[at] ^= mask;
            std::fs::write(&path, &bytes).unwrap();
            let _ = load(&path, &options(1, KvDtype::F16, None), &mut |_, _| {});
        }
    }
}

fn folder_error(change: impl FnOnce(&Path, &mut Value)) -> LoadError {
    let mut model = golden("engine_random.json")[1].clone();
    let folder = tempfile::tempdir().unwrap();
    random_model::write(folder.path(), &model);
    change(folder.path(), &mut model["config"]);
    std::fs::write(folder.path().join("config.json"), model["config"].to_string()).unwrap();
    load_error(folder.path())
}

#[test]
fn broken_folders_are_named() {
    let second = "model-00002-of-00002.safetensors";
    let error = folder_error(|_, config| config["architectures"] = json!(["MambaForCausalLM"]));
    assert!(
        matches!(&error, LoadError::UnsupportedArchitecture { found, .. } if found == "MambaForCausalLM"),
        "{error}"
    );
    let error = folder_error(|_, config| config["rope_parameters"] = json!({"rope_type": "yarn", "factor": 2.0}));
    assert!(
        matches!(&error, LoadError::UnsupportedFeature { found, .. } if found == "yarn"),
        "{error}"
    );
    let error = folder_error(|_, config| config["hidden_act"] = json!("gelu"));
    assert!(
        matches!(&error, LoadError::UnsupportedFeature { field, .. } if field == "hidden_act"),
        "{error}"
    );
    let error = folder_error(|_, config| config["num_hidden_layers"] = json!(-1));
    assert!(
        matches!(&error, LoadError::InvalidField { field, .. } if field == "num_hidden_layers"),
        "{error}"
    );
    let error = folder_error(|_, config| config["num_hidden_layers"] = json!(4));
    assert!(
        matches!(&error, LoadError::MissingTensor { tensor, .. } if tensor.starts_with("model.layers.3")),
        "{error}"
    );
    let error = folder_error(|_, config| config["tie_word_embeddings"] = json!(false));
    assert!(
        matches!(&error, LoadError::MissingTensor { tensor, .. } if tensor == "lm_head.weight"),
        "{error}"
    );
    let error = folder_error(|_, config| config["intermediate_size"] = json!(95));
    assert!(matches!(&error, LoadError::WrongShape { .. }), "{error}");
    let error = folder_error(|folder, _| std::fs::remove_file(folder.join(second)).unwrap());
    assert!(
        matches!(&error, LoadError::Io { path, .. } if path.ends_with(second)),
        "{error}"
    );
    for cut in [0usize, 4, 100, 60_000] {
        let error = folder_error(|folder, _| {
            let bytes = std::fs::read(folder.join(second)).unwrap();
            std::fs::write(folder.join(second), &bytes[..cut.min(bytes.len() - 1)]).unwrap();
        });
        let empty = cut == 0 && matches!(error, LoadError::Io { .. });
        assert!(
            empty || matches!(error, LoadError::Truncated { .. }),
            "cut at {cut}: {error}"
        );
    }
    let error = folder_error(|folder, _| {
        let index = json!({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}});
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    });
    assert!(
        matches!(&error, LoadError::Corrupt { field, .. } if field == "weight_map"),
        "{error}"
    );
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(load_error(empty.path()), LoadError::NotAModel { .. }));
    assert!(matches!(
        load_error(&empty.path().join("absent.gguf")),
        LoadError::Io { .. }
    ));
}

#[test]
fn impossible_steps_are_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    random_model::write(folder.path(), &golden("engine_random.json")[0]);
    let mut rig = Rig::new(folder.path(), &options(1, KvDtype::F16, None), 64);
    let ids: Vec<BlockId> = (0..4).map(BlockId).collect();
    let slice = |tokens: &'static [u32], start, blocks| Slice {
        tokens,
        start,
        blocks,
        logits: WantedLogits::Last,
    };
    let mut refuse = |batch: &[Slice<'_>]| {
        let error = rig.backend.step(&rig.arena, batch, &mut Unobserved).unwrap_err();
        assert!(!error.is_retryable());
        error
    };
    assert_eq!(refuse(&[slice(&[], 0, &ids)]), StepError::EmptySlice { slice: 0 });
    let error = refuse(&[slice(&[1], 0, &ids), slice(&[256], 0, &ids[1..])]);
    assert_eq!(
        error,
        StepError::TokenOutOfRange {
            slice: 1,
            token: 256,
            vocab: 256
        }
    );
    let error = refuse(&[slice(&[1], 64, &ids)]);
    assert!(
        matches!(error, StepError::TooFewBlocks { end: 65, blocks: 4, .. }),
        "{error}"
    );
    let error = refuse(&[slice(&[1], 512, &ids)]);
    assert!(
        matches!(
            error,
            StepError::BeyondContext {
                end: 513,
                context_tokens: 512,
                ..
            }
        ),
        "{error}"
    );
    let error = refuse(&[slice(&[1], usize::MAX, &ids)]);
    assert!(matches!(error, StepError::BeyondContext { .. }), "{error}");
    let error = refuse(&[slice(&[1], 0, &[BlockId(1_000)])]);
    assert!(matches!(error, StepError::OutOfArena { slice: 0, .. }), "{error}");
    let error = refuse(&[slice(&[1], 0, &ids), slice(&[1], 16, &[BlockId(3), BlockId(0)])]);
    assert_eq!(
        error,
        StepError::BlockConflict {
            slice: 1,
            block: BlockId(0)
        }
    );
    let error = refuse(&[slice(&[1], 16, &ids), slice(&[1], 16, &[BlockId(1), BlockId(3)])]);
    assert_eq!(
        error,
        StepError::BlockConflict {
            slice: 1,
            block: BlockId(1)
        }
    );
    let other = rig.backend.config().kv_geometry(16, KvDtype::F32);
    let arena = ArenaView::on_heap(other, 4);
    let error = rig
        .backend
        .step(&arena, &[slice(&[1], 0, &ids)], &mut Unobserved)
        .unwrap_err();
    assert!(
        matches!(&error, StepError::Geometry(mismatch) if mismatch.field == "dtype"),
        "{error}"
    );
}
