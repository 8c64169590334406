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
}

impl Tables {
    /// Makes them those of live nodes.
    pub fn scale(&mut self, slower: Slower) {
        self.prefill.scale(slower.prefill);
        self.decode.scale(slower.decode);
        self.mixed_saves_s *= slower.decode;
        if let Some(Contended { prefilling, decoding }) = &mut self.contended {
            prefilling.prefill.scale(slower.prefill);
            decoding.prefill.scale(slower.prefill);
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
}

/// Medians of each step, measured in turns: what changes on the machine meanwhile meets all of them.
fn medians(engine: &mut Engine, steps: &[Step], repeat: usize) -> Result<Vec<f64>> {
    let mut times = vec![Vec::with_capacity(repeat); steps.len()];
    for _ in 0..repeat {
        for (step, times) in steps.iter().zip(&mut times) {
            times.push(engine.step(step.0, step.1, step.2, step.3)?);
        }
    }
    Ok(times.into_iter().map(median).collect())
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Measures it all.
pub fn measure(engine: &mut Engine, neighbour: Option<&Neighbour>, points: &Points) -> Result<Tables> {
    ensure!(points.repeat > 0, "--repeat is 0: each point is measured at least once");
    let (prefill, decode) = (points.prefill(), points.decode());
    let told =
        |what: &str, steps: &[Step]| eprintln!("baton: {what}: {} points, {} times each", steps.len(), points.repeat);
    // The first steps touch what later ones find warm.
    medians(engine, &prefill[..1], 2)?;
    told("steps of prompts", &prefill);
    let prefill_alone = grid(
        &points.new,
        &points.context,
        &prefill,
        &medians(engine, &prefill, points.repeat)?,
    );
    told("steps of decoding", &decode);
    let decode_alone = decode_grid(points, &decode, &medians(engine, &decode, points.repeat)?);
    let contended = match neighbour {
        None => None,
        Some(neighbour) => {
            let mut beside = |doing, what| -> Result<Steps> {
                neighbour.does(doing);
                told(&format!("steps of prompts beside a node that {what}"), &prefill);
                let prompts = medians(engine, &prefill, points.repeat)?;
                told(&format!("steps of decoding beside a node that {what}"), &decode);
                let decoding = medians(engine, &decode, points.repeat)?;
                neighbour.does(Doing::Idle);
                Ok(Steps {
                    prefill: grid(&points.new, &points.context, &prefill, &prompts),
                    decode: decode_grid(points, &decode, &decoding),
                })
            };
            Some(Contended {
                prefilling: beside(Doing::Prefill, "prefills")?,
                decoding: beside(Doing::Decode, "decodes")?,
            })
        }
    };
    let residuals = residuals(engine, points, &prefill_alone, &decode_alone)?;
    Ok(Tables {
        mixed_saves_s: mixed_saves(engine, points)?,
        prefill: prefill_alone,
        decode: decode_alone,
        contended,
        residuals,
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

/// What a step that does both saves over the two apart; at least nothing.
fn mixed_saves(engine: &mut Engine, points: &Points) -> Result<f64> {
    let (new, context, total) = (
        points.new[points.new.len() - 2],
        points.context[1],
        1024.min(points.longest - 1),
    );
    let steps = [(new, context, 2, total), (new, context, 0, 0), (0, 0, 2, total)];
    let times = medians(engine, &steps, points.repeat)?;
    Ok((times[1] + times[2] - times[0]).max(0.0))
}

/// How far steps between the points are from what is interpolated there.
fn residuals(engine: &mut Engine, points: &Points, prefill: &Grid, decode: &Grid) -> Result<Vec<Residual>> {
    let between = |axis: &[u32]| -> Vec<u32> { axis.windows(2).map(|pair| (pair[0] + pair[1]) / 2).collect() };
    let (contexts, totals) = (between(&points.context), between(&points.total));
    let pairs = |a: &[u32], b: &[u32]| -> Vec<(u32, u32)> {
        let count = a.len().max(b.len());
        (0..count).map(|i| (a[i % a.len()], b[(i * 2 + 1) % b.len()])).collect()
    };
    let prompts = pairs(&between(&points.new), &contexts)
        .into_iter()
        .map(|(a, b)| (a, b, 0, 0));
    let decodes = pairs(&points.batch, &totals)
        .into_iter()
        .filter(|(batch, total)| points.can_be(*batch, *total));
    let tables: [(&str, &Grid, Vec<Step>); 2] = [
        ("prefill", prefill, prompts.collect()),
        ("decode", decode, decodes.map(|(a, b)| (0, 0, a, b)).collect()),
    ];
    let mut residuals = Vec::new();
    for (table, grid, steps) in tables {
        let times = medians(engine, &steps, points.repeat)?;
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
        residuals.push(Residual {
            table: table.to_owned(),
            p50: at(0.5).unwrap_or(0.0),
            p90: at(0.9).unwrap_or(0.0),
            count: off.len() as u32,
        });
    }
    Ok(residuals)
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
