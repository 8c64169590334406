//! The requests of a trace, as flags shape them.

use anyhow::{Result, ensure};
use baton_planner::workload::{Arrivals, Spread, Workload, read};
use std::path::PathBuf;

/// Which requests, and when they come.
#[derive(Debug, Clone, clap::Args)]
pub struct WorkloadOptions {
    /// Requests: Mooncake's JSON lines, or Azure's CSV
    #[arg(long, value_name = "FILE")]
    pub trace: PathBuf,
    /// Only the trace's first requests
    #[arg(long, value_name = "COUNT", default_value_t = 300, value_parser = clap::value_parser!(u32).range(2..))]
    pub requests: u32,
    /// Prompts, answers and prefix blocks of the trace are made so many times as long: a number, or a fraction such as 1/32
    #[arg(long, value_name = "FACTOR", default_value = "1", value_parser = parse_factor)]
    pub lengths: f64,
    /// Decides how requests of one tick of a coarse clock are spread over it, Poisson arrivals, and prompts
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub seed: u64,
}

/// When requests come.
#[derive(Debug, Clone, clap::Args)]
pub struct ArrivalOptions {
    /// Requests per second on average [default: the trace's own rate]
    #[arg(long, value_name = "PER_SECOND", conflicts_with = "speed", value_parser = super::plan::parse_rate)]
    pub rate: Option<f64>,
    /// The trace's arrivals, so many times as fast
    #[arg(long, value_name = "FACTOR", value_parser = parse_factor)]
    pub speed: Option<f64>,
    /// trace: when the trace says; poisson: independently of each other; burst: --burst at once
    #[arg(long, value_name = "KIND", value_enum, default_value = "trace")]
    pub arrivals: ArrivalKind,
    /// Requests that come at once with --arrivals burst
    #[arg(long, value_name = "COUNT", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub burst: u32,
}

/// Where arrival times come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ArrivalKind {
    /// The trace.
    Trace,
    /// Exponential gaps.
    Poisson,
    /// Groups.
    Burst,
}

/// A number above 0, or a fraction of two.
pub fn parse_factor(text: &str) -> Result<f64, String> {
    let number = |text: &str| text.trim().parse::<f64>().ok();
    let factor = match text.split_once('/') {
        Some((above, below)) => number(above).zip(number(below)).map(|(above, below)| above / below),
        None => number(text),
    };
    let factor = factor.filter(|factor| factor.is_finite() && *factor > 0.0);
    factor.ok_or_else(|| format!("`{text}` is no factor: expected a number above 0, such as 2, 0.5 or 1/32"))
}

impl WorkloadOptions {
    /// The requests, at the trace's times.
    pub fn read(&self) -> Result<(Workload, Spread)> {
        let mut workload = read(&self.trace)?;
        workload.first(self.requests as usize);
        let spread = workload.spread_ticks(self.seed);
        workload.longer_inputs(self.lengths)?;
        workload.longer_outputs(self.lengths)?;
        Ok((workload, spread))
    }
}

impl ArrivalOptions {
    /// Moves the requests to when they are to come.
    pub fn apply(&self, workload: &mut Workload, seed: u64) -> Result<()> {
        if let Some(speed) = self.speed {
            workload.faster(speed)?;
        }
        let rate = self.rate.unwrap_or_else(|| workload.rate());
        ensure!(
            rate > 0.0,
            "all requests of the trace come at once: give a rate with --rate, and --arrivals poisson or burst"
        );
        match self.arrivals {
            ArrivalKind::Trace => workload.at_rate(rate)?,
            ArrivalKind::Poisson => workload.arrive(Arrivals::Poisson(rate), seed),
            ArrivalKind::Burst => {
                let every_s = f64::from(self.burst) / rate;
                workload.arrive(
                    Arrivals::Bursts {
                        size: self.burst,
                        every_s,
                    },
                    seed,
                );
            }
        }
        Ok(())
    }
}

/// Refuses requests that a model cannot take.
pub fn check_fits(workload: &Workload, model: &str, context_tokens: Option<u32>) -> Result<()> {
    let Some(context) = context_tokens else { return Ok(()) };
    let too_long = |(_, r): &(usize, &baton_planner::workload::Request)| r.input + r.output > context;
    let count = workload.requests().iter().enumerate().filter(too_long).count();
    let longest = workload
        .requests()
        .iter()
        .map(|r| r.input + r.output)
        .max()
        .unwrap_or(0);
    ensure!(
        count == 0,
        "{count} of {} requests are longer than the {context} tokens that {model} takes (the longest has {longest}): scale them \
         down with --lengths",
        workload.len()
    );
    Ok(())
}

/// What was done to times that a coarse clock had quantised.
pub fn spread_words(spread: Spread) -> String {
    match spread {
        Spread::Raw => "arrivals as in the trace".to_owned(),
        Spread::Ticks(tick) => format!(
            "arrivals of each {:.1} s tick of the trace spread evenly over it by chance",
            tick.seconds()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_numbers_or_fractions() {
        assert_eq!(parse_factor("1/32"), Ok(0.03125));
        assert_eq!(parse_factor("2"), Ok(2.0));
        for bad in ["0", "-1", "1/0", "x", "1/x", ""] {
            assert!(parse_factor(bad).unwrap_err().contains("1/32"), "{bad}");
        }
    }
}
