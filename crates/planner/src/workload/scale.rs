//! Makes another workload of one: another rate, other lengths, fewer requests, times spread that a clock had quantised.

use super::{Workload, WorkloadError};
use crate::Nanos;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

/// What was done about times that a coarse clock had quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spread {
    /// Nothing: they are not.
    Raw,
    /// Requests of one tick were spread evenly by chance over it.
    Ticks(Nanos),
}

impl Workload {
    /// Spreads the requests of each tick of a coarse clock over the tick, by seed. Times count as quantised where most
    /// requests share theirs with another; a tick is the median gap between distinct times.
    pub fn spread_ticks(&mut self, seed: u64) -> Spread {
        let mut gaps: Vec<u64> = self
            .requests
            .windows(2)
            .map(|pair| pair[1].at.0 - pair[0].at.0)
            .collect();
        gaps.retain(|gap| *gap > 0);
        if (gaps.len() + 1) * 2 > self.len() || gaps.is_empty() {
            return Spread::Raw;
        }
        gaps.sort_unstable();
        let tick = gaps[gaps.len() / 2];
        let mut rng = Pcg64Mcg::seed_from_u64(seed);
        for request in &mut self.requests {
            request.at.0 += rng.random_range(0..tick);
        }
        self.sort();
        Spread::Ticks(Nanos(tick))
    }

    /// The same requests, `factor` times as often.
    ///
    /// # Errors
    /// Where it is no positive number.
    pub fn faster(&mut self, factor: f64) -> Result<(), WorkloadError> {
        positive("rate factor", factor)?;
        for request in &mut self.requests {
            request.at = Nanos((request.at.0 as f64 / factor) as u64);
        }
        Ok(())
    }

    /// The same requests at so many per second on average.
    ///
    /// # Errors
    /// Where that is no positive number, or all requests come at once.
    pub fn at_rate(&mut self, per_second: f64) -> Result<(), WorkloadError> {
        positive("rate", per_second)?;
        let now = self.rate();
        positive("rate of the trace", now)?;
        self.faster(per_second / now)
    }

    /// Prompts and prefix blocks `factor` times as long.
    ///
    /// # Errors
    /// Where it is no positive number, or blocks would not be whole tokens.
    pub fn longer_inputs(&mut self, factor: f64) -> Result<(), WorkloadError> {
        positive("input factor", factor)?;
        if let Some(tokens) = self.block_tokens {
            let scaled = f64::from(tokens) * factor;
            if scaled < 1.0 || scaled.fract() != 0.0 {
                return Err(WorkloadError::Scale {
                    what: "input factor",
                    value: factor,
                    expected: "the trace's blocks must stay whole tokens",
                });
            }
            self.block_tokens = Some(scaled as u32);
        }
        for request in &mut self.requests {
            request.input = scaled(request.input, factor);
            if let Some(tokens) = self.block_tokens {
                request.blocks = request.blocks.min(request.input / tokens);
            }
        }
        Ok(())
    }

    /// Answers `factor` times as long.
    ///
    /// # Errors
    /// Where it is no positive number.
    pub fn longer_outputs(&mut self, factor: f64) -> Result<(), WorkloadError> {
        positive("output factor", factor)?;
        for request in &mut self.requests {
            request.output = scaled(request.output, factor);
        }
        Ok(())
    }

    /// Cuts prompts such that each and its answer have at most so many tokens; gives how many were longer.
    pub fn cut_inputs(&mut self, tokens_max: u32) -> usize {
        let mut cut = 0;
        for request in &mut self.requests {
            let most = tokens_max.saturating_sub(request.output).max(1);
            if request.input > most {
                request.input = most;
                if let Some(tokens) = self.block_tokens {
                    request.blocks = request.blocks.min(most / tokens);
                }
                cut += 1;
            }
        }
        cut
    }

    /// This workload, and behind it another one that begins `fade` before this one's end: requests of this one get the rarer
    /// over that time, and those of the other the more frequent, by chance. None where both have prefix blocks, of
    /// different sizes.
    pub fn fades_into(&self, other: &Self, fade: Nanos, seed: u64) -> Option<Self> {
        let begins = self.duration().saturating_sub(fade);
        let joined = self.clone().then(Nanos::ZERO, other)?;
        let back = self.duration().saturating_sub(begins);
        let (early, late) = joined.requests.split_at(self.len());
        let share = |at: Nanos| at.saturating_sub(begins).seconds() / fade.seconds().max(1e-9);
        let mut rng = Pcg64Mcg::seed_from_u64(seed);
        let stays = |request: &&super::Request| rng.random::<f64>() >= share(request.at);
        let mut requests: Vec<super::Request> = early.iter().filter(stays).copied().collect();
        let moved = late.iter().map(|request| super::Request {
            at: request.at.saturating_sub(back),
            ..*request
        });
        let mut rng = Pcg64Mcg::seed_from_u64(seed.wrapping_add(1));
        requests.extend(moved.filter(|request| rng.random::<f64>() < share(request.at)));
        let mut faded = Self { requests, ..joined };
        faded.sort();
        Some(faded)
    }

    /// Only the first so many.
    pub fn first(&mut self, requests: usize) {
        self.requests.truncate(requests);
    }

    /// Without the first so many; the others come as much earlier.
    pub fn skip(&mut self, requests: usize) {
        self.requests.drain(..requests.min(self.requests.len()));
        self.sort();
    }
}

fn scaled(tokens: u32, factor: f64) -> u32 {
    ((f64::from(tokens) * factor) as u32).max(1)
}

fn positive(what: &'static str, value: f64) -> Result<(), WorkloadError> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(WorkloadError::Scale {
        what,
        value,
        expected: "a number above 0",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticked() -> Workload {
        let mut workload = Workload {
            block_tokens: Some(512),
            ..Workload::default()
        };
        for tick in 0..50u64 {
            (0..10).for_each(|i| workload.push(Nanos(tick * 3_000_000_000), 1000 + i, 40, &[0, 1]));
        }
        workload
    }

    #[test]
    fn ticks_are_spread_by_seed_and_fine_times_are_left() {
        let mut workload = ticked();
        assert_eq!(workload.spread_ticks(7), Spread::Ticks(Nanos(3_000_000_000)));
        let mut same = ticked();
        same.spread_ticks(7);
        assert_eq!(workload, same);
        let distinct: std::collections::BTreeSet<u64> = workload.requests().iter().map(|r| r.at.0).collect();
        assert!(distinct.len() > 490);
        assert_eq!(workload.spread_ticks(7), Spread::Raw);
        assert_eq!(workload, same);
    }

    #[test]
    fn rate_and_lengths_scale() {
        let mut workload = ticked();
        workload.at_rate(10.0).unwrap();
        assert!((workload.rate() - 10.0).abs() < 1e-3, "{}", workload.rate());
        workload.longer_inputs(1.0 / 32.0).unwrap();
        workload.longer_outputs(1.0 / 32.0).unwrap();
        assert_eq!((workload.requests()[0].input, workload.requests()[0].output), (31, 1));
        assert_eq!(workload.block_tokens(), Some(16));
        assert!(workload.longer_inputs(1.0 / 32.0).is_err(), "half a token");
        assert!(workload.faster(0.0).is_err() && workload.at_rate(f64::NAN).is_err());
        let last = workload.requests()[11].at - workload.requests()[10].at;
        workload.first(12);
        workload.skip(10);
        let times: Vec<_> = workload.requests().iter().map(|r| r.at).collect();
        assert_eq!(times, [Nanos::ZERO, last]);
    }
}
