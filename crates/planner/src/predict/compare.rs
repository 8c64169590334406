//! Predicted against measured.

use super::Figures;
use serde::{Deserialize, Serialize};

/// How far a prediction may be off, relative to what was measured; the spread of the runs counts where it is larger.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Which figure.
    pub figure: &'static str,
    /// How far.
    pub share: f64,
}

impl Tolerance {
    /// What a validation promises.
    pub const ALL: [Self; 5] = [
        Self::new("ttft_p50", 0.15),
        Self::new("ttft_p90", 0.15),
        Self::new("itl_p50", 0.15),
        Self::new("itl_p99", 0.15),
        Self::new("goodput_rps", 0.10),
    ];

    const fn new(figure: &'static str, share: f64) -> Self {
        Self { figure, share }
    }
}

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Which.
    pub figure: String,
    /// What the simulation said.
    pub predicted: f64,
    /// What each run measured.
    pub measured: Vec<f64>,
    /// (predicted - mean of measured) / mean of measured.
    pub error: f64,
    /// (largest - smallest) / mean of what was measured.
    pub spread: f64,
    /// How far it may be off; none where nothing is promised of this figure.
    pub allowed: Option<f64>,
}

impl Comparison {
    /// It is as near as promised; true where nothing is.
    pub fn holds(&self) -> bool {
        self.allowed.is_none_or(|allowed| self.error.abs() <= allowed)
    }
}

/// Each figure that is predicted and was measured by all runs.
pub fn compare(predicted: &Figures, runs: &[Figures]) -> Vec<Comparison> {
    let mut rows = Vec::new();
    for (figure, predicted) in &predicted.0 {
        let measured: Option<Vec<f64>> = runs.iter().map(|run| run.get(figure)).collect();
        let Some(measured) = measured.filter(|measured| !measured.is_empty()) else {
            continue;
        };
        let mean = measured.iter().sum::<f64>() / measured.len() as f64;
        let (low, high) = measured
            .iter()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                (low.min(*value), high.max(*value))
            });
        let scale = mean.abs().max(1e-12);
        let spread = (high - low) / scale;
        let promised = Tolerance::ALL.iter().find(|tolerance| tolerance.figure == figure);
        rows.push(Comparison {
            figure: figure.clone(),
            predicted: *predicted,
            error: (predicted - mean) / scale,
            spread,
            allowed: promised.map(|tolerance| tolerance.share.max(spread)),
            measured,
        });
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prediction_may_be_off_by_its_tolerance_or_by_the_spread_of_the_runs() {
        let figures = |ttft: f64, goodput: f64| {
            let mut figures = Figures::default();
            figures.set("ttft_p50", Some(ttft));
            figures.set("goodput_rps", Some(goodput));
            figures.set("only_here", Some(ttft).filter(|ttft| *ttft > 1.0));
            figures
        };
        let rows = compare(&figures(1.2, 0.9), &[figures(0.9, 1.0), figures(1.1, 1.0)]);
        let [goodput, ttft] = rows.as_slice() else {
            panic!("{rows:?}")
        };
        assert!((ttft.error - 0.2).abs() < 1e-9 && (ttft.spread - 0.2).abs() < 1e-9 && ttft.holds());
        assert!((goodput.error + 0.1).abs() < 1e-9 && goodput.allowed == Some(0.1));
        let rows = compare(&figures(1.2, 0.85), &[figures(1.0, 1.0), figures(1.0, 1.0)]);
        assert!(rows.iter().all(|row| !row.holds()), "{rows:?}");
        assert!(compare(&figures(1.0, 1.0), &[]).is_empty());
    }
}
