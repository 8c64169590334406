//! Speed of the engine alone: prefill and decode at some depths and batch sizes, one line for each.
//!
//! `pp512`: a prompt of 512 tokens in chunks of `--chunk`, last token's logits. `tg64`: 64 tokens one by one at a depth.
//! `tg32x8`: as that, eight sequences in each step; tokens of all of them count.
//!
//! With `--perplexity FILE` that of its text instead, as llama-perplexity counts it: whole windows, each from an empty context,
//! of which the second half is scored. With `--reads` also what decoding one sequence is bounded by: how fast as many threads
//! read memory, from huge pages where the system has them.

use anyhow::{Context, Result};
use baton_engine::{Activations, Backend, Isa, LoadOptions, Slice, Unobserved, WantedLogits, load};
use baton_kv_transfer::Arena;
use baton_node_host::KvDtypeFlag;
use baton_types::{ArenaView, BlockId};
use clap::Parser;
use memmap2::MmapMut;
use serde::Serialize;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Instant;

const BLOCK_TOKENS: u32 = 16;
/// Much more than caches hold.
const READ_BYTES: usize = 256 << 20;
const READ_TIMES: usize = 8;

/// Measures the engine.
#[derive(Parser)]
struct Options {
    /// A .gguf file or a folder with config.json and *.safetensors.
    #[arg(long)]
    model: PathBuf,
    /// Compute threads; 0 takes every core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Instruction-set path: avx512, avx2, neon, portable. The fastest, if not given.
    #[arg(long)]
    isa: Option<Isa>,
    /// Activations in f32 also where weights are quantised.
    #[arg(long)]
    exact: bool,
    /// Element type of KV.
    #[arg(long, value_enum, default_value = "f16")]
    kv_dtype: KvDtypeFlag,
    /// Tokens of one prefill step.
    #[arg(long, default_value_t = 512)]
    chunk: usize,
    /// Times that each test is run.
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Prompt lengths, in tokens; 0 for none.
    #[arg(long, value_delimiter = ',', default_value = "128,512,2048")]
    prompts: Vec<usize>,
    /// Depths at which decode is measured, in tokens.
    #[arg(long, value_delimiter = ',', default_value = "0,1024")]
    depths: Vec<usize>,
    /// Sequences that decode together; 0 for no decode.
    #[arg(long, value_delimiter = ',', default_value = "1,8")]
    batches: Vec<usize>,
    /// Perplexity of a text instead: JSON with token ids in `text.tokens`, as tests/golden/engine_logits.json.
    #[arg(long, value_name = "FILE")]
    perplexity: Option<PathBuf>,
    /// Tokens of a window of it.
    #[arg(long, default_value_t = 512)]
    window: usize,
    /// Also how fast memory is read, in GB/s; weights are read once for each token.
    #[arg(long)]
    reads: bool,
    /// Lines of JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Line {
    test: String,
    depth: usize,
    threads: usize,
    /// Median of the runs.
    tok_s: f64,
    tok_s_min: f64,
    tok_s_max: f64,
    rss_mib: u64,
    /// Most that was resident so far.
    peak_mib: u64,
}

struct Bench {
    options: Options,
    backend: Box<dyn Backend>,
    arena: ArenaView,
    tables: Vec<Vec<BlockId>>,
    threads: usize,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let begun = Instant::now();
    let load_options = LoadOptions {
        threads: options.threads,
        cpus: Vec::new(),
        kv_dtype: options.kv_dtype.into(),
        isa: options.isa,
        activations: if options.exact {
            Activations::F32
        } else {
            Activations::Int8
        },
    };
    let backend = load(&options.model, &load_options, &mut |_, _| {})?;
    let loaded = begun.elapsed();
    eprintln!("{}, loaded in {:.2} s", backend.numerics(), loaded.as_secs_f64());
    let sequences = options.batches.iter().copied().max().unwrap_or(1).max(1);
    let deepest = options
        .prompts
        .iter()
        .chain(&options.depths)
        .chain([&options.window])
        .copied()
        .max()
        .unwrap_or(0)
        + 64;
    let geometry = backend.config().kv_geometry(BLOCK_TOKENS, options.kv_dtype.into());
    let per_sequence = geometry.blocks_for(deepest);
    let arena = Arena::allocate(geometry, u32::try_from(per_sequence * sequences)?, &mut |_, _| {})?.view();
    let block = |i: usize| u32::try_from(i).map(BlockId).context("too many blocks");
    let tables = (0..sequences)
        .map(|s| (0..per_sequence).map(|i| block(s * per_sequence + i)).collect())
        .collect::<Result<_>>()?;
    let threads = match options.threads {
        0 => std::thread::available_parallelism()?.get(),
        threads => threads,
    };
    Bench {
        options,
        backend,
        arena,
        tables,
        threads,
    }
    .run()
}

