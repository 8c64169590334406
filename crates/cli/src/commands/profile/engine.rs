//! The engine alone, in this process: single steps, timed. Prompts' contents do not change how long a step takes, so positions are
//! computed without what would stand before them; the arena is the one that nodes have, all of it resident.

use anyhow::{Context, Result, ensure};
use baton_engine::{Backend, LoadOptions, Slice, Unobserved, WantedLogits, load};
use baton_kv_transfer::Arena;
use baton_types::{ArenaView, BlockId, KvDtype};
use std::path::Path;
use std::time::Instant;

/// Tokens of a block, as nodes have it unless told.
pub const BLOCK_TOKENS: u32 = 16;
/// Fewer cannot hold the steps that are measured.
const BLOCKS_MIN: u32 = 128;

/// An engine with as much KV as a node has.
pub struct Engine {
    backend: Box<dyn Backend>,
    arena: ArenaView,
    tables: Vec<Vec<BlockId>>,
    tokens: Vec<u32>,
}

impl Engine {
    /// Loads a model, with so much memory for KV.
    pub fn load(model: &str, threads: usize, kv_bytes: u64) -> Result<Self> {
        let options = LoadOptions {
            threads,
            kv_dtype: KvDtype::F16,
            ..LoadOptions::default()
        };
        let backend = load(Path::new(model), &options, &mut |_, _| {})?;
        let config = backend.config();
        let longest = config.context_tokens;
        let geometry = config.kv_geometry(BLOCK_TOKENS, KvDtype::F16);
        let blocks = u32::try_from(kv_bytes / geometry.block_bytes() as u64)?;
        ensure!(
            blocks >= BLOCKS_MIN,
            "--kv-bytes holds {blocks} KV blocks of {} bytes, and steps of some length want {BLOCKS_MIN}: give more",
            geometry.block_bytes()
        );
        let arena = Arena::allocate(geometry, blocks, &mut |_, _| {}).context("memory for KV")?;
        let tokens = (0..longest).map(|i| 17 + i.wrapping_mul(2_654_435_761) % 200).collect();
        Ok(Self {
            backend,
            arena: arena.view(),
            tables: Vec::new(),
            tokens,
        })
    }

    /// Gives the arena's blocks to so many sequences.
    fn share_out(&mut self, sequences: usize) {
        let each = self.blocks() / sequences as u32;
        let table = |s: u32| (s * each..(s + 1) * each).map(BlockId).collect();
        self.tables = (0..sequences as u32).map(table).collect();
    }

    /// KV blocks in all.
    pub fn blocks(&self) -> u32 {
        self.arena.blocks() as u32
    }

    /// Hyperparameters.
    pub fn config(&self) -> &baton_engine::ModelConfig {
        self.backend.config()
    }

    /// Instruction-set path and types, as nodes announce them.
    pub fn numerics(&self) -> String {
        self.backend.numerics().to_string()
    }

    /// Bytes of KV of a token.
    pub fn kv_token_bytes(&self) -> u64 {
        self.arena.geometry().token_bytes() as u64
    }

    /// Seconds of one step that computes `new` prompt tokens behind `context`, and decodes `batch` sequences of `total` tokens in all.
    pub fn step(&mut self, new: u32, context: u32, batch: u32, total: u32) -> Result<f64> {
        let sequences = batch as usize + usize::from(new > 0);
        self.share_out(sequences.max(1));
        let mut slices = Vec::with_capacity(sequences);
        for i in 0..batch {
            // Totals that do not divide evenly: some have one token more.
            let length = (total / batch + u32::from(i < total % batch)).max(1) as usize;
            slices.push(Slice {
                tokens: &self.tokens[..1],
                start: length - 1,
                blocks: &self.tables[i as usize],
                logits: WantedLogits::Last,
            });
        }
        if new > 0 {
            slices.push(Slice {
                tokens: &self.tokens[..new as usize],
                start: context as usize,
                blocks: &self.tables[batch as usize],
                logits: WantedLogits::Last,
            });
        }
        let begun = Instant::now();
        self.backend.step(&self.arena, &slices, &mut Unobserved)?;
        Ok(begun.elapsed().as_secs_f64())
    }
}
