//! What is printed: the peers' fields, and a few of our own.

use crate::case::Case;
use crate::options::Options;
use serde::Serialize;
use std::fmt;

/// One round: seconds.
pub struct Round {
    pub wall: f64,
    pub cpu_initiator: f64,
    pub cpu_target: f64,
    /// CPU of the whole machine.
    pub machine: f64,
}

impl Round {
    /// CPU that others used meanwhile.
    fn others(&self) -> f64 {
        (self.machine - self.cpu_initiator - self.cpu_target).max(0.0)
    }

    /// No other load was noticed: as the peers' benches judge it.
    fn is_quiet(&self) -> bool {
        self.others() <= (0.25 * self.wall).max(0.03)
    }
}

/// The timed rounds.
pub struct Rounds {
    bytes: usize,
    wanted: usize,
    all: Vec<Round>,
}

impl Rounds {
    pub fn new(bytes: usize, wanted: usize) -> Self {
        Self {
            bytes,
            wanted,
            all: Vec::new(),
        }
    }

    pub fn push(&mut self, round: Round) {
        self.all.push(round);
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    fn quiet(&self) -> usize {
        self.all.iter().filter(|round| round.is_quiet()).count()
    }

    pub fn are_enough(&self) -> bool {
        self.quiet() >= self.wanted
    }

    /// Those that count: the quiet ones, where there are enough of them.
    fn counted(&self) -> Vec<&Round> {
        let only_quiet = self.quiet() >= self.wanted.min(7);
        let counted = self.all.iter().filter(|round| !only_quiet || round.is_quiet());
        counted.take(self.wanted).collect()
    }
}

/// What the digest passes took.
#[derive(Default)]
pub struct Digests {
    gigabytes: f64,
    initiator: f64,
    target: f64,
}

impl Digests {
    pub fn push(&mut self, bytes: usize, initiator: f64, target: f64) {
        self.gigabytes += bytes as f64 / 1e9;
        self.initiator += initiator;
        self.target += target;
    }
}

/// The line of one case. Speeds in 10^9 bytes a second.
#[derive(Serialize)]
pub struct Line {
    peer: String,
    block: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    total: usize,
    blocks: usize,
    rounds: usize,
    rounds_noisy: usize,
    gbps: f64,
    gbps_min: f64,
    gbps_max: f64,
    lat_us_p50: f64,
    lat_us_p99: f64,
    cpu_s_per_gb_initiator: f64,
    cpu_s_per_gb_target: f64,
    other_cores: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest_s_per_gb_initiator: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest_s_per_gb_target: Option<f64>,
    pub verified: bool,
}

impl Line {
    /// The columns of the table.
    pub const HEAD: &str =
        "block bytes   GB/s (min to max)        us p50    p99   CPU s/GB from + to   other cores  noisy  bytes";

    pub fn new(
        options: &Options,
        case: &Case,
        rounds: &Rounds,
        mut latencies: Vec<f64>,
        digests: Option<Digests>,
    ) -> Self {
        let counted = rounds.counted();
        let mut speeds: Vec<f64> = counted
            .iter()
            .map(|round| rounds.bytes as f64 / round.wall / 1e9)
            .collect();
        speeds.sort_by(f64::total_cmp);
        latencies.sort_by(f64::total_cmp);
        let gigabytes = (rounds.bytes * counted.len()) as f64 / 1e9;
        let sum = |of: fn(&Round) -> f64| counted.iter().map(|round| of(round)).sum::<f64>();
        let at = |sorted: &[f64], share: f64| {
            sorted
                .get((sorted.len() as f64 * share) as usize)
                .copied()
                .unwrap_or(0.0)
        };
        let model = case
            .model
            .map(|model| format!("{model} b{}", case.geometry.block_tokens));
        let per_gigabyte = |of: fn(&Digests) -> f64| digests.as_ref().map(|d| rounded(of(d) / d.gigabytes, 4));
        Self {
            peer: format!("baton-{}", options.transport),
            block: case.bytes,
            model,
            total: rounds.bytes,
            blocks: rounds.bytes / case.bytes,
            rounds: counted.len(),
            rounds_noisy: rounds.len() - rounds.quiet(),
            gbps: rounded(median(&speeds), 5),
            gbps_min: rounded(at(&speeds, 0.0), 3),
            gbps_max: rounded(speeds.last().copied().unwrap_or(0.0), 3),
            lat_us_p50: rounded(at(&latencies, 0.5), 1),
            lat_us_p99: rounded(at(&latencies, 0.99), 1),
            cpu_s_per_gb_initiator: rounded(sum(|round| round.cpu_initiator) / gigabytes, 3),
            cpu_s_per_gb_target: rounded(sum(|round| round.cpu_target) / gigabytes, 3),
            other_cores: rounded(sum(Round::others) / sum(|round| round.wall), 2),
            digest_s_per_gb_initiator: per_gigabyte(|digests| digests.initiator),
            digest_s_per_gb_target: per_gigabyte(|digests| digests.target),
            verified: false,
        }
    }

    /// Whether the target holds what was sent.
    pub fn with_verified(self, verified: bool) -> Self {
        Self { verified, ..self }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let speeds = format!("{:.2} ({:.2} to {:.2})", self.gbps, self.gbps_min, self.gbps_max);
        let cpu = format!("{:.3} + {:.3}", self.cpu_s_per_gb_initiator, self.cpu_s_per_gb_target);
        write!(
            f,
            "{:>11}   {speeds:22} {:>8.1} {:>6.1}   {cpu:18}   {:>11.2}  {:>5}  {}",
            self.block,
            self.lat_us_p50,
            self.lat_us_p99,
            self.other_cores,
            self.rounds_noisy,
            if self.verified { "right" } else { "WRONG" },
        )?;
        if let (Some(from), Some(to)) = (self.digest_s_per_gb_initiator, self.digest_s_per_gb_target) {
            write!(f, "  digest {from:.3} + {to:.3} s/GB")?;
        }
        self.model.iter().try_for_each(|model| write!(f, "  {model}"))
    }
}

fn median(sorted: &[f64]) -> f64 {
    let (low, high) = (sorted.len().saturating_sub(1) / 2, sorted.len() / 2);
    match (sorted.get(low), sorted.get(high)) {
        (Some(low), Some(high)) => (low + high) / 2.0,
        _ => 0.0,
    }
}

fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}
