//! A replay's figures for people.

use baton_load::{Percentiles, Summary};
use std::fmt::Write as _;

pub fn text(summary: &Summary) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{} requests in {:.1} s ({:.2} per second came): {} served, {} refused, {} failed{}",
        summary.requests,
        summary.took_s,
        summary.offered_rps,
        summary.served,
        summary.refused,
        summary.errors,
        if summary.unfinished > 0 {
            format!("; {} more were not finished or not sent", summary.unfinished)
        } else {
            String::new()
        }
    );
    let _ = writeln!(
        out,
        "{} prompt tokens, {} tokens of answers ({:.1} per second)\n",
        summary.prompt_tokens, summary.tokens, summary.tokens_per_s
    );
    let _ = writeln!(out, "ms                  p50       p90       p99     p99.9       max");
    let rows: [(&str, &Percentiles); 6] = [
        ("TTFT", &summary.ttft),
        ("ITL", &summary.itl),
        ("frame gap", &summary.frame_gap),
        ("TPOT", &summary.tpot),
        ("E2E", &summary.e2e),
        ("own delay", &summary.dispatch_delay),
    ];
    for (name, percentiles) in rows {
        let Percentiles {
            p50,
            p90,
            p99,
            p999,
            max,
            ..
        } = *percentiles;
        let cells: String = [p50, p90, p99, p999, max].into_iter().map(cell).collect();
        let _ = writeln!(out, "{name:<13}{cells}");
    }
    if let Some(goodput) = &summary.goodput {
        let _ = writeln!(
            out,
            "\ngoodput {:.2} requests/s: {:.1}% of the requests within all bounds",
            goodput.rps,
            100.0 * goodput.share
        );
        for attained in &goodput.attained {
            let word = if attained.met { "kept" } else { "broken" };
            let _ = writeln!(
                out,
                "  {:<20} {word}: {:.1}% of the values within",
                attained.clause,
                100.0 * attained.share
            );
        }
    }
    for said in &summary.said {
        let _ = writeln!(out, "error: {said}");
    }
    out
}

fn cell(seconds: Option<f64>) -> String {
    match seconds {
        Some(seconds) => format!("{:>10.2}", seconds * 1e3),
        None => format!("{:>10}", "failed"),
    }
}
