//! The flags, and the order in which things are measured.

use super::super::signals::{INTERRUPTED, unless_interrupted};
use super::engine::{BLOCK_TOKENS, Engine};
use super::live::{self, Live, Probes, Slower};
use super::neighbour::Neighbour;
use super::tables::{self, Points, Tables};
use crate::cluster::{ClusterOptions, Shape};
use crate::models::ModelSource;
use anyhow::{Context, Result, anyhow, ensure};
use baton_node_runtime::parse_bytes;
use baton_planner::profile::{FORMAT_VERSION, Grid, Kind, ModelShape, Profile as ProfileFile, Steps};
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

/// As nodes have them unless told.
const CHUNK_TOKENS: u32 = 256;
const PREFILL_RUNNING_MAX: u32 = 32;

/// Measures what a node can do on this machine, for `baton plan --profile`.
///
/// First the engine in this process: how long steps take over what they compute, alone and beside as many busy neighbours as nodes will
/// have. Then a prefill node and a decode node, started for this: hand-overs, what the coordinator adds, KV capacity, start, change of
/// role. Nothing else should run on the machine meanwhile. Takes some minutes for a small model.
#[derive(Debug, clap::Args)]
pub struct Profile {
    /// smollm2, a .gguf file, a folder with config.json and *.safetensors, or a Hugging Face repository
    #[arg(long, value_name = "MODEL", default_value = "smollm2")]
    model: ModelSource,
    /// Where the profile is written, JSON
    #[arg(long, value_name = "FILE", default_value = "profile.json")]
    out: PathBuf,
    /// Compute threads of a node
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    threads: u32,
    /// 1: steps are also measured beside another node that computes on this machine
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1))]
    neighbours: u32,
    /// KV memory of each node; steps are measured up to as many tokens as it holds
    #[arg(long, value_name = "BYTES", default_value = "512MiB", value_parser = parse_bytes)]
    kv_bytes: u64,
    /// The largest decode batch that is measured; a node runs no more than 256 unless told
    #[arg(long, value_name = "COUNT", default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..=256))]
    batch_max: u32,
    /// The longest prompt and answer that are measured
    #[arg(long, value_name = "TOKENS", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1024..))]
    context_max: u32,
    /// Times that each point is measured; the median counts
    #[arg(long, value_name = "COUNT", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,
}

impl Profile {
    /// Measures, writes, and tells the main figures.
    pub async fn run(self) -> Result<ExitCode> {
        ensure!(
            !self.model.is_stub(),
            "a stub's times are scripted: there is nothing to measure; name a model with --model"
        );
        match unless_interrupted(self.measure()).await? {
            Some(measured) => measured.map(|()| ExitCode::SUCCESS),
            None => {
                eprintln!("baton: interrupted; nothing was written");
                Ok(ExitCode::from(INTERRUPTED))
            }
        }
    }

    async fn measure(&self) -> Result<()> {
        let model = self.model.resolve().await?;
        let (settings, path) = (self.settings(), model.clone());
        let steps = tokio::task::spawn_blocking(move || settings.steps(&path));
        let steps = steps.await.map_err(|_| anyhow!("measuring steps panicked"))??;
        let longest = steps.longest;
        let probes = Probes {
            lengths: [16, 64, 128, 256, 1024, 2048, 4096]
                .into_iter()
                .filter(|length| *length + 64 < longest)
                .collect(),
            repeat: self.repeat as usize,
            chunk_tokens: CHUNK_TOKENS,
            block_tokens: BLOCK_TOKENS,
            prefill: &steps.tables.prefill,
            decode: &steps.tables.decode,
            prefill_beside: steps.tables.contended.as_ref().map(|c| &c.prefilling.prefill),
            decode_beside: steps.tables.contended.as_ref().map(|c| &c.prefilling.decode),
        };
        let live = live::measure(&self.pair(model), &probes).await?;
        let profile = self.profile(steps, live);
        profile.check()?;
        profile.write(&self.out)?;
        writeln!(std::io::stdout(), "{}", told(&profile, &self.out.display().to_string())).context("write")
    }

    fn settings(&self) -> Settings {
        Settings {
            threads: self.threads as usize,
            neighbours: self.neighbours,
            batch_max: self.batch_max,
            context_max: self.context_max,
            kv_bytes: self.kv_bytes,
            repeat: self.repeat as usize,
        }
    }

