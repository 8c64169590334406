//! Step times over what a step computes: measured at the points of a grid, in turns, the median of each. What no node can ever do
//! (one sequence with more tokens than the model takes) is filled by a line through what its row measured.

use super::engine::{BLOCK_TOKENS, Engine};
use super::live::Slower;
use super::neighbour::{Doing, Neighbour};
use anyhow::{Result, ensure};
use baton_planner::profile::{Contended, Grid, Residual, Steps};

/// What to measure.
pub struct Points {
    /// New prompt tokens of a step, and tokens before them.
    pub new: Vec<u32>,
    pub context: Vec<u32>,
    /// Sequences of a decode step, and tokens of all of them.
    pub batch: Vec<u32>,
    pub total: Vec<u32>,
    /// The longest sequence.
    pub longest: u32,
    /// KV blocks in all.
    pub blocks: u32,
    /// Times that each point is measured.
    pub repeat: usize,
}

/// What was measured.
pub struct Tables {
    pub prefill: Grid,
    pub decode: Grid,
    pub contended: Option<Contended>,
    pub mixed_saves_s: f64,
    pub residuals: Vec<Residual>,
    /// The slowest round over the fastest, less 1: what else the machine did.
    pub unsteady: f64,
}

impl Tables {
    /// Makes them those of live nodes.
    pub fn scale(&mut self, slower: Slower) {
        let by_chunk = |grid: &mut Grid| {
            for (column, context) in grid.y.clone().into_iter().enumerate() {
                grid.scale_column(
                    column,
                    if context > 0.0 {
                        slower.later_chunks
                    } else {
                        slower.first_chunk
                    },
                );
            }
        };
        by_chunk(&mut self.prefill);
        self.decode.scale(slower.decode);
        self.mixed_saves_s *= slower.decode;
        if let Some(Contended { prefilling, decoding }) = &mut self.contended {
            prefilling.prefill.scale(slower.prompts_beside);
            by_chunk(&mut decoding.prefill);
            prefilling.decode.scale(slower.decode_beside);
            decoding.decode.scale(slower.decode);
        }
    }
}

/// A step: new tokens, context, batch, total.
type Step = (u32, u32, u32, u32);

impl Points {
    /// Up to a chunk, the longest sequence, and as many tokens as there is KV for.
    pub fn new(chunk: u32, longest: u32, blocks: u32, batch: u32, repeat: usize) -> Self {
        let up_to = |all: &[u32], max: u32| {
            let mut points: Vec<u32> = all.iter().copied().filter(|point| *point < max).collect();
            points.push(max);
            points
        };
        Self {
            new: up_to(&[1, 16, 64, 128], chunk),
            context: up_to(&[0, 256, 1024, 2048, 4096], longest - chunk),
            batch: up_to(&[1, 2, 4, 8, 16, 32, 64, 128], batch.min(blocks)),
            total: up_to(&[1, 256, 1024, 2048, 4096, 8192, 16384], blocks * BLOCK_TOKENS),
            longest,
            blocks,
            repeat,
        }
    }

    fn prefill(&self) -> Vec<Step> {
        let each = |new: &u32| {
            self.context
                .iter()
                .map(|context| (*new, *context, 0, 0))
                .collect::<Vec<_>>()
        };
        self.new.iter().flat_map(each).collect()
    }

    fn can_be(&self, batch: u32, total: u32) -> bool {
        let each = total.div_ceil(batch);
        total >= batch && each < self.longest && each.div_ceil(BLOCK_TOKENS) <= self.blocks / batch
    }

    fn decode(&self) -> Vec<Step> {
        let each = |batch: &u32| {
            let batch = *batch;
            let totals = self.total.iter().filter(move |total| self.can_be(batch, **total));
            totals.map(move |total| (0, 0, batch, *total)).collect::<Vec<_>>()
        };
        self.batch.iter().flat_map(each).collect()
    }

    /// Steps of prompts and of decoding that lie between the points.
    fn between(&self) -> (Vec<Step>, Vec<Step>) {
        let between = |axis: &[u32]| -> Vec<u32> { axis.windows(2).map(|pair| (pair[0] + pair[1]) / 2).collect() };
        let pairs = |a: &[u32], b: &[u32]| -> Vec<(u32, u32)> {
            let count = a.len().max(b.len());
            (0..count).map(|i| (a[i % a.len()], b[(i * 2 + 1) % b.len()])).collect()
        };
        let prompts = pairs(&between(&self.new), &between(&self.context)).into_iter();
        let decodes = pairs(&self.batch, &between(&self.total)).into_iter();
        (
            prompts.map(|(new, context)| (new, context, 0, 0)).collect(),
            decodes
                .filter(|(batch, total)| self.can_be(*batch, *total))
                .map(|(batch, total)| (0, 0, batch, total))
                .collect(),
        )
    }

