//! The real model's text part, and what an engine would say beside it.

use baton_text::EngineFacts;
use baton_types::{KvDtype, ModelFingerprint, NumericsId};
use std::path::PathBuf;

/// Where the checkout is.
pub const WORKSPACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// The small model that the tests use.
pub fn model() -> PathBuf {
    let places = [
        std::env::var_os("BATON_TEST_MODEL").map(PathBuf::from),
        Some(PathBuf::from(WORKSPACE).join("../shared/models").join(FILE)),
        std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/baton/models").join(FILE)),
    ];
    let found = places.into_iter().flatten().find(|path| path.is_file());
    found.expect("the test model is missing: run `cargo run --release -- model get smollm2`")
}

/// Facts of no particular engine.
pub fn facts() -> EngineFacts {
    EngineFacts {
        fingerprint: ModelFingerprint([7; 32]),
        numerics: NumericsId("test".into()),
        block_tokens: 16,
        kv_dtype: KvDtype::F16,
    }
}
