//! What clients see when a decode node is taken out from under their streams: the longest time without a token against the
//! time that a token takes, each run on a cluster of its own, every answer compared with the undisturbed one.

use anyhow::Result;
use baton_tests::{Ask, ClusterOptions, Leave, Left, leave_under_load, model_path};
use clap::Parser;
use std::path::PathBuf;
use std::time::Duration;

/// Measures the longest gap of streams whose decode node drains.
#[derive(Debug, Parser)]
struct Options {
    /// The model; without it the small one that the tests use
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Runs of each kind
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    runs: usize,
    /// Streams on the node that leaves
    #[arg(long, value_name = "COUNT", default_value_t = 8)]
    streams: u64,
    /// Tokens of each prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 300)]
    prompt: u64,
    /// Tokens of each answer
    #[arg(long, value_name = "TOKENS", default_value_t = 500)]
    tokens: u32,
    /// Compute threads of each node
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    threads: usize,
    /// Transports of the nodes, the first choice first
    #[arg(long, value_name = "NAME,...", default_value = "shm,tcp")]
    transports: String,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    let model = options.model.clone().unwrap_or_else(model_path).display().to_string();
    let threads = options.threads.to_string();
    let asks: Vec<Ask> = (0..options.streams)
        .map(|stream| {
            let token = |at: u64| 1_000 + (at * 7_919 + stream * 104_729) % 29_000;
            let ids = (0..options.prompt).map(|at| u32::try_from(token(at)).unwrap_or(1_000));
            Ask::greedy_ids(ids.collect(), options.tokens)
        })
        .collect();
    println!(
        "| how | longest gap, ms | median ITL, ms | gap / ITL | undisturbed: gap, ITL, ms | moved | anew | left after, s |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for leave in [Leave::Drain, Leave::Sigterm] {
        let mut all: Vec<Left> = Vec::new();
        for _ in 0..options.runs {
            let cluster = ClusterOptions::pair(&model).node_flags(&[
                "--threads",
                &threads,
                "--transports",
                &options.transports,
                "--speculation",
                "off",
            ]);
            let left = leave_under_load(cluster, &asks, asks.len(), leave).await?;
            show(&format!("{leave:?}"), std::slice::from_ref(&left));
            all.push(left);
        }
        show(&format!("{leave:?}, median"), &all);
    }
    Ok(())
}

/// The medians of some runs.
fn show(name: &str, runs: &[Left]) {
    let of = |value: fn(&Left) -> f64| median(runs.iter().map(value).collect());
    println!(
        "| {name} | {:.1} | {:.1} | {:.2} | {:.1}, {:.1} | {:.0} | {:.0} | {:.2} |",
        of(|left| ms(left.longest_gap)),
        of(|left| ms(left.median_itl)),
        of(|left| ms(left.longest_gap) / ms(left.median_itl)),
        of(|left| ms(left.undisturbed_gap)),
        of(|left| ms(left.undisturbed_itl)),
        of(|left| left.moved as f64),
        of(|left| left.anew as f64),
        of(|left| left.took.as_secs_f64()),
    );
}