impl Bench {
    fn run(&mut self) -> Result<()> {
        if let Some(path) = self.options.perplexity.clone() {
            return self.perplexity(&path);
        }
        for prompt in self.options.prompts.clone().into_iter().filter(|tokens| *tokens > 0) {
            self.measure(format!("pp{prompt}"), 0, prompt, |bench| bench.prefill(0, prompt))?;
        }
        for depth in self.options.depths.clone() {
            for batch in self
                .options
                .batches
                .clone()
                .into_iter()
                .filter(|sequences| *sequences > 0)
            {
                for sequence in 0..batch {
                    self.prefill(sequence, depth)?;
                }
                let (steps, name) = if batch == 1 {
                    (64, "tg64".into())
                } else {
                    (32, format!("tg32x{batch}"))
                };
                self.measure(name, depth, steps * batch, |bench| bench.decode(batch, depth, steps))?;
            }
        }
        if self.options.reads {
            self.reads()?;
        }
        Ok(())
    }

    fn reads(&self) -> Result<()> {
        let mut memory = MmapMut::map_anon(READ_BYTES)?;
        // A system without huge pages says no: then they are small, as they are for the weights.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        memory.fill(1);
        let mut rates: Vec<f64> = (0..self.options.repeat.max(1))
            .map(|_| {
                let begun = Instant::now();
                std::thread::scope(|scope| {
                    for part in memory.chunks(READ_BYTES.div_ceil(self.threads)) {
                        scope.spawn(|| {
                            for _ in 0..READ_TIMES {
                                black_box(sum(black_box(part)));
                            }
                        });
                    }
                });
                (READ_BYTES * READ_TIMES) as f64 / begun.elapsed().as_secs_f64() / 1e9
            })
            .collect();
        rates.sort_by(f64::total_cmp);
        let [min, median, max] = [0, rates.len() / 2, rates.len() - 1].map(|i| rates[i]);
        let threads = self.threads;
        if self.options.json {
            let line = serde_json::json!({"test": "read", "threads": threads, "gb_s": median, "gb_s_min": min, "gb_s_max": max});
            println!("{line}");
        } else {
            println!("    read             threads {threads}: {median:8.1} GB/s ({min:.1} to {max:.1})");
        }
        Ok(())
    }

    fn measure(
        &mut self,
        test: String,
        depth: usize,
        tokens: usize,
        mut run: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let mut rates = Vec::new();
        for _ in 0..self.options.repeat.max(1) {
            let begun = Instant::now();
            run(self)?;
            rates.push(tokens as f64 / begun.elapsed().as_secs_f64());
        }
        rates.sort_by(f64::total_cmp);
        let [min, median, max] = [0, rates.len() / 2, rates.len() - 1].map(|i| rates[i]);
        let (rss_mib, peak_mib) = (memory_mib("VmRSS:"), memory_mib("VmHWM:"));
        let line = Line {
            test,
            depth,
            threads: self.threads,
            tok_s: median,
            tok_s_min: min,
            tok_s_max: max,
            rss_mib,
            peak_mib,
        };
        if self.options.json {
            println!("{}", serde_json::to_string(&line)?);
        } else {
            let Line {
                test, depth, threads, ..
            } = line;
            println!(
                "{test:>8} depth {depth:>5} threads {threads}: {median:8.1} tok/s ({min:.1} to {max:.1}), {rss_mib} MiB"
            );
        }
        Ok(())
    }

