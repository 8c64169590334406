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
