//! What is promised to clients: bounds on percentiles.

use crate::Nanos;
use std::fmt;
use std::str::FromStr;

/// One time of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Metric {
    /// From arrival to the first token.
    Ttft,
    /// Between two tokens that follow each other; each gap counts.
    Itl,
    /// Mean of a request's gaps.
    Tpot,
    /// From arrival to the last token.
    E2e,
}

impl Metric {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ttft, Self::Itl, Self::Tpot, Self::E2e];

    /// As flags and reports write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Itl => "itl",
            Self::Tpot => "tpot",
            Self::E2e => "e2e",
        }
    }
}

/// A bound on one percentile of one metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clause {
    /// Of what.
    pub metric: Metric,
    /// Percent of the values that must be within, 1 to 99 (or with a decimal, such as 99.9), in tenths.
    pub per_mille: u32,
    /// The bound.
    pub bound: Nanos,
}

impl Clause {
    /// Share of the values that must be within.
    pub fn share(&self) -> f64 {
        f64::from(self.per_mille) / 1000.0
    }
}

impl fmt::Display for Clause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, tenth) = (self.per_mille / 10, self.per_mille % 10);
        let name = self.metric.name();
        let ms = self.bound.seconds() * 1e3;
        match tenth {
            0 => write!(f, "{name}_p{whole}={ms}ms"),
            tenth => write!(f, "{name}_p{whole}.{tenth}={ms}ms"),
        }
    }
}

/// All bounds; a metric appears once at most. A request is *good* where its own times are within: TTFT, TPOT and E2E within
/// their bounds, and as large a share of its gaps within the ITL bound as the clause asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Slo {
    /// In the order given.
    pub clauses: Vec<Clause>,
}

impl Slo {
    /// The clause on a metric.
    pub fn on(&self, metric: Metric) -> Option<&Clause> {
        self.clauses.iter().find(|clause| clause.metric == metric)
    }
}

impl fmt::Display for Slo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = self.clauses.iter().map(Clause::to_string).collect();
        f.write_str(&texts.join(","))
    }
}

/// Text that is no SLO.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SloError {
    /// Not `METRIC_pNN=TIME`.
    #[error(
        "`{0}` is no SLO: expected METRIC_pNN=TIME, such as ttft_p90=1s or itl_p99=50ms; metrics are ttft, itl, tpot and e2e"
    )]
    Form(String),
    /// Not a percentile.
    #[error("`{0}`: the percentile must be between p1 and p99.9")]
    Percentile(String),
    /// A number without a unit, or with another one.
    #[error("`{text}`: `{value}` is no time: give it with its unit, such as 50ms or 1.5s")]
    Unit {
        /// The clause.
        text: String,
        /// What stands where a time should.
        value: String,
    },
    /// Twice the same metric.
    #[error("{0} has two bounds: one percentile each")]
    Twice(&'static str),
}

impl FromStr for Slo {
    type Err = SloError;

    fn from_str(text: &str) -> Result<Self, SloError> {
        let mut clauses: Vec<Clause> = Vec::new();
        for part in text.split(',') {
            let clause = clause(part.trim())?;
            if clauses.iter().any(|known| known.metric == clause.metric) {
                return Err(SloError::Twice(clause.metric.name()));
            }
            clauses.push(clause);
        }
        Ok(Self { clauses })
    }
}

fn clause(text: &str) -> Result<Clause, SloError> {
    let form = || SloError::Form(text.to_owned());
    let (name, value) = text.split_once('=').ok_or_else(form)?;
    let (metric, percentile) = name.split_once("_p").ok_or_else(form)?;
    let metric = Metric::ALL
        .into_iter()
        .find(|known| known.name() == metric)
        .ok_or_else(form)?;
    let percentile: f64 = percentile.parse().map_err(|_| form())?;
    if !(1.0..=99.9).contains(&percentile) {
        return Err(SloError::Percentile(text.to_owned()));
    }
    let bound = time(value.trim()).ok_or_else(|| SloError::Unit {
        text: text.to_owned(),
        value: value.to_owned(),
    })?;
    Ok(Clause {
        metric,
        per_mille: (percentile * 10.0).round() as u32,
        bound,
    })
}

fn time(text: &str) -> Option<Nanos> {
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().ok()?;
    let seconds = match unit {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "s" => number,
        "m" => number * 60.0,
        _ => return None,
    };
    (seconds > 0.0).then(|| Nanos::from_seconds(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clauses_are_read_and_wrong_ones_say_what_is_expected() {
        let slo: Slo = "ttft_p90=1s, itl_p99.9=50ms".parse().unwrap();
        assert_eq!(slo.clauses[0].bound, Nanos(1_000_000_000));
        assert_eq!((slo.clauses[1].per_mille, slo.clauses[1].metric), (999, Metric::Itl));
        assert_eq!(slo.to_string(), "ttft_p90=1000ms,itl_p99.9=50ms");
        let wrong = |text: &str| text.parse::<Slo>().unwrap_err().to_string();
        assert!(wrong("ttft_p90=1").contains("give it with its unit"));
        assert!(wrong("ttft_p90=1kg").contains("give it with its unit"));
        assert!(wrong("ttft_p90=0ms").contains("no time"));
        assert!(wrong("ttft=1s").contains("METRIC_pNN=TIME"));
        assert!(wrong("latency_p90=1s").contains("metrics are ttft"));
        assert!(wrong("ttft_p100=1s").contains("between p1 and p99.9"));
        assert!(wrong("ttft_p90=1s,ttft_p50=1s").contains("two bounds"));
        assert!(wrong("").contains("METRIC_pNN=TIME"));
    }
}