    fn perplexity(&mut self, path: &Path) -> Result<()> {
        let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(path)?)?;
        let tokens: Vec<u32> = serde_json::from_value(golden["text"]["tokens"].clone()).context("text.tokens")?;
        let window = self.options.window;
        let (mut loss, mut count) = (0.0, 0);
        for tokens in tokens.chunks_exact(window) {
            for (i, chunk) in tokens.chunks(self.options.chunk.max(1)).enumerate() {
                let start = i * self.options.chunk;
                let slice = Slice {
                    tokens: chunk,
                    start,
                    blocks: &self.tables[0],
                    logits: WantedLogits::All,
                };
                let output = self.backend.step(&self.arena, &[slice], &mut Unobserved)?;
                for position in start.max(window / 2)..(start + chunk.len()).min(window - 1) {
                    loss += surprise(output.row(position - start), tokens[position + 1]);
                    count += 1;
                }
            }
        }
        let perplexity = (loss / f64::from(count)).exp();
        if self.options.json {
            println!(
                "{}",
                serde_json::json!({"test": "perplexity", "window": window, "tokens": count, "perplexity": perplexity})
            );
        } else {
            println!("perplexity {perplexity:.4} over {count} tokens in windows of {window}");
        }
        Ok(())
    }

    /// Runs `tokens` tokens of one sequence from position 0.
    fn prefill(&mut self, sequence: usize, tokens: usize) -> Result<()> {
        let vocab = self.backend.config().vocab;
        let ids: Vec<u32> = (0..tokens as u32)
            .map(|i| i.wrapping_mul(2_654_435_761) % vocab)
            .collect();
        for (i, chunk) in ids.chunks(self.options.chunk.max(1)).enumerate() {
            let start = i * self.options.chunk;
            let logits = if start + chunk.len() == tokens {
                WantedLogits::Last
            } else {
                WantedLogits::None
            };
            let slice = Slice {
                tokens: chunk,
                start,
                blocks: &self.tables[sequence],
                logits,
            };
            self.backend.step(&self.arena, &[slice], &mut Unobserved)?;
        }
        Ok(())
    }

    /// Greedy decode of the first `batch` sequences from `depth` on.
    fn decode(&mut self, batch: usize, depth: usize, steps: usize) -> Result<()> {
        let mut next: Vec<u32> = (1..=batch as u32).collect();
        for step in 0..steps {
            let slices: Vec<Slice<'_>> = (0..batch)
                .map(|i| Slice {
                    tokens: &next[i..=i],
                    start: depth + step,
                    blocks: &self.tables[i],
                    logits: WantedLogits::Last,
                })
                .collect();
            let output = self.backend.step(&self.arena, &slices, &mut Unobserved)?;
            next = (0..batch).map(|i| best(output.row(i))).collect();
        }
        Ok(())
    }
}

/// Reads everything; eight sums, so that none waits for another.
fn sum(bytes: &[u8]) -> [u64; 8] {
    let mut sums = [0u64; 8];
    for line in bytes.as_chunks::<64>().0 {
        for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
            *sum ^= u64::from_le_bytes(*word);
        }
    }
    sums
}

fn best(logits: &[f32]) -> u32 {
    let first = (0, f32::NEG_INFINITY);
    let pick = |best: (u32, f32), (id, x): (u32, &f32)| if *x > best.1 { (id, *x) } else { best };
    (0..).zip(logits).fold(first, pick).0
}

/// Negative log-likelihood of a token.
fn surprise(logits: &[f32], token: u32) -> f64 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|x| f64::from(x - highest).exp()).sum();
    total.ln() - f64::from(logits[token as usize] - highest)
}

/// Memory of this process; 0 where the system does not tell.
fn memory_mib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line
        .and_then(|line| line.split_whitespace().next())
        .and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
