//! The scripted backend: deterministic tokens and latencies, for tests of everything else.
//!
//! It writes into each KV slot a digest of the tokens so far (so a slot depends on all before it, as a real model's do) and
//! draws its next token from what it finds *in the arena*, so a torn, stale or foreign block changes the output. Latency
//! is scripted by sleeping between layers; a latency of zero never sleeps.

#![allow(unsafe_code)]

use super::interface::{Backend, Slice, StepObserver, StepOutput, WantedLogits};
use crate::error::StepError;
use crate::model::{Architecture, ModelConfig, RopeScaling, RopeStyle};
use baton_types::{ArenaView, BlockId, KvGeometry, KvPart, ModelFingerprint, NumericsId};
use std::str::FromStr;
use std::time::Duration;

/// Bytes of a slot (one token's key or value of one head) that carry its digest, where it has so many.
const MARK: usize = 8;
/// Drawn tokens are printable ASCII where the vocabulary has it: ids of the stub's byte tokenizer.
const PRINTABLE: std::ops::Range<u64> = 32..127;

/// What the stand-in pretends to be.
#[derive(Debug, Clone, PartialEq)]
pub struct StubSpec {
    /// Sleep per prompt token, microseconds.
    pub prefill_us_per_token: u64,
    /// Sleep per step that has decoding sequences, microseconds.
    pub decode_us_per_step: u64,
    /// Token ids are below it.
    pub vocab: u32,
    /// Longest sequence, in tokens.
    pub context_tokens: u32,
    /// Layers, each with its own part of a block.
    pub layers: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Elements per head; at least 4 of 2 bytes.
    pub head_dim: u32,
    /// Tokens that end a text. Never drawn unless `eos_at` says so.
    pub eos_tokens: Vec<u32>,
    /// A sequence of this many tokens is followed by the first end-of-sequence token; 0: none ever.
    pub eos_at: u32,
    /// Stands for the weights: another number gives another fingerprint and other tokens.
    pub weights: u64,
}

impl Default for StubSpec {
    fn default() -> Self {
        Self {
            prefill_us_per_token: 0,
            decode_us_per_step: 0,
            vocab: 259,
            context_tokens: 32_768,
            layers: 2,
            kv_heads: 1,
            head_dim: 4,
            eos_tokens: vec![257],
            eos_at: 0,
            weights: 0,
        }
    }
}

/// A text that describes no stub.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("stub option `{option}`: {problem}; expected stub[:KEY=NUMBER,...] with the keys {keys}", keys = StubSpec::KEYS)]
pub struct InvalidStub {
    /// Which part.
    pub option: String,
    /// What is wrong with it.
    pub problem: String,
}

impl StubSpec {
    /// What [`Self::from_str`] understands.
    pub const KEYS: &'static str = "prefill_us, decode_us, vocab, context, layers, kv_heads, head_dim, eos_at, weights";

    fn validate(&self) -> Result<(), (&'static str, String)> {
        let positive = [
            ("vocab", self.vocab),
            ("context", self.context_tokens),
            ("layers", self.layers),
            ("kv_heads", self.kv_heads),
        ];
        for (key, value) in positive {
            if value == 0 {
                return Err((key, "it must be at least 1".into()));
            }
        }
        if self.head_dim < 4 || !self.head_dim.is_multiple_of(2) {
            return Err((
                "head_dim",
                format!("{} was given; it must be even and at least 4", self.head_dim),
            ));
        }
        Ok(())
    }
}

/// `stub` or `stub:prefill_us=200,decode_us=5000,...`.
impl FromStr for StubSpec {
    type Err = InvalidStub;

    fn from_str(text: &str) -> Result<Self, InvalidStub> {
        let fail = |option: &str, problem: String| InvalidStub {
            option: option.to_owned(),
            problem,
        };
        let rest = text
            .strip_prefix("stub")
            .ok_or_else(|| fail(text, "it does not begin with stub".into()))?;
        let mut spec = Self::default();
        if rest.is_empty() {
            return Ok(spec);
        }
        let rest = rest
            .strip_prefix(':')
            .ok_or_else(|| fail(text, "a colon must follow `stub`".into()))?;
        for option in rest.split(',') {
            let (key, value) = option
                .split_once('=')
                .ok_or_else(|| fail(option, "it has no value".into()))?;
            let long = || value.parse::<u64>().map_err(|error| fail(option, error.to_string()));
            let short = || value.parse::<u32>().map_err(|error| fail(option, error.to_string()));
            match key {
                "prefill_us" => spec.prefill_us_per_token = long()?,
                "decode_us" => spec.decode_us_per_step = long()?,
                "vocab" => spec.vocab = short()?,
                "context" => spec.context_tokens = short()?,
                "layers" => spec.layers = short()?,
                "kv_heads" => spec.kv_heads = short()?,
                "head_dim" => spec.head_dim = short()?,
                "eos_at" => spec.eos_at = short()?,
                "weights" => spec.weights = long()?,
                _ => return Err(fail(option, format!("`{key}` is unknown"))),
            }
        }
        spec.eos_tokens.retain(|token| *token < spec.vocab);
        spec.validate().map_err(|(key, problem)| fail(key, problem))?;
        Ok(spec)
    }
}

