//! The step: one forward pass of all slices together, layer by layer.
//!
//! All tokens of all slices stand in one list; only positions, blocks and attention know which sequence a token is of.

use super::activations::{add_bias, rms_norm, rms_norm_in_place};
use super::arena::{KvLayer, write_token};
use super::check::check;
use super::isa::Isa;
use super::kernels::{AttentionUnit, Kernels, LANES, SEGMENT, partial_len};
use super::packed::{PackedMatrix, PackedRows, PanelRows, Scratch};
use super::pool::Pool;
use super::weights::{LayerWeights, Weights};
use crate::backend::{Backend, Slice, StepObserver, StepOutput, WantedLogits};
use crate::error::{LoadError, StepError};
use crate::load::{Checkpoint, LoadOptions};
use crate::model::{ModelConfig, RopeTable};
use baton_types::{ArenaView, BlockId, KvDtype, KvPart, ModelFingerprint, NumericsId};
use std::ops::{ControlFlow, Range};

/// Raised with every change that can change a bit of the output.
const KERNEL_REVISION: u32 = 4;
/// Tokens whose attention is one unit: their keys and values are read once.
const QUERY_TILE: usize = 32;
/// Tokens of a tile whose context is cut into parts.
const FEW_TOKENS: usize = 8;
/// Units of attention per thread from which on they may be larger.
const UNITS_PER_THREAD: usize = 4;
/// Tokens of one unit of per-token work. As a block's usually: two threads that write into one block hinder each other.
const TOKEN_CHUNK: usize = 16;
/// Rows of logits computed at once, which bounds the room for them.
const LOGIT_ROWS: usize = 48;

/// Runs a model on CPU cores.
pub(crate) struct CpuBackend {
    config: ModelConfig,
    fingerprint: ModelFingerprint,
    numerics: NumericsId,
    kv_dtype: KvDtype,
    engine: Engine,
}

/// What computes, apart from what describes.
struct Engine {
    kernels: Kernels,
    pool: Pool,
    weights: Weights,
    rope: RopeTable,
    scratch: Scratch,
    buffers: Buffers,
}

/// Reused from step to step; as large as the largest step so far needed.
#[derive(Default)]
struct Buffers {
    /// Residual stream: `(tokens, hidden)`.
    hidden: Vec<f32>,
    /// Input of the next product.
    x: PackedRows,
    /// Output of the last product.
    y: PanelRows,
    /// Rotated queries: `(tokens, heads * head_dim)`.
    queries: Vec<f32>,
    /// Attention's output: `(tile, part, kv_head, token of the tile, head of the group, partial_len)`.
    attended: Vec<f32>,
}

/// One token of the step.
struct Place {
    position: usize,
    block: BlockId,
    slot: usize,
    tile: usize,
}

/// Consecutive tokens of one slice whose attention is computed together.
struct Tile {
    slice: usize,
    first: usize,
    tokens: usize,
    /// Parts that its context is cut into.
    parts: usize,
    /// Tokens times parts of the tiles before it.
    before: usize,
}

impl Tile {
    /// Positions of one part; `end` is where the context ends.
    fn context(&self, part: usize, end: usize) -> Range<usize> {
        if self.parts == 1 {
            0..end
        } else {
            part * SEGMENT..end.min((part + 1) * SEGMENT)
        }
    }
}

/// Where the step's tokens stand.
struct Plan {
    places: Vec<Place>,
    tiles: Vec<Tile>,
    /// Cosines and sines of each token: `(tokens, angles_len)`.
    angles: Vec<f32>,
    /// Tokens that give logits.
    wanted: Vec<usize>,
    /// Borders of units of [`TOKEN_CHUNK`] tokens.
    chunks: Vec<usize>,
}

