//! The engine alone, in this process: single steps, timed. Prompts' contents do not change how long a step takes, so positions are
//! computed without what would stand before them; the arena is the one that nodes have, all of it resident.

use anyhow::{Context, Result};
use baton_engine::{Backend, LoadOptions, Slice, Unobserved, WantedLogits, load};
use baton_kv_transfer::Arena;
use baton_types::{ArenaView, BlockId, KvDtype};
use std::path::Path;
use std::time::Instant;

/// Tokens of a block, as nodes have it unless told.
pub const BLOCK_TOKENS: u32 = 16;

/// An engine with room for some sequences.
pub struct Engine {
    backend: Box<dyn Backend>,
    arena: ArenaView,
    tables: Vec<Vec<BlockId>>,
    tokens: Vec<u32>,
}

impl Engine {
    /// Loads a model, with room for `total` tokens in `sequences` sequences.
    pub fn load(model: &str, threads: usize, sequences: usize, total: u32) -> Result<Self> {
        let options = LoadOptions {
            threads,
            kv_dtype: KvDtype::F16,
            ..LoadOptions::default()
        };
        let backend = load(Path::new(model), &options, &mut |_, _| {})?;
        let config = backend.config();
        let longest = config.context_tokens.min(total);
        let geometry = config.kv_geometry(BLOCK_TOKENS, KvDtype::F16);
        // The first sequence may have the longest context; all of them together have `total`.
        let each = (total / sequences as u32).max(BLOCK_TOKENS).div_ceil(BLOCK_TOKENS) + 1;
        let blocks = (each * sequences as u32).max(longest.div_ceil(BLOCK_TOKENS) + 1);
        let arena = Arena::allocate(geometry, blocks, &mut |_, _| {}).context("memory for KV")?;
        let tokens = (0..longest).map(|i| 17 + i.wrapping_mul(2_654_435_761) % 200).collect();
        let mut engine = Self {
            backend,
            arena: arena.view(),
            tables: Vec::new(),
            tokens,
        };
        engine.share_out(sequences, blocks);
        Ok(engine)
    }

    /// Gives the arena's blocks to so many sequences.
    fn share_out(&mut self, sequences: usize, blocks: u32) {
        let each = blocks / sequences as u32;
        let table = |s: u32| (s * each..(s + 1) * each).map(BlockId).collect();
        self.tables = (0..sequences as u32).map(table).collect();
    }

    fn blocks(&self) -> u32 {
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
        self.share_out(sequences.max(1), self.blocks());
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
