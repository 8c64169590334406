//! A replay in the figures that predictions have.

use baton_load::{Percentiles, Summary};
use baton_planner::predict::Figures;

/// The figures of a run.
pub fn figures(summary: &Summary) -> Figures {
    let mut figures = Figures::default();
    let times: [(&str, &Percentiles); 4] = [
        ("ttft", &summary.ttft),
        ("itl", &summary.itl),
        ("tpot", &summary.tpot),
        ("e2e", &summary.e2e),
    ];
    for (name, percentiles) in times {
        let Percentiles { p50, p90, p99, .. } = *percentiles;
        for (share, value) in [("p50", p50), ("p90", p90), ("p99", p99)] {
            figures.set(&format!("{name}_{share}"), value);
        }
    }
    figures.set("offered_rps", Some(summary.offered_rps));
    figures.set(
        "served_share",
        Some(summary.served as f64 / summary.requests.max(1) as f64),
    );
    if let Some(goodput) = &summary.goodput {
        figures.set("goodput_rps", Some(goodput.rps));
        figures.set("good_share", Some(goodput.share));
    }
    figures
}
