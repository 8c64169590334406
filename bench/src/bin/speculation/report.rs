//! The rounds, and what came of them.

use crate::answers::{Node, Set, Text};
use crate::options::Options;
use crate::prompts;
use anyhow::{Result, bail, ensure};
use baton_node_host::engine::Speculation;
use serde::Serialize;

/// An answer with a smaller share of distinct runs of eight tokens is a loop, which anything would guess.
const DISTINCT_MIN: f64 = 0.7;

#[derive(Serialize)]
struct Line {
    set: &'static str,
    prompts: usize,
    at_once: usize,
    threads: usize,
    tokens: usize,
    /// Tokens per second, medians of the rounds.
    without: f64,
    with: f64,
    /// Median of each round's ratio, the least and the most.
    ratio: f64,
    ratio_min: f64,
    ratio_max: f64,
    drafted: u32,
    accepted: u32,
    /// Of all runs of eight tokens, those that are the first of their kind in their answer; the least of all answers.
    distinct: f64,
    identical: bool,
}

/// Runs all rounds and prints a line for each set.
pub async fn run(options: Options) -> Result<()> {
    let text = Text::new(&options)?;
    let nodes = [
        Node::start(&options, Speculation::Off)?,
        Node::start(&options, options.speculation)?,
    ];
    let sets = [("quoting", &prompts::QUOTING[..]), ("free", &prompts::FREE[..])];
    let mut sets: Vec<Set> = sets
        .into_iter()
        .map(|(name, prompts)| Set::new(name, &text, prompts))
        .collect::<Result<_>>()?;
    for round in 0..options.rounds {
        for set in &mut sets {
            eprintln!("round {} of {}: {}", round + 1, options.rounds, set.name);
            set.round(&nodes, &options).await?;
        }
    }
    for set in &sets {
        let line = line(set, &options)?;
        print(&line, options.json)?;
        if options.show {
            set.show(&text);
        }
    }
    for node in nodes {
        node.end().await;
    }
    ensure!(
        sets.iter().all(Set::is_identical),
        "outputs differ with drafts and without"
    );
    if let Some(set) = sets.iter().find(|set| set.distinct() < DISTINCT_MIN) {
        bail!("an answer of the {} set repeats itself: --show prints them", set.name);
    }
    Ok(())
}

fn line(set: &Set, options: &Options) -> Result<Line> {
    let [without, with] = [0, 1].map(|engine| set.rates(engine));
    let ratios: Vec<f64> = with
        .iter()
        .zip(&without)
        .map(|(with, without)| with / without)
        .collect();
    let (ratio, ratio_min, ratio_max) = spread(ratios);
    let (drafted, accepted) = set.drafts();
    Ok(Line {
        set: set.name,
        prompts: set.prompts(),
        at_once: options.at_once,
        threads: match options.threads {
            0 => std::thread::available_parallelism()?.get(),
            threads => threads,
        },
        tokens: set.tokens(),
        without: spread(without).0,
        with: spread(with).0,
        ratio,
        ratio_min,
        ratio_max,
        drafted,
        accepted,
        distinct: set.distinct(),
        identical: set.is_identical(),
    })
}

/// Median, least and most.
fn spread(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

fn print(line: &Line, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(line)?);
        return Ok(());
    }
    let Line {
        set,
        tokens,
        without,
        with,
        ratio,
        ratio_min,
        ratio_max,
        drafted,
        accepted,
        distinct,
        identical,
        ..
    } = line;
    let rate = 100.0 * f64::from(*accepted) / f64::from((*drafted).max(1));
    println!(
        "{set:>8}: {without:.1} -> {with:.1} tok/s, {ratio:.2}x ({ratio_min:.2} to {ratio_max:.2}); {tokens} tokens a round, \
         {drafted} drafted in all, {rate:.0}% right; distinct runs of 8 at least {:.0}%; {}",
        100.0 * distinct,
        if *identical { "identical" } else { "OUTPUTS DIFFER" }
    );
    Ok(())
}