    fn pair(&self, model: String) -> ClusterOptions {
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        ClusterOptions {
            shape: Shape {
                prefill: 1,
                decode: 1,
                model: self.model.clone(),
            },
            model,
            kv_bytes: Some(self.kv_bytes * 2),
            threads: Some(self.threads as usize),
            cpus: Vec::new(),
            store: "embedded".to_owned(),
            name: "default".to_owned(),
            http_listen: any_port,
            grpc_listen: any_port,
            // Probes must go through both nodes, however short they are.
            coordinator_flags: vec!["--routing-policy".to_owned(), "least-loaded".to_owned()],
            node_flags: one_token_a_step(),
            log_filter: "warn".to_owned(),
            show_logs: false,
        }
    }

    fn profile(&self, mut steps: Measured, live: Live) -> ProfileFile {
        let (slower, unsteady) = (live.slower, steps.tables.unsteady);
        warn_of_noise(&steps.tables, slower);
        steps.tables.scale(slower);
        let beside = match &steps.tables.contended {
            Some(_) => "alone, and beside a neighbour that computes prompts, or decodes, all the time",
            None => "alone",
        };
        let sources = vec![
            format!(
                "steps: the engine in one process, {beside}; medians of {} rounds, the slowest {:.0}% slower than the fastest; {}",
                self.repeat,
                100.0 * unsteady,
                steps.numerics
            ),
            "steps that no node can do (a sequence longer than the model takes): the line through their row".to_owned(),
            format!(
                "hand-overs, overhead: up to {} requests one by one through a live pair",
                live.probes
            ),
            format!(
                "steps are scaled to those of the live pair: first chunks {:.3}, later ones {:.3}, decoding {:.3}, beside prompts decoding {:.3} and prompts {:.3}",
                slower.first_chunk, slower.later_chunks, slower.decode, slower.decode_beside, slower.prompts_beside
            ),
        ];
        ProfileFile {
            version: FORMAT_VERSION,
            name: format!("{}, {} threads on {}", live.model, self.threads, steps.hardware),
            kind: Kind::Measured,
            sources,
            hardware: steps.hardware,
            model: ModelShape {
                name: live.model,
                layers: steps.layers,
                kv_bytes_per_token: steps.kv_token_bytes,
            },
            block_tokens: BLOCK_TOKENS,
            chunk_tokens: CHUNK_TOKENS,
            kv_capacity_tokens: live.kv_capacity_tokens,
            queue_max: live.queue_max,
            prefill_running_max: PREFILL_RUNNING_MAX,
            prefill: steps.tables.prefill,
            decode: steps.tables.decode,
            mixed_saves_s: steps.tables.mixed_saves_s,
            handover: live.handover,
            handover_tail: live.handover_tail,
            contended: steps.tables.contended,
            request_overhead_s: live.request_overhead_s,
            startup_s: live.startup_s,
            role_change_s: live.role_change_s,
            drain_s: live.drain_s,
            residuals: steps.tables.residuals,
            error_bars: Vec::new(),
        }
    }
}

/// Figures that say by themselves that something else ran.
fn warn_of_noise(tables: &Tables, slower: Slower) {
    let Slower {
        first_chunk,
        later_chunks,
        decode,
        decode_beside,
        prompts_beside,
    } = slower;
    let live = [first_chunk, later_chunks, decode, decode_beside, prompts_beside];
    if live.iter().any(|times| !(0.8..1.5).contains(times)) {
        eprintln!(
            "baton: steps of live nodes took {first_chunk:.2} and {later_chunks:.2} (prompts: first chunks, later ones), {decode:.2} \
             (decoding), and beside prompts {decode_beside:.2} (decoding) and {prompts_beside:.2} (prompts) times as long as those of the \
             engine; more than 1.5 or less than 0.8 means that something else ran, measure again"
        );
    }
    let between = tables.residuals.iter().fold(0.0, |most, r| r.p50.max(most));
    if tables.unsteady > 0.1 || between > 0.1 {
        eprintln!(
            "baton: the slowest round of steps took {:.0}% longer than the fastest, and steps between the points were {:.0}% off; more \
             than 10% means that the machine was not quiet: plans will be off as much, measure again or with a larger --repeat",
            100.0 * tables.unsteady,
            100.0 * between
        );
    }
}

