//! The initiator: writes, measures and reports.

use crate::case::Case;
use crate::layout::Layout;
use crate::machine::Moment;
use crate::node::Node;
use crate::options::Options;
use crate::pool::Pool;
use crate::report::{Digests, Line, Round, Rounds};
use crate::target::{Question, Receiver, Target};
use anyhow::{Context, Result, ensure};
use baton_kv_transfer::PathKind;
use baton_kv_transfer::transport::{Extent, Path, SourceClaim};
use baton_types::Epoch;
use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// Single writes before those that count.
const LAT_WARMUP: usize = 20;
/// Blocks that single writes go through.
const LAT_BLOCKS: usize = 64;

/// Measures every case, and prints each as it is done.
pub fn run(options: &Options, runtime: &Runtime) -> Result<()> {
    let cases = options.cases()?;
    if !options.json {
        println!("{}", Line::HEAD);
    }
    for (case, index) in cases.iter().zip(0..) {
        let line = measure(options, runtime, case, index).with_context(|| format!("blocks of {} bytes", case.bytes))?;
        match options.json {
            true => println!("{}", serde_json::to_string(&line)?),
            false => println!("{line}"),
        }
        ensure!(
            line.verified,
            "blocks of {} bytes did not arrive as they were",
            case.bytes
        );
    }
    Ok(())
}

struct Run<'a> {
    options: &'a Options,
    runtime: &'a Runtime,
    node: Node,
    pool: Pool,
    target: Target,
    path: Arc<dyn Path>,
    /// Blocks of a round.
    blocks: usize,
    block_bytes: usize,
    claim: SourceClaim,
    begun: Instant,
}

fn measure(options: &Options, runtime: &Runtime, case: &Case, index: usize) -> Result<Line> {
    let mut target = match options.transport {
        PathKind::Memory => Target::Here(Box::new(runtime.block_on(Receiver::start(options, case))?)),
        PathKind::Tcp | PathKind::Shm | PathKind::Rdma | PathKind::Cuda => Target::spawn()?,
    };
    let node = runtime.block_on(Node::start(options, case, "initiator"))?;
    let pool = Pool(node.view.clone());
    pool.fill(options.seed);
    let peer = target.start(index)?;
    let address = peer.addresses.first().context("the target has no address")?;
    let path = runtime.block_on(node.transport.connect(&peer, address))?;
    let mut run = Run {
        options,
        runtime,
        node,
        pool,
        target,
        path,
        blocks: case.blocks_in(options.total_mib << 20),
        block_bytes: case.bytes,
        claim: Arc::new(()),
        begun: Instant::now(),
    };
    let (rounds, digests, last) = run.rounds()?;
    let verified = run.target.verify()?;
    let latencies = run.latencies(last + 1)?;
    let Run { node, target, path, .. } = run;
    runtime.block_on(async {
        path.close().await;
        node.transport.shutdown().await;
    });
    target.stop(runtime)?;
    let line = Line::new(options, case, &rounds, latencies, digests);
    Ok(line.with_verified(verified))
}

impl Run<'_> {
    /// All rounds; the number of the last.
    fn rounds(&mut self) -> Result<(Rounds, Option<Digests>, u64)> {
        let mut rounds = Rounds::new(self.blocks * self.block_bytes, self.options.rounds);
        let mut digests = self.options.digest.is_on().then(Digests::default);
        let mut number = 0;
        let total = self.options.warmup + 3 * self.options.rounds;
        while number < total && !rounds.are_enough() {
            self.progress(number, total);
            let layout = self.layout(number as u64);
            let round = self.round(number as u64, &layout)?;
            if number >= self.options.warmup {
                rounds.push(round);
            }
            if let Some(digests) = &mut digests {
                self.digest(&layout, digests)?;
            }
            number += 1;
            if rounds.len() >= 7 && self.begun.elapsed() > Duration::from_secs(self.options.max_s) {
                break;
            }
        }
        self.progress(total, total);
        Ok((rounds, digests, number as u64 - 1))
    }

    fn layout(&self, round: u64) -> Layout {
        Layout::of_round(self.options.seed, round, self.node.view.blocks(), self.blocks)
    }

    /// One round, from a list of slots to "all blocks are in the target".
    fn round(&mut self, number: u64, layout: &Layout) -> Result<Round> {
        let (round, writer) = (number, self.node.identity.instance);
        self.target.ask(&Question::Grant {
            round,
            writer,
            single: None,
        })?;
        let target_before = self.target.cpu()?;
        let before = Moment::now();
        let write = self.path.write(Epoch(1 + number), self.extents(layout, 0..self.blocks));
        self.runtime.block_on(write)?;
        let wall = before.wall.elapsed().as_secs_f64();
        let after = Moment::now();
        let target_after = self.target.cpu()?;
        Ok(Round {
            wall,
            cpu_initiator: after.cpu - before.cpu,
            cpu_target: target_after - target_before,
            machine: after.machine - before.machine,
        })
    }

    fn extents(&self, layout: &Layout, which: std::ops::Range<usize>) -> Vec<Extent> {
        let layers = self.node.view.geometry().layers;
        let slots = layout.source[which.clone()]
            .iter()
            .zip(&layout.destination[which.clone()]);
        slots
            .zip(which)
            .map(|((source, destination), ordinal)| Extent {
                ordinal: ordinal as u32,
                layers: 0..layers,
                source: *source,
                destination: *destination,
                claim: Arc::clone(&self.claim),
            })
            .collect()
    }

    /// Blocks written one at a time, microseconds from the call to the news that it is there.
    fn latencies(&mut self, round: u64) -> Result<Vec<f64>> {
        let count = LAT_WARMUP + self.options.lat_iters;
        let distinct = self.blocks.min(LAT_BLOCKS);
        let layout = self.layout(round).repeated(count, distinct);
        let writer = self.node.identity.instance;
        let single = Some((count, distinct));
        self.target.ask(&Question::Grant { round, writer, single })?;
        let mut latencies = Vec::with_capacity(self.options.lat_iters);
        for i in 0..count {
            let begun = Instant::now();
            let write = self.path.write(Epoch(1 + round), self.extents(&layout, i..i + 1));
            self.runtime.block_on(write)?;
            if i >= LAT_WARMUP {
                latencies.push(begun.elapsed().as_secs_f64() * 1e6);
            }
        }
        Ok(latencies)
    }

    fn digest(&mut self, layout: &Layout, digests: &mut Digests) -> Result<()> {
        let begun = Instant::now();
        let ours = self.pool.digest(&layout.source);
        let seconds = begun.elapsed().as_secs_f64();
        let (theirs, target_seconds) = self.target.digest()?;
        ensure!(ours == theirs, "the digests of the two ends differ");
        digests.push(self.blocks * self.block_bytes, seconds, target_seconds);
        Ok(())
    }

    /// On a terminal, where it takes long.
    fn progress(&self, round: usize, of: usize) {
        let terminal = std::io::stderr().is_terminal();
        if !terminal || self.begun.elapsed() < Duration::from_secs(2) {
            return;
        }
        match round == of {
            true => eprint!("\r{:60}\r", ""),
            false => eprint!(
                "\rblocks of {} bytes, round {} of at most {of} ",
                self.block_bytes,
                round + 1
            ),
        }
    }
}
