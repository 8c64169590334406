//! What the engine's integration tests share: the real model, arenas with shuffled blocks, runs of whole sequences.

#![allow(dead_code)] // Each test binary uses its part.
#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

pub mod random_model;

use baton_engine::{Activations, Backend, Isa, LoadOptions, Slice, Unobserved, WantedLogits, load};
use baton_types::{ArenaView, BlockId, KvDtype};
use std::io::Write;
use std::path::{Path, PathBuf};

pub const BLOCK_TOKENS: u32 = 16;
const MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// The real model: `BATON_TEST_MODEL`, a folder `shared/models` beside the repository, or `baton model get`'s cache.
///
/// # Panics
/// Where there is none; the message says how to fetch it.
pub fn real_model() -> PathBuf {
    if let Some(path) = std::env::var_os("BATON_TEST_MODEL") {
        return path.into();
    }
    let beside = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/models")
        .join(MODEL);
    let home = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    let cached = home.unwrap_or_default().join("baton/models").join(MODEL);
    [beside, cached].into_iter().find(|path| path.is_file()).expect(
        "no model to test with: fetch it by `cargo run --release -- model get smollm2`, or set BATON_TEST_MODEL",
    )
}

/// The instruction-set paths of this machine. Those that it lacks are named past the test runner's capture.
pub fn paths() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| {
        if !isa.is_available() {
            let _ = writeln!(std::io::stderr(), "skipped: this machine has no {}", isa.name());
        }
        isa.is_available()
    })
}

/// Golden data of tests/golden.
pub fn golden(name: &str) -> serde_json::Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/golden")
        .join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub fn options(threads: usize, kv_dtype: KvDtype, isa: Option<Isa>) -> LoadOptions {
    LoadOptions {
        threads,
        cpus: Vec::new(),
        kv_dtype,
        isa,
        activations: Activations::Int8,
    }
}

/// As [`options`], with activations as they are: what references in float32 can be compared with.
pub fn exact_options(threads: usize, kv_dtype: KvDtype, isa: Option<Isa>) -> LoadOptions {
    LoadOptions {
        activations: Activations::F32,
        ..options(threads, kv_dtype, isa)
    }
}

/// A backend with an arena whose blocks are handed out in a scattered order.
pub struct Rig {
    pub backend: Box<dyn Backend>,
    pub arena: ArenaView,
    free: Vec<BlockId>,
}

impl Rig {
    /// Room for `tokens` tokens in all.
    pub fn new(path: &Path, options: &LoadOptions, tokens: usize) -> Self {
        Self::with_block_tokens(path, options, tokens, BLOCK_TOKENS)
    }

    pub fn with_block_tokens(path: &Path, options: &LoadOptions, tokens: usize, block_tokens: u32) -> Self {
        let backend = load(path, options, &mut |_, _| {}).unwrap();
        let geometry = backend.config().kv_geometry(block_tokens, options.kv_dtype);
        let blocks = geometry.blocks_for(tokens) + 16;
        let arena = ArenaView::on_heap(geometry, blocks);
        let mut free: Vec<BlockId> = (0..blocks as u32).map(BlockId).collect();
        let mut state = 12_345u64;
        for i in (1..free.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            free.swap(i, (state >> 33) as usize % (i + 1));
        }
        Self { backend, arena, free }
    }

    pub fn blocks(&mut self, tokens: usize) -> Vec<BlockId> {
        let count = self.arena.geometry().blocks_for(tokens);
        self.free.split_off(self.free.len() - count)
    }

    pub fn give_back(&mut self, blocks: Vec<BlockId>) {
        // To the front, so that the next sequence gets others.
        self.free.splice(0..0, blocks);
    }

    /// Logits of every token of one sequence, computed in chunks of these sizes (the last one repeated).
    pub fn run(&mut self, tokens: &[u32], chunks: &[usize], logits: WantedLogits) -> Vec<Vec<f32>> {
        let blocks = self.blocks(tokens.len());
        let mut rows = Vec::new();
        let (mut start, mut turn) = (0, 0);
        while start < tokens.len() {
            let size = chunks[turn.min(chunks.len() - 1)].min(tokens.len() - start);
            let last = start + size == tokens.len();
            let wanted = if logits == WantedLogits::Last && !last {
                WantedLogits::None
            } else {
                logits
            };
            let slice = Slice {
                tokens: &tokens[start..start + size],
                start,
                blocks: &blocks,
                logits: wanted,
            };
            let output = self.backend.step(&self.arena, &[slice], &mut Unobserved).unwrap();
            rows.extend((0..output.rows()).map(|i| output.row(i).to_vec()));
            start += size;
            turn += 1;
        }
        self.give_back(blocks);
        rows
    }
}

/// Fails with the place of the first bit that differs.
pub fn assert_bits(what: &str, ours: &[Vec<f32>], theirs: &[Vec<f32>]) {
    assert_eq!(ours.len(), theirs.len(), "{what}: rows");
    for (row, (a, b)) in ours.iter().zip(theirs).enumerate() {
        for (id, (x, y)) in a.iter().zip(b).enumerate() {
            assert!(x.to_bits() == y.to_bits(), "{what}: row {row} id {id}: {x} and {y}");
        }
        assert_eq!(a.len(), b.len(), "{what}: row {row}");
    }
}