/// Nodes draw one token from each step: how many they could guess depends on the text, which neither profiles nor traces tell.
pub fn one_token_a_step() -> Vec<String> {
    vec!["--speculation".to_owned(), "off".to_owned()]
}

/// What the measuring thread needs to know.
struct Settings {
    threads: usize,
    neighbours: u32,
    batch_max: u32,
    context_max: u32,
    kv_bytes: u64,
    repeat: usize,
}

/// What it measured.
struct Measured {
    tables: Tables,
    layers: u32,
    kv_token_bytes: u64,
    longest: u32,
    numerics: String,
    hardware: String,
}

impl Settings {
    fn steps(&self, model: &str) -> Result<Measured> {
        let load = || {
            eprintln!("baton: loading {model}");
            Engine::load(model, self.threads, self.kv_bytes)
        };
        let mut engine = load()?;
        let neighbour = match self.neighbours {
            0 => None,
            _ => Some(Neighbour::start(load()?)),
        };
        let blocks = engine.blocks();
        let longest = engine
            .config()
            .context_tokens
            .min(self.context_max)
            .min(blocks * BLOCK_TOKENS);
        let points = Points::new(CHUNK_TOKENS, longest, blocks, self.batch_max, self.repeat);
        let tables = tables::measure(&mut engine, neighbour.as_ref(), &points)?;
        neighbour.map_or(Ok(()), Neighbour::end)?;
        Ok(Measured {
            tables,
            layers: engine.config().layers,
            kv_token_bytes: engine.kv_token_bytes(),
            longest,
            numerics: engine.numerics(),
            hardware: hardware(),
        })
    }
}

/// The processor's name, where the system tells it.
fn hardware() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

fn told(profile: &ProfileFile, out: &str) -> String {
    let at = |grid: &Grid, x: f64, y: f64| grid.at(x, y, ["x", "y"]).unwrap_or(0.0) * 1e3;
    let beside = |pick: fn(&Steps) -> &Grid, x: f64, y: f64| {
        let contended = profile.contended.as_ref();
        contended.map_or(String::new(), |c| {
            let (prefilling, decoding) = (at(pick(&c.prefilling), x, y), at(pick(&c.decoding), x, y));
            format!(" ({prefilling:.1} beside a node that prefills, {decoding:.1} beside one that decodes)")
        })
    };
    let middle = |parts: &[f64]| parts.get(parts.len() / 2).copied().unwrap_or(0.0);
    let path = profile.handover.first();
    let bytes = path.and_then(|path| Some((path.path.clone(), *path.bytes.last()?, *path.seconds.last()?)));
    let (path, bytes, seconds) = bytes.unwrap_or_default();
    let residuals: Vec<String> = profile
        .residuals
        .iter()
        .map(|r| format!("{} {:.1}% (p90 {:.1}%)", r.table, 100.0 * r.p50, 100.0 * r.p90))
        .collect();
    format!(
        "{}\n  chunk of {} tokens    {:.1} ms{}\n  decode step, 1 of 256 {:.2} ms{}\n  decode step, 8 of 4096 {:.2} ms{}\n  \
         both in one step save {:.2} ms\n  hand-over by {path}    {:.1} MB in {:.2} ms; the first gap is {:.2} ms longer ({:.2} where the prefill node goes on)\n  request overhead      {:.2} ms\n  \
         KV capacity           {} tokens\n  start {:.1} s, change of role {:.2} s, end of an empty node {:.2} s\n  off the tables, between points: {}\nwritten to {out}",
        profile.name,
        profile.chunk_tokens,
        at(&profile.prefill, f64::from(profile.chunk_tokens), 0.0),
        beside(|c| &c.prefill, f64::from(profile.chunk_tokens), 0.0),
        at(&profile.decode, 1.0, 256.0),
        beside(|c| &c.decode, 1.0, 256.0),
        at(&profile.decode, 8.0, 4096.0),
        beside(|c| &c.decode, 8.0, 4096.0),
        profile.mixed_saves_s * 1e3,
        bytes / 1e6,
        seconds * 1e3,
        middle(&profile.handover_tail.idle) * 1e3,
        middle(&profile.handover_tail.busy) * 1e3,
        profile.request_overhead_s * 1e3,
        profile.kv_capacity_tokens,
        profile.startup_s,
        profile.role_change_s,
        profile.drain_s,
        residuals.join(", ")
    )
}
