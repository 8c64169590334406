//! Workloads drawn by chance, by seed.

use super::Workload;
use crate::Nanos;
use rand::SeedableRng;
use rand_distr::{Distribution, Exp1, LogNormal};
use rand_pcg::Pcg64Mcg;

/// When requests come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arrivals {
    /// Independently of each other, so many per second on average.
    Poisson(f64),
    /// At equal gaps, so many per second.
    Even(f64),
    /// So many at once, each so many seconds.
    Bursts {
        /// At once.
        size: u32,
        /// Between two bursts, seconds.
        every_s: f64,
    },
}

/// How long prompts or answers are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lengths {
    /// All alike, tokens.
    Constant(u32),
    /// Exponential with this mean, tokens; at least 1.
    Exponential(f64),
    /// Log-normal of this median and this sigma of the logarithm; at least 1 and at most `max` tokens.
    LogNormal {
        /// Half are shorter, tokens.
        median: f64,
        /// Spread of the logarithm.
        sigma: f64,
        /// None is longer, tokens.
        max: u32,
    },
}

/// Draws a workload.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Generator {
    /// How many.
    pub requests: usize,
    /// When.
    pub arrivals: Arrivals,
    /// Prompts.
    pub inputs: Lengths,
    /// Answers.
    pub outputs: Lengths,
}

impl Generator {
    /// The workload of a seed. Arrivals, prompts and answers are drawn apart, so that one may change without the others.
    pub fn draw(&self, seed: u64) -> Workload {
        let [mut times, mut inputs, mut outputs] =
            [1, 2, 3].map(|stream: u64| Pcg64Mcg::seed_from_u64(seed.wrapping_mul(4).wrapping_add(stream)));
        let mut workload = Workload::default();
        let mut at = 0.0;
        for index in 0..self.requests {
            match self.arrivals {
                Arrivals::Poisson(rate) => {
                    let gap: f64 = Exp1.sample(&mut times);
                    at += gap / rate;
                }
                Arrivals::Even(rate) => at = index as f64 / rate,
                Arrivals::Bursts { size, every_s } => at = (index / size.max(1) as usize) as f64 * every_s,
            }
            let input = self.inputs.draw(&mut inputs);
            let output = self.outputs.draw(&mut outputs);
            workload.push(Nanos::from_seconds(at), input, output, &[]);
        }
        workload
    }
}

impl Lengths {
    fn draw(&self, rng: &mut Pcg64Mcg) -> u32 {
        match *self {
            Self::Constant(tokens) => tokens.max(1),
            Self::Exponential(mean) => {
                let unit: f64 = Exp1.sample(rng);
                (unit * mean).round().max(1.0) as u32
            }
            Self::LogNormal { median, sigma, max } => {
                let drawn = LogNormal::new(median.max(1.0).ln(), sigma.max(0.0)).map_or(median, |law| law.sample(rng));
                (drawn.round().max(1.0) as u32).min(max)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_those_asked_for_and_seeds_decide() {
        let generator = Generator {
            requests: 20_000,
            arrivals: Arrivals::Poisson(5.0),
            inputs: Lengths::Exponential(1000.0),
            outputs: Lengths::Constant(9),
        };
        let workload = generator.draw(3);
        assert!((workload.rate() / 5.0 - 1.0).abs() < 0.03, "{}", workload.rate());
        let (input, output) = workload.mean_lengths();
        assert!((input / 1000.0 - 1.0).abs() < 0.03 && output == 9.0, "{input}");
        assert_eq!(workload, generator.draw(3));
        assert_ne!(workload, generator.draw(4));
    }
}