/// Makes one.
pub fn stub(spec: StubSpec) -> Box<dyn Backend> {
    let shape = (
        spec.vocab,
        spec.context_tokens,
        spec.layers,
        spec.kv_heads,
        spec.head_dim,
        spec.weights,
    );
    let fingerprint = ModelFingerprint(*blake3::hash(format!("baton stub {shape:?}").as_bytes()).as_bytes());
    let config = ModelConfig {
        name: "stub".into(),
        architecture: Architecture::Llama,
        layers: spec.layers,
        hidden: spec.kv_heads * spec.head_dim,
        heads: spec.kv_heads,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        ffn: spec.head_dim,
        vocab: spec.vocab,
        context_tokens: spec.context_tokens,
        rope_theta: 10_000.0,
        rope_style: RopeStyle::HalfSplit,
        rope_scaling: RopeScaling::None,
        rms_eps: 1e-5,
        qkv_bias: false,
        qk_norm: false,
        tied_embeddings: true,
        eos_tokens: spec.eos_tokens.clone(),
    };
    Box::new(Stub {
        spec,
        config,
        fingerprint,
        numerics: NumericsId("stub-1".into()),
    })
}

struct Stub {
    spec: StubSpec,
    config: ModelConfig,
    fingerprint: ModelFingerprint,
    numerics: NumericsId,
}