impl Plan {
    fn new(batch: &[Slice<'_>], block_tokens: usize, rope: &RopeTable) -> Self {
        let mut plan = Self {
            places: Vec::new(),
            tiles: Vec::new(),
            angles: Vec::new(),
            wanted: Vec::new(),
            chunks: Vec::new(),
        };
        for (index, slice) in batch.iter().enumerate() {
            let first = plan.places.len();
            for offset in 0..slice.tokens.len() {
                if offset.is_multiple_of(QUERY_TILE) {
                    let tokens = QUERY_TILE.min(slice.tokens.len() - offset);
                    // Few tokens: the parts of a long context are what threads can share.
                    let parts = match tokens {
                        ..=FEW_TOKENS => (slice.start + offset + tokens).div_ceil(SEGMENT),
                        _ => 1,
                    };
                    let before = plan
                        .tiles
                        .last()
                        .map_or(0, |tile| tile.before + tile.tokens * tile.parts);
                    plan.tiles.push(Tile {
                        slice: index,
                        first: first + offset,
                        tokens,
                        parts,
                        before,
                    });
                }
                let position = slice.start + offset;
                let block = slice.blocks[position / block_tokens];
                let (slot, tile) = (position % block_tokens, plan.tiles.len() - 1);
                plan.places.push(Place {
                    position,
                    block,
                    slot,
                    tile,
                });
            }
            match slice.logits {
                WantedLogits::None => {}
                WantedLogits::Last => plan.wanted.push(plan.places.len() - 1),
                WantedLogits::All => plan.wanted.extend(first..plan.places.len()),
            }
        }
        let tokens = plan.places.len();
        plan.angles = vec![0.0; tokens * rope.angles_len()];
        for (place, angles) in plan.places.iter().zip(plan.angles.chunks_exact_mut(rope.angles_len())) {
            rope.angles(place.position, angles);
        }
        plan.chunks = (0..tokens).step_by(TOKEN_CHUNK).chain([tokens]).collect();
        plan
    }
}

impl CpuBackend {
    /// Packs a checkpoint's weights. `progress` counts their bytes.
    ///
    /// # Errors
    /// Weights that do not fit the configuration, a path that this machine does not run, no threads.
    pub(crate) fn new(
        checkpoint: &Checkpoint,
        fingerprint: ModelFingerprint,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, LoadError> {
        let isa = options.isa.unwrap_or_else(Isa::best);
        let kernels = Kernels::new(isa).ok_or(LoadError::UnavailableIsa { isa: isa.name() })?;
        let threads = match options.threads {
            0 if !options.cpus.is_empty() => options.cpus.len(),
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let mut pool = Pool::new(threads, &options.cpus).map_err(|source| LoadError::Threads { threads, source })?;
        let config = checkpoint.config.clone();
        let weights = Weights::new(checkpoint, options.activations, &mut pool, progress)?;
        let (version, kv_dtype) = (env!("CARGO_PKG_VERSION"), options.kv_dtype);
        let activations = options.activations;
        let numerics =
            format!("baton-cpu {version}.{KERNEL_REVISION} {isa} activations-{activations:?} kv-{kv_dtype:?}");
        let engine = Engine {
            kernels,
            scratch: Scratch::new(pool.threads()),
            pool,
            weights,
            rope: RopeTable::new(&config),
            buffers: Buffers::default(),
        };
        Ok(Self {
            config,
            fingerprint,
            numerics: NumericsId(numerics.to_lowercase()),
            kv_dtype,
            engine,
        })
    }
}

impl Backend for CpuBackend {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn fingerprint(&self) -> ModelFingerprint {
        self.fingerprint
    }

    fn numerics(&self) -> &NumericsId {
        &self.numerics
    }

    fn is_stub(&self) -> bool {
        false
    }

    fn step(
        &mut self,
        arena: &ArenaView,
        batch: &[Slice<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutput, StepError> {
        check(&self.config, self.kv_dtype, arena, batch)?;
        let plan = Plan::new(batch, arena.geometry().block_tokens as usize, &self.engine.rope);
        let vocab = self.config.vocab as usize;
        if plan.places.is_empty() {
            return Ok(StepOutput {
                vocab,
                logits: Vec::new(),
            });
        }
        let engine = &mut self.engine;
        engine.pool.enter();
        engine.embed(&self.config, batch);
        for layer in 0..self.config.layers {
            engine.store_kv(&self.config, &plan, arena, layer as usize);
            if let ControlFlow::Break(()) = observer.layer_done(layer) {
                return Err(StepError::Aborted { layer });
            }
            if layer + 1 == self.config.layers && plan.wanted.is_empty() {
                break; // What is left would only make logits.
            }
            engine.attend(&self.config, &plan, arena, batch, layer as usize);
            engine.feed_forward(&self.config, layer as usize);
        }
        Ok(StepOutput {
            vocab,
            logits: engine.logits(&self.config, &plan.wanted),
        })
    }
}

impl Engine {
    fn embed(&mut self, config: &ModelConfig, batch: &[Slice<'_>]) {
        let hidden = config.hidden as usize;
        let tokens = batch.iter().map(|slice| slice.tokens.len()).sum::<usize>();
        self.buffers.hidden.resize(tokens * hidden, 0.0);
        let ids = batch.iter().flat_map(|slice| slice.tokens);
        for (row, id) in self.buffers.hidden.chunks_exact_mut(hidden).zip(ids) {
            self.weights.embedding.row(*id as usize, row);
        }
    }

    /// Normed hidden states become the next products' input.
    fn pack_normed<const N: usize>(
        &mut self,
        parts: fn(&LayerWeights) -> (&[f32], [&PackedMatrix; N]),
        config: &ModelConfig,
        layer: usize,
    ) {
        let Self {
            kernels,
            pool,
            weights,
            scratch,
            buffers,
            ..
        } = self;
        let hidden = config.hidden as usize;
        let (weight, matrices) = parts(&weights.layers[layer]);
        let stream = &buffers.hidden;
        let tokens = stream.len() / hidden;
        buffers
            .x
            .pack(*kernels, pool, scratch, (tokens, &matrices), |token, row| {
                rms_norm(
                    &stream[token * hidden..(token + 1) * hidden],
                    weight,
                    config.rms_eps,
                    row,
                );
            });
    }

    /// The last product's output is added to the residual stream.
    fn add_to_stream(&mut self, config: &ModelConfig) {
        let hidden = config.hidden as usize;
        let Buffers { hidden: stream, y, .. } = &mut self.buffers;
        let tokens = stream.len() / hidden;
        let bounds: Vec<usize> = (0..tokens)
            .step_by(TOKEN_CHUNK)
            .chain([tokens])
            .map(|t| t * hidden)
            .collect();
        self.pool.parts(stream, &bounds, |unit, rows, _| {
            for (i, row) in rows.chunks_exact_mut(hidden).enumerate() {
                y.add_to(unit * TOKEN_CHUNK + i, row);
            }
        });
    }

    /// Queries, keys and values of a layer; the latter two go into the arena.
    fn store_kv(&mut self, config: &ModelConfig, plan: &Plan, arena: &ArenaView, layer: usize) {
        self.pack_normed(|w| (&w.attention_norm, [&w.query, &w.key, &w.value]), config, layer);
        let Self {
            kernels,
            pool,
            weights,
            rope,
            scratch,
            buffers,
        } = self;
        let weights = &weights.layers[layer];
        let matrices = [&weights.query, &weights.key, &weights.value];
        buffers.y.product(*kernels, pool, scratch, &matrices, &buffers.x);
        let [q_width, kv_width, head_dim] =
            [config.q_width(), config.kv_width(), config.head_dim].map(|width| width as usize);
        let key_at = weights.query.padded_rows();
        let value_at = key_at + weights.key.padded_rows();
        let bounds: Vec<usize> = plan.chunks.iter().map(|token| token * q_width).collect();
        buffers.queries.resize(plan.places.len() * q_width, 0.0);
        let y = &buffers.y;
        let finish = |rows: &mut [f32], which: usize, angles: &[f32]| {
            add_bias(rows, &weights.biases[which]);
            for head in rows.chunks_exact_mut(head_dim) {
                if config.qk_norm {
                    rms_norm_in_place(head, &weights.head_norms[which], config.rms_eps);
                }
                rope.rotate(head, angles);
            }
        };
        pool.parts(&mut buffers.queries, &bounds, |unit, queries, worker| {
            scratch.with(worker, |room| {
                if room.len() < kv_width {
                    room.resize(kv_width, 0.0);
                }
                let rows = &mut room[..kv_width];
                for (i, query) in queries.chunks_exact_mut(q_width).enumerate() {
                    let token = plan.chunks[unit] + i;
                    let angles = &plan.angles[token * rope.angles_len()..(token + 1) * rope.angles_len()];
                    let place = &plan.places[token];
                    y.gather(token, 0, query);
                    finish(query, 0, angles);
                    y.gather(token, key_at, rows);
                    finish(rows, 1, angles);
                    write_token(arena, place.block, place.slot, layer, KvPart::Key, rows);
                    y.gather(token, value_at, rows);
                    add_bias(rows, &weights.biases[2]);
                    write_token(arena, place.block, place.slot, layer, KvPart::Value, rows);
                }
            });
        });
    }

    /// Attention over everything up to each token, and its output matrix.
    fn attend(&mut self, config: &ModelConfig, plan: &Plan, arena: &ArenaView, batch: &[Slice<'_>], layer: usize) {
        let Self {
            kernels,
            pool,
            weights,
            scratch,
            buffers,
            ..
        } = self;
        let [q_width, kv_heads, head_dim] =
            [config.q_width(), config.kv_heads, config.head_dim].map(|width| width as usize);
        let group = config.heads as usize / kv_heads;
        let len = partial_len(head_dim);
        // A unit is one tile, one part of the context and one key/value head; its output is contiguous. Where there are
        // units enough a part's heads stay together: what they have of a block lies side by side.
        let parts: usize = plan.tiles.iter().map(|tile| tile.parts).sum();
        let together = parts >= UNITS_PER_THREAD * pool.threads();
        let mut units = Vec::new();
        let mut bounds = vec![0];
        for tile in &plan.tiles {
            let share = if together && tile.tokens <= FEW_TOKENS {
                kv_heads
            } else {
                1
            };
            for (part, head) in
                (0..tile.parts).flat_map(|part| (0..kv_heads).step_by(share).map(move |head| (part, head)))
            {
                let heads = head..head + share;
                bounds.push((tile.before * kv_heads + (part * kv_heads + heads.end) * tile.tokens) * group * len);
                units.push((tile, heads, part));
            }
        }
        buffers.attended.resize(bounds[units.len()], 0.0);
        let queries = &buffers.queries;
        pool.parts(&mut buffers.attended, &bounds, |unit, out, worker| {
            let (tile, heads, part) = &units[unit];
            let start = plan.places[tile.first].position;
            scratch.with(worker, |scratch| {
                kernels.attend(&mut AttentionUnit {
                    kv: KvLayer::new(arena, batch[tile.slice].blocks, layer),
                    heads: heads.clone(),
                    q: &queries[tile.first * q_width..(tile.first + tile.tokens) * q_width],
                    q_stride: q_width,
                    group,
                    head_dim,
                    tokens: tile.tokens,
                    start,
                    context: tile.context(*part, start + tile.tokens),
                    out,
                    scratch,
                });
            });
        });
        let attended = &buffers.attended;
        let matrices = [&weights.layers[layer].attention_out];
        buffers
            .x
            .pack(*kernels, pool, scratch, (plan.places.len(), &matrices), |token, row| {
                let tile = &plan.tiles[plan.places[token].tile];
                for (head, row) in row.chunks_exact_mut(head_dim).enumerate() {
                    let (head, of_group) = (head / group, head % group);
                    let first = (tile.before * kv_heads + head * tile.tokens) + token - tile.first;
                    let partials = &attended[(first * group + of_group) * len..];
                    kernels.combine(partials, kv_heads * tile.tokens * group * len, tile.parts, row);
                }
            });
        buffers.y.product(*kernels, pool, scratch, &matrices, &buffers.x);
        self.add_to_stream(config);
    }

    /// `down(silu(gate(x)) * up(x))`.
    fn feed_forward(&mut self, config: &ModelConfig, layer: usize) {
        self.pack_normed(|w| (&w.ffn_norm, [&w.gate, &w.up]), config, layer);
        let Self {
            kernels,
            pool,
            weights,
            scratch,
            buffers,
            ..
        } = self;
        let weights = &weights.layers[layer];
        buffers
            .y
            .product(*kernels, pool, scratch, &[&weights.gate, &weights.up], &buffers.x);
        let panels = weights.gate.padded_rows() / LANES;
        let tokens = buffers.x.tokens;
        let share = if tokens > 1 { 4 } else { panels };
        let bounds: Vec<usize> = (0..panels)
            .step_by(share)
            .chain([panels])
            .map(|panel| panel * tokens * LANES)
            .collect();
        let (gate, up) = buffers.y.split_at_panel(panels);
        pool.parts(gate, &bounds, |unit, gate, _| {
            kernels.silu(gate, &up[bounds[unit]..bounds[unit + 1]])
        });
        let y = &buffers.y;
        buffers
            .x
            .pack(*kernels, pool, scratch, (tokens, &[&weights.down]), |token, row| {
                y.gather(token, 0, row)
            });
        buffers.y.product(*kernels, pool, scratch, &[&weights.down], &buffers.x);
        self.add_to_stream(config);
    }

    /// Rows of logits of the wanted tokens: `(wanted, vocab)`.
    fn logits(&mut self, config: &ModelConfig, wanted: &[usize]) -> Vec<f32> {
        let Self {
            kernels,
            pool,
            weights,
            scratch,
            buffers,
            ..
        } = self;
        let [hidden, vocab] = [config.hidden, config.vocab].map(|width| width as usize);
        let output = weights.output();
        let mut logits = vec![0.0; wanted.len() * vocab];
        let stream = &buffers.hidden;
        for (wanted, logits) in wanted.chunks(LOGIT_ROWS).zip(logits.chunks_mut(LOGIT_ROWS * vocab)) {
            buffers
                .x
                .pack(*kernels, pool, scratch, (wanted.len(), &[output]), |row, out| {
                    let from = wanted[row] * hidden;
                    rms_norm(&stream[from..from + hidden], &weights.final_norm, config.rms_eps, out);
                });
            buffers.y.product(*kernels, pool, scratch, &[output], &buffers.x);
            let y = &buffers.y;
            let bounds: Vec<usize> = (0..=wanted.len()).map(|row| row * vocab).collect();
            pool.parts(logits, &bounds, |row, out, _| y.gather(row, 0, out));
        }
        logits
    }
}