    /// A step of a prompt and two sequences, and the two apart.
    fn mixed(&self) -> [Step; 3] {
        let (new, context, total) = (
            self.new[self.new.len() - 2],
            self.context[1],
            1024.min(self.longest - 1),
        );
        [(new, context, 2, total), (new, context, 0, 0), (0, 0, 2, total)]
    }
}

/// Steps, what the neighbour does meanwhile, and how long they took.
struct Turn {
    doing: Doing,
    steps: Vec<Step>,
    times: Vec<Vec<f64>>,
}

impl Turn {
    fn new(doing: Doing, steps: &[Step]) -> Self {
        Self {
            doing,
            steps: steps.to_vec(),
            times: vec![Vec::new(); steps.len()],
        }
    }

    fn medians(&self) -> Vec<f64> {
        self.times.iter().cloned().map(median).collect()
    }
}

/// The slowest round over the fastest, less 1. A round is as slow as its steps are over their medians, at the median.
fn unsteady(turns: &[Turn], rounds: usize) -> f64 {
    let round = |round: usize| {
        let over = |turn: &Turn| -> Vec<f64> {
            let pairs = turn.times.iter().zip(turn.medians());
            pairs.map(|(times, median)| times[round] / median).collect()
        };
        median(turns.iter().flat_map(over).collect())
    };
    let rounds: Vec<f64> = (0..rounds).map(round).collect();
    let slowest = rounds.iter().copied().fold(0.0, f64::max);
    slowest / rounds.into_iter().fold(f64::INFINITY, f64::min) - 1.0
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Measures it all, in rounds of everything: what changes on the machine within minutes meets all tables alike.
pub fn measure(engine: &mut Engine, neighbour: Option<&Neighbour>, points: &Points) -> Result<Tables> {
    ensure!(points.repeat > 0, "--repeat is 0: each point is measured at least once");
    let (prefill, decode) = (points.prefill(), points.decode());
    let (prefill_between, decode_between) = points.between();
    let mixed = points.mixed();
    let alone = [&prefill, &decode, &prefill_between, &decode_between, &mixed[..]];
    let mut turns: Vec<Turn> = alone.into_iter().map(|steps| Turn::new(Doing::Idle, steps)).collect();
    if neighbour.is_some() {
        for doing in [Doing::Prefill, Doing::Decode] {
            turns.extend([Turn::new(doing, &prefill), Turn::new(doing, &decode)]);
        }
    }
    eprintln!(
        "baton: steps of the engine: {} points, {} times each",
        turns.iter().map(|turn| turn.steps.len()).sum::<usize>(),
        points.repeat
    );
    // The first steps touch what later ones find warm.
    for step in &prefill[..2] {
        engine.step(step.0, step.1, step.2, step.3)?;
    }
    for round in 1..=points.repeat {
        for turn in &mut turns {
            if let Some(neighbour) = neighbour {
                neighbour.does(turn.doing);
            }
            for (step, times) in turn.steps.iter().zip(&mut turn.times) {
                times.push(engine.step(step.0, step.1, step.2, step.3)?);
            }
        }
        eprintln!("baton: round {round} of {}", points.repeat);
    }
    if let Some(neighbour) = neighbour {
        neighbour.does(Doing::Idle);
    }
    let unsteady = unsteady(&turns, points.repeat);
    let mut medians = turns.iter().map(Turn::medians);
    let mut next = || medians.next().unwrap_or_default();
    let grids = |prompts: Vec<f64>, decoding: Vec<f64>| Steps {
        prefill: grid(&points.new, &points.context, &prefill, &prompts),
        decode: decode_grid(points, &decode, &decoding),
    };
    let steps = grids(next(), next());
    let residuals = vec![
        residual("prefill", &steps.prefill, &prefill_between, &next())?,
        residual("decode", &steps.decode, &decode_between, &next())?,
    ];
    // What a step that does both saves over the two apart; at least nothing.
    let saved = next();
    let mixed_saves_s = (saved[1] + saved[2] - saved[0]).max(0.0);
    let contended = neighbour.map(|_| Contended {
        prefilling: grids(next(), next()),
        decoding: grids(next(), next()),
    });
    Ok(Tables {
        mixed_saves_s,
        prefill: steps.prefill,
        decode: steps.decode,
        contended,
        residuals,
        unsteady,
    })
}

fn axis(points: &[u32]) -> Vec<f64> {
    points.iter().map(|point| f64::from(*point)).collect()
}

fn grid(x: &[u32], y: &[u32], steps: &[Step], times: &[f64]) -> Grid {
    let at = |a: u32, b: u32| {
        let found = steps.iter().position(|step| (step.0, step.1) == (a, b));
        found.map_or(0.0, |index| times[index])
    };
    Grid::of(axis(x), axis(y), |a, b| at(a as u32, b as u32))
}

fn decode_grid(points: &Points, steps: &[Step], times: &[f64]) -> Grid {
    let row = |batch: u32| -> Vec<(f64, f64)> {
        let measured = steps.iter().zip(times).filter(|(step, _)| step.2 == batch);
        measured.map(|(step, time)| (f64::from(step.3), *time)).collect()
    };
    Grid::of(axis(&points.batch), axis(&points.total), |batch, total| {
        let row = row(batch as u32);
        let known = row.iter().find(|(at, _)| (at - total).abs() < 0.5);
        known.map_or_else(|| line(&row, total), |(_, time)| *time)
    })
}

/// The least-squares line through some points, at `x`; never below the least of them.
fn line(points: &[(f64, f64)], x: f64) -> f64 {
    let n = points.len().max(1) as f64;
    let (mean_x, mean_y) = (
        points.iter().map(|p| p.0).sum::<f64>() / n,
        points.iter().map(|p| p.1).sum::<f64>() / n,
    );
    let across: f64 = points.iter().map(|p| (p.0 - mean_x).powi(2)).sum();
    let along: f64 = points.iter().map(|p| (p.0 - mean_x) * (p.1 - mean_y)).sum();
    let slope = if across > 0.0 { (along / across).max(0.0) } else { 0.0 };
    let least = points.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
    (mean_y + slope * (x - mean_x)).max(least.min(mean_y))
}

/// How far steps between the points are from what is interpolated there.
fn residual(table: &str, grid: &Grid, steps: &[Step], times: &[f64]) -> Result<Residual> {
    let mut off = Vec::new();
    for (step, time) in steps.iter().zip(times) {
        let (x, y) = if step.0 > 0 { (step.0, step.1) } else { (step.2, step.3) };
        let said = grid.at(f64::from(x), f64::from(y), ["x", "y"])?;
        off.push((said - time).abs() / time);
    }
    off.sort_by(f64::total_cmp);
    let at = |share: f64| {
        off.get((off.len().saturating_sub(1) as f64 * share).round() as usize)
            .copied()
    };
    Ok(Residual {
        table: table.to_owned(),
        p50: at(0.5).unwrap_or(0.0),
        p90: at(0.9).unwrap_or(0.0),
        count: off.len() as u32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_filled_by_the_line_of_its_row() {
        assert_eq!(line(&[(0.0, 1.0), (10.0, 2.0)], 30.0), 4.0);
        assert_eq!(line(&[(5.0, 2.0)], 100.0), 2.0);
        assert_eq!(
            line(&[(0.0, 2.0), (10.0, 1.0)], 100.0),
            1.5,
            "a row that falls by noise stays level"
        );
        let turn = |times: &[f64]| Turn {
            times: vec![times.to_vec(), times.iter().map(|t| 3.0 * t).collect()],
            ..Turn::new(Doing::Idle, &[])
        };
        let off = unsteady(&[turn(&[1.0, 1.1, 0.9]), turn(&[2.0, 2.2, 1.8])], 3);
        assert!((off - (1.1 / 0.9 - 1.0)).abs() < 1e-9, "{off}");
        let points = Points::new(64, 256, 32, 2, 1);
        assert_eq!(
            (points.new.clone(), points.total.clone()),
            (vec![1, 16, 64], vec![1, 256, 512])
        );
        assert_eq!(points.decode(), [(0, 0, 1, 1), (0, 0, 2, 256)]);
        assert!(
            points.can_be(2, 510) && !points.can_be(2, 511),
            "longer than the model takes"
        );
        let narrow = Points::new(64, 1024, 33, 4, 1);
        assert!(
            narrow.can_be(4, 512) && !narrow.can_be(4, 513),
            "a block of a sequence is its own"
        );
        let few = Points::new(64, 1024, 130, 256, 1);
        assert_eq!(few.batch.last(), Some(&130), "more sequences than blocks never run");
        for batch in &few.batch {
            let steps = few.decode();
            assert!(
                steps.iter().any(|step| step.2 == *batch),
                "nothing is measured of {batch}"
            );
        }
        let steps = [(0, 0, 1, 1), (0, 0, 2, 256)];
        let grid = decode_grid(&points, &steps, &[1.0, 2.0]);
        assert_eq!(grid.seconds, [vec![1.0; 3], vec![2.0; 3]]);
    }
}