/// One round of a 64-bit mixer (the finaliser of SplitMix64).
fn mix(state: u64, value: u64) -> u64 {
    let mut z = (state ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// One row of slots: the keys or the values of one head in one layer.
#[derive(Clone, Copy)]
struct Lane {
    /// Bytes from a block's start to the lane's.
    offset: usize,
    part: KvPart,
    /// Where its chain of digests begins.
    seed: u64,
}

/// The lanes of one layer.
fn lanes(geometry: &KvGeometry, layer: usize, weights: u64) -> impl Iterator<Item = Lane> {
    let (geometry, heads) = (*geometry, geometry.kv_heads as usize);
    (0..2 * heads).map(move |lane| {
        let part = [KvPart::Key, KvPart::Value][lane / heads];
        Lane {
            offset: geometry.lane_at(layer, part, lane % heads),
            part,
            seed: mix(weights, (layer * 2 * heads + lane) as u64),
        }
    })
}

impl Stub {
    fn check(&self, arena: &ArenaView, batch: &[Slice<'_>]) -> Result<(), StepError> {
        let geometry = arena.geometry();
        self.config
            .kv_geometry(geometry.block_tokens, geometry.dtype)
            .check_same(geometry)?;
        for (number, slice) in batch.iter().enumerate() {
            let end = slice.start + slice.tokens.len();
            if slice.tokens.is_empty() {
                return Err(StepError::EmptySlice { slice: number });
            }
            if let Some(token) = slice.tokens.iter().find(|token| **token >= self.spec.vocab) {
                return Err(StepError::TokenOutOfRange {
                    slice: number,
                    token: *token,
                    vocab: self.spec.vocab,
                });
            }
            let context_tokens = self.spec.context_tokens;
            if end > context_tokens as usize {
                return Err(StepError::BeyondContext {
                    slice: number,
                    end,
                    context_tokens,
                });
            }
            let (blocks, block_tokens) = (slice.blocks.len(), geometry.block_tokens);
            if blocks < geometry.blocks_for(end) {
                return Err(StepError::TooFewBlocks {
                    slice: number,
                    end,
                    blocks,
                    block_tokens,
                });
            }
            for block in &slice.blocks[..geometry.blocks_for(end)] {
                let inside = arena.block_ptr(*block, 0, geometry.block_bytes());
                inside.map_err(|source| StepError::OutOfArena { slice: number, source })?;
            }
        }
        Ok(())
    }

    /// What the script makes this step take.
    fn latency(&self, batch: &[Slice<'_>]) -> Duration {
        // With a draft behind it, a decoding sequence's slice is longer, and wants the logits of each.
        let decodes =
            |slice: &&Slice<'_>| slice.start > 0 && (slice.tokens.len() == 1 || slice.logits == WantedLogits::All);
        let prompt: usize = batch
            .iter()
            .filter(|slice| !decodes(slice))
            .map(|slice| slice.tokens.len())
            .sum();
        let decode = if batch.iter().any(|slice| decodes(&slice)) {
            self.spec.decode_us_per_step
        } else {
            0
        };
        Duration::from_micros(self.spec.prefill_us_per_token * prompt as u64 + decode)
    }

    /// Chance of each token after `end` tokens of which everything in the arena gives `digest`.
    fn logits(&self, digest: u64, end: usize, row: &mut [f32]) {
        let vocab = u64::from(self.spec.vocab);
        row.fill(-30.0);
        for token in &self.config.eos_tokens {
            row[*token as usize] = f32::NEG_INFINITY;
        }
        let ended = self.spec.eos_at > 0 && end >= self.spec.eos_at as usize;
        if let Some(token) = self.config.eos_tokens.first().filter(|_| ended) {
            row[*token as usize] = 10.0;
            return;
        }
        let choice = |value: u64| {
            let range = if vocab >= PRINTABLE.end { PRINTABLE } else { 0..vocab };
            usize::try_from(range.start + value % (range.end - range.start)).unwrap_or(0)
        };
        row[choice(mix(digest, 2))] = 9.0;
        row[choice(mix(digest, 1))] = 10.0;
    }
}

/// Reads bytes of a block that `Stub::check` has found inside the arena.
fn read(arena: &ArenaView, block: BlockId, offset: usize, out: &mut [u8]) {
    // SAFETY: the caller of `step` owns the slice's blocks for reading; the range was checked by `Stub::check`.
    let read = unsafe { arena.read(block, offset, out) };
    debug_assert!(read.is_ok(), "checked before");
}

/// Where the bytes of a slot's mark stand, seen from its lane's start: elements, each in ascending order of bytes. Eight
/// bytes, or fewer where a slot is shorter.
fn places(geometry: &KvGeometry, part: KvPart, slot: usize) -> impl Iterator<Item = usize> {
    let (geometry, width) = (*geometry, geometry.dtype.bytes());
    (0..(MARK / width).min(geometry.head_dim as usize)).flat_map(move |dim| {
        let at = geometry.element_at(part, slot, dim);
        at..at + width
    })
}

/// The mark in `slot` of a lane, of which `byte` gives the bytes.
fn mark(geometry: &KvGeometry, part: KvPart, slot: usize, mut byte: impl FnMut(usize) -> u8) -> u64 {
    let mut bytes = [0; MARK];
    for (out, at) in bytes.iter_mut().zip(places(geometry, part, slot)) {
        *out = byte(at);
    }
    u64::from_le_bytes(bytes)
}

fn write_lane(arena: &ArenaView, slice: &Slice<'_>, lane: Lane) {
    let geometry = arena.geometry();
    let block_tokens = geometry.block_tokens as usize;
    let read_byte = |block, at| {
        let mut byte = [0];
        read(arena, block, lane.offset + at, &mut byte);
        byte[0]
    };
    let mut last = match slice.start.checked_sub(1) {
        None => lane.seed,
        Some(before) => {
            let block = slice.blocks[before / block_tokens];
            mark(geometry, lane.part, before % block_tokens, |at| read_byte(block, at))
        }
    };
    for (token, position) in slice.tokens.iter().zip(slice.start..) {
        let (block, slot) = (slice.blocks[position / block_tokens], position % block_tokens);
        let bytes = mix(last, u64::from(*token)).to_le_bytes();
        last = 0;
        for (i, (byte, at)) in bytes.into_iter().zip(places(geometry, lane.part, slot)).enumerate() {
            // SAFETY: the caller of `step` owns the slice's blocks from `start` on for writing; the range was checked.
            let written = unsafe { arena.write(block, lane.offset + at, &[byte]) };
            debug_assert!(written.is_ok(), "checked before");
            last |= u64::from(byte) << (8 * i);
        }
    }
}

/// Digest of every slot of the first `end` positions, as the arena has them now.
fn digest(arena: &ArenaView, blocks: &[BlockId], end: usize, weights: u64) -> u64 {
    let geometry = arena.geometry();
    let block_tokens = geometry.block_tokens as usize;
    let mut lane_bytes = vec![0; geometry.head_bytes()];
    let mut state = weights;
    for layer in 0..geometry.layers as usize {
        for lane in lanes(geometry, layer, weights) {
            for (ordinal, block) in blocks[..geometry.blocks_for(end)].iter().enumerate() {
                read(arena, *block, lane.offset, &mut lane_bytes);
                for slot in 0..block_tokens.min(end - ordinal * block_tokens) {
                    let mark = mark(geometry, lane.part, slot, |at| lane_bytes[at]);
                    state = state.rotate_left(5).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ mark;
                }
            }
        }
    }
    mix(state, end as u64)
}

impl Backend for Stub {
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
        true
    }

    fn step(
        &mut self,
        arena: &ArenaView,
        batch: &[Slice<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutput, StepError> {
        self.check(arena, batch)?;
        let pause = self.latency(batch) / self.spec.layers;
        for layer in 0..self.spec.layers {
            if !pause.is_zero() {
                std::thread::sleep(pause);
            }
            for slice in batch {
                for lane in lanes(arena.geometry(), layer as usize, self.spec.weights) {
                    write_lane(arena, slice, lane);
                }
            }
            if observer.layer_done(layer).is_break() {
                return Err(StepError::Aborted { layer });
            }
        }
        let vocab = self.spec.vocab as usize;
        let rows: usize = batch.iter().map(|slice| slice.logits.rows(slice.tokens.len())).sum();
        let mut logits = vec![0.0; rows * vocab];
        let mut out = logits.chunks_exact_mut(vocab);
        for slice in batch {
            let end = slice.start + slice.tokens.len();
            let first = end - slice.logits.rows(slice.tokens.len());
            for (position, row) in (first..end).zip(out.by_ref()) {
                self.logits(
                    digest(arena, slice.blocks, position + 1, self.spec.weights),
                    position + 1,
                    row,
                );
            }
        }
        Ok(StepOutput { vocab, logits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::interface::Unobserved;
    use baton_types::KvDtype;
    use std::ops::ControlFlow;
    use std::ptr::NonNull;
    use std::sync::Arc;

    const BLOCK_TOKENS: usize = 4;

    #[repr(align(64))]
    struct Aligned(#[allow(dead_code)] [u8; 64]);

    fn arena(backend: &dyn Backend, blocks: usize) -> ArenaView {
        let geometry = backend.config().kv_geometry(BLOCK_TOKENS as u32, KvDtype::F16);
        let bytes = blocks * geometry.block_bytes();
        let mut memory: Vec<Aligned> = (0..bytes.div_ceil(64)).map(|_| Aligned([0; 64])).collect();
        let base = NonNull::new(memory.as_mut_ptr().cast::<u8>()).unwrap();
        // SAFETY: the vector lives as long as its owner, is aligned and zeroed, and nobody else looks into it.
        unsafe { ArenaView::new(base, blocks, geometry, Arc::new(memory)) }
    }

    fn next(output: &StepOutput) -> u32 {
        crate::sample(output.row(0), &greedy(), &[], &[]).token
    }

    fn greedy() -> baton_types::SamplingParams {
        baton_types::SamplingParams {
            temperature: 0.0,
            ..Default::default()
        }
    }

    fn run(backend: &mut dyn Backend, arena: &ArenaView, blocks: &[BlockId], chunks: &[&[u32]]) -> u32 {
        let mut start = 0;
        let mut last = StepOutput::default();
        for tokens in chunks {
            let slice = Slice {
                tokens,
                start,
                blocks,
                logits: WantedLogits::Last,
            };
            last = backend.step(arena, &[slice], &mut Unobserved).unwrap();
            start += tokens.len();
        }
        next(&last)
    }

    #[test]
    fn the_next_token_depends_on_the_context_and_not_on_its_chunks_or_blocks() {
        let mut backend = stub(StubSpec::default());
        let arena = arena(&*backend, 8);
        let (a, b) = ([BlockId(0), BlockId(1)], [BlockId(5), BlockId(3)]);
        let whole = run(&mut *backend, &arena, &a, &[&[1, 2, 3, 4, 5, 6]]);
        assert_eq!(run(&mut *backend, &arena, &b, &[&[1, 2, 3, 4], &[5], &[6]]), whole);
        assert!((32..127).contains(&whole));
        let others: Vec<u32> = (0..20)
            .map(|t| run(&mut *backend, &arena, &a, &[&[t, 2, 3, 4, 5, 6]]))
            .collect();
        assert!(others.iter().any(|token| *token != whole));
    }

    #[test]
    fn a_torn_or_foreign_block_changes_the_output() {
        let mut backend = stub(StubSpec::default());
        let arena = arena(&*backend, 8);
        let (a, b) = ([BlockId(0), BlockId(1)], [BlockId(2), BlockId(3)]);
        let contexts = [[1, 2, 3, 4, 5], [9, 2, 3, 4, 5]];
        run(&mut *backend, &arena, &a, &[&contexts[0]]);
        run(&mut *backend, &arena, &b, &[&contexts[1]]);
        let from = |backend: &mut dyn Backend, blocks: &[BlockId]| {
            let slice = Slice {
                tokens: &[7],
                start: 5,
                blocks,
                logits: WantedLogits::Last,
            };
            backend.step(&arena, &[slice], &mut Unobserved).unwrap().logits
        };
        let right = from(&mut *backend, &a);
        assert_eq!(from(&mut *backend, &a), right);
        assert_ne!(
            from(&mut *backend, &[BlockId(2), BlockId(1)]),
            right,
            "a foreign first block"
        );
        let bytes = arena.geometry().block_bytes();
        // SAFETY: nothing else uses the test's arena.
        unsafe { arena.write(BlockId(0), bytes - 1, &[0xff]).unwrap() };
        assert_ne!(from(&mut *backend, &a), right, "one torn byte in the last layer");
    }

    #[test]
    fn an_observer_stops_the_step_and_bad_input_is_named() {
        struct Stop;
        impl StepObserver for Stop {
            fn layer_done(&mut self, _layer: u32) -> ControlFlow<()> {
                ControlFlow::Break(())
            }
        }
        let mut backend = stub(StubSpec::default());
        let arena = arena(&*backend, 2);
        let slice = |tokens, blocks| Slice {
            tokens,
            start: 0,
            blocks,
            logits: WantedLogits::None,
        };
        let blocks = [BlockId(0)];
        let aborted = backend.step(&arena, &[slice(&[1], &blocks)], &mut Stop);
        assert_eq!(aborted, Err(StepError::Aborted { layer: 0 }));
        let mut fails = |tokens, blocks| {
            backend
                .step(&arena, &[slice(tokens, blocks)], &mut Unobserved)
                .unwrap_err()
        };
        assert!(matches!(fails(&[], &blocks), StepError::EmptySlice { .. }));
        assert!(matches!(fails(&[260], &blocks), StepError::TokenOutOfRange { .. }));
        assert!(matches!(fails(&[1; 5], &blocks), StepError::TooFewBlocks { .. }));
        assert!(matches!(fails(&[1], &[BlockId(2)]), StepError::OutOfArena { .. }));
    }

    #[test]
    fn the_script_is_read_from_text() {
        let spec: StubSpec = "stub:prefill_us=200,decode_us=5000,eos_at=9".parse().unwrap();
        assert_eq!(
            (spec.prefill_us_per_token, spec.decode_us_per_step, spec.eos_at),
            (200, 5000, 9)
        );
        assert_eq!("stub".parse(), Ok(StubSpec::default()));
        for bad in [
            "stub:speed=1",
            "stub:layers=0",
            "stub:decode_us=x",
            "stubs",
            "stub:decode_us",
            "stub:head_dim=3",
        ] {
            assert!(bad.parse::<StubSpec>().is_err(), "{bad}");
        }
        let other = stub(StubSpec {
            weights: 1,
            ..StubSpec::default()
        });
        assert_ne!(other.fingerprint(), stub(StubSpec::default()).fingerprint());
    }

    #[test]
    fn an_end_of_sequence_comes_only_where_the_script_has_it() {
        let mut backend = stub(StubSpec {
            eos_at: 6,
            ..StubSpec::default()
        });
        let arena = arena(&*backend, 4);
        let blocks = [BlockId(0), BlockId(1)];
        assert_ne!(run(&mut *backend, &arena, &blocks, &[&[1, 2, 3, 4, 5]]), 257);
        assert_eq!(run(&mut *backend, &arena, &blocks, &[&[1, 2, 3, 4, 5, 6]]), 257);
    }
}
