//! Predicted against measured, as a table in Markdown, and as error bars.

use super::super::replay::figures;
use super::speed::Speed;
use super::stored::{Measured, SetAside};
use baton_planner::predict::{Comparison, Figures, compare};
use baton_planner::profile::ErrorBar;
use std::fmt::Write as _;

pub fn rows(measured: &Measured) -> Vec<Comparison> {
    let runs: Vec<Figures> = measured.runs.iter().map(figures).collect();
    compare(&measured.case.figures, &runs)
}

/// All cases: figures of which nothing is promised are in the JSON.
pub fn markdown(all: &[Measured]) -> String {
    let mut out = String::from(
        "| nodes | load, requests/s | figure | predicted | measured | error | allowed | |\n|---|---|---|---|---|---|---|---|\n",
    );
    for measured in all {
        let case = &measured.case;
        for row in rows(measured).iter().filter(|row| row.allowed.is_some()) {
            let is_rate = row.figure.ends_with("rps");
            let show = |value: f64| {
                if is_rate {
                    format!("{value:.2}/s")
                } else {
                    format!("{:.1} ms", value * 1e3)
                }
            };
            let values: Vec<String> = row.measured.iter().map(|value| show(*value)).collect();
            let _ = writeln!(
                out,
                "| {} | {:.0}%, {:.2} | {} | {} | {} | {:+.0}% | {:.0}% | {} |",
                case.division,
                100.0 * case.load,
                case.rate,
                row.figure.trim_end_matches("_rps"),
                show(row.predicted),
                values.join(", "),
                100.0 * row.error,
                100.0 * row.allowed.unwrap_or(0.0),
                if row.holds() { "holds" } else { "**off**" }
            );
        }
    }
    let promised: Vec<Comparison> = all.iter().flat_map(rows).filter(|row| row.allowed.is_some()).collect();
    let held = promised.iter().filter(|row| row.holds()).count();
    let _ = writeln!(out, "\n{held} of {} figures are as near as promised.", promised.len());
    out.push_str("\nThe machine, idle, against the profile, before and after each replay:\n\n");
    out.push_str("| nodes | load | prompts | steps |\n|---|---|---|---|\n");
    for Measured { case, machine, .. } in all {
        let times = |what: fn(&Speed) -> f64| {
            let run = |[before, after]: &[Speed; 2]| format!("{:.2}x to {:.2}x", what(before), what(after));
            machine.iter().map(run).collect::<Vec<_>>().join(", ")
        };
        let (prompts, steps) = (times(|speed| speed.prompts), times(|speed| speed.steps));
        let _ = writeln!(
            out,
            "| {} | {:.0}% | {prompts} | {steps} |",
            case.division,
            100.0 * case.load
        );
    }
    for Measured { case, set_aside, .. } in all {
        for SetAside { summary, machine } in set_aside {
            let Speed { prompts, steps } = Speed::worst(machine);
            let (division, load) = (case.division, 100.0 * case.load);
            let measured = compare(&case.figures, &[figures(summary)]);
            let promised: Vec<&Comparison> = measured.iter().filter(|row| row.allowed.is_some()).collect();
            let held = promised.iter().filter(|row| row.holds()).count();
            let _ = writeln!(
                out,
                "\nSet aside: a replay of {division} at {load:.0}%, with prompts of {prompts:.2}x and steps of {steps:.2}x; {held} of its {} \
                 figures would have held.",
                promised.len()
            );
        }
    }
    out
}

/// Every promised figure is as near as promised.
pub fn holds(all: &[Measured]) -> bool {
    all.iter().flat_map(rows).all(|row| row.holds())
}

/// The largest error of each figure, to be stored in the profile.
pub fn error_bars(all: &[Measured], about: &str) -> Vec<ErrorBar> {
    let mut bars: Vec<ErrorBar> = Vec::new();
    for measured in all {
        for row in rows(measured).into_iter().filter(|row| row.allowed.is_some()) {
            let run = format!("{} at {:.2}/s, {about}", measured.case.division, measured.case.rate);
            let bar = ErrorBar {
                metric: row.figure,
                error: row.error,
                run,
            };
            match bars.iter_mut().find(|known| known.metric == bar.metric) {
                Some(known) if known.error.abs() >= bar.error.abs() => {}
                Some(known) => *known = bar,
                None => bars.push(bar),
            }
        }
    }
    bars
}
