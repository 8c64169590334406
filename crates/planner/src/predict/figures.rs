//! The figures that are both predicted and measured.

use crate::sim::Outcome;
use crate::slo::Metric;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Percentiles that are compared.
const SHARES: [(&str, f64); 3] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)];

/// Figures by name: `ttft_p50` and the like in seconds, `goodput_rps` and `offered_rps` in requests per second, `good_share` and
/// `served_share` as shares. What is not known (so many requests failed) is not there.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Figures(pub BTreeMap<String, f64>);

impl Figures {
    /// Of a simulation.
    pub fn of(outcome: &Outcome) -> Self {
        let mut figures = Self::default();
        for metric in Metric::ALL {
            for (name, share) in SHARES {
                let time = outcome.percentile(metric, share).map(|time| time.seconds());
                figures.set(&format!("{}_{name}", metric.name()), time);
            }
        }
        let served = outcome.served() as f64 / outcome.requests.len().max(1) as f64;
        figures.set("goodput_rps", Some(outcome.goodput()));
        figures.set("offered_rps", Some(outcome.offered()));
        figures.set("good_share", Some(outcome.good_share()));
        figures.set("served_share", Some(served));
        figures
    }

    /// The means of those that all have.
    pub fn mean(all: &[Self]) -> Self {
        let mut means = Self::default();
        for name in all.iter().flat_map(|figures| figures.0.keys()) {
            let sum: Option<f64> = all.iter().map(|figures| figures.get(name)).sum();
            means.set(name, sum.map(|sum| sum / all.len() as f64));
        }
        means
    }

    /// Sets one, where it is known.
    pub fn set(&mut self, name: &str, value: Option<f64>) {
        if let Some(value) = value {
            self.0.insert(name.to_owned(), value);
        }
    }

    /// One by name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_is_of_what_all_have() {
        let figures = |ttft: f64, itl: Option<f64>| {
            let mut figures = Figures::default();
            figures.set("ttft_p50", Some(ttft));
            figures.set("itl_p50", itl);
            figures
        };
        let mean = Figures::mean(&[figures(1.0, Some(4.0)), figures(2.0, None)]);
        assert_eq!(mean, figures(1.5, None));
        assert_eq!(Figures::mean(&[]), Figures::default());
    }
}
