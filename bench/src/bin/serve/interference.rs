//! What prompts that arrive do to streams that run: the gaps of steady streams, without and with long prompts beside them.

use anyhow::{Context, Result, ensure};
use baton_load::{Observed, Percentiles, Planned, Prompt, Prompts, Target, mix, offer};
use serde::Serialize;
use std::future::pending;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Where: an OpenAI-compatible `http://HOST:PORT`, or `HOST:PORT` of Baton's gRPC
    #[arg(long, value_name = "ENDPOINT")]
    target: String,
    /// Streams that run all the time
    #[arg(long, value_name = "COUNT", default_value_t = 4)]
    streams: u64,
    /// Tokens of each of them
    #[arg(long, value_name = "TOKENS", default_value_t = 1300)]
    tokens: u32,
    /// Tokens of each prompt that arrives
    #[arg(long, value_name = "TOKENS", default_value_t = 1000)]
    prompt: u32,
    /// Tokens of the answers to them
    #[arg(long, value_name = "TOKENS", default_value_t = 8)]
    answer: u32,
    /// One arrives each so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 4.0)]
    every: f64,
    /// Which prompts are drawn
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// What the line of JSON calls the server
    #[arg(long, value_name = "NAME", default_value = "")]
    name: String,
    /// Prints one line of JSON instead of text
    #[arg(long)]
    json: bool,
}

/// Tokens of a steady stream's prompt.
const SHORT: u32 = 64;

/// The streams' gaps of one phase, seconds.
#[derive(Serialize)]
struct Phase {
    /// A piece of n tokens after a gap of g counts as n gaps of g/n.
    token: Percentiles,
    /// Between pieces, as they arrived.
    piece: Percentiles,
    arrivals: usize,
    arrivals_failed: usize,
    arrivals_ttft: Percentiles,
}

#[derive(Serialize)]
struct Report {
    name: String,
    alone: Phase,
    beside: Phase,
}

async fn phase(options: &Options, target: &Target, with_arrivals: bool) -> Result<Phase> {
    let prompts = Prompts {
        salt: mix(options.seed * 2 + u64::from(with_arrivals)),
        ..Prompts::default()
    };
    let begun = Instant::now();
    let mut streams = JoinSet::new();
    for name in 0..options.streams {
        let planned = Planned {
            at: Duration::ZERO,
            prompt: Prompt::Tokens(prompts.alone(name, SHORT)),
            output: options.tokens,
        };
        streams.spawn(target.clone().send(planned, begun));
    }
    let arrivals = |number: u64| Planned {
        at: Duration::from_secs_f64(options.every * (number + 1) as f64),
        prompt: Prompt::Tokens(prompts.alone(1000 + number, options.prompt)),
        output: options.answer,
    };
    let schedule: Vec<Planned> = if with_arrivals {
        (0..100_000)
            .map(arrivals)
            .take_while(|a| a.at < Duration::from_secs(1200))
            .collect()
    } else {
        Vec::new()
    };
    let mut steady: Vec<Observed> = Vec::new();
    let all_ended = async {
        while let Some(ended) = streams.join_next().await {
            steady.extend(ended);
        }
    };
    let arrived = if with_arrivals {
        offer(target, schedule, all_ended, |_| ()).await.requests
    } else {
        all_ended.await;
        Vec::new()
    };
    ensure!(steady.len() as u64 == options.streams, "a stream was lost");
    if let Some(failed) = steady.iter().find(|s| !s.is_served()) {
        anyhow::bail!("a steady stream failed: {:?}", failed.failure);
    }
    // The first gaps belong to the streams' own prompts.
    let skip = 16;
    let failed = arrived.iter().filter(|a| !a.is_served()).count();
    Ok(Phase {
        token: Percentiles::of(steady.iter().flat_map(|s| s.token_gaps().skip(skip)), 0),
        piece: Percentiles::of(steady.iter().flat_map(|s| s.frame_gaps().skip(skip / 2)), 0),
        arrivals: arrived.len(),
        arrivals_failed: failed,
        arrivals_ttft: Percentiles::of(
            arrived.iter().filter_map(Observed::ttft).map(|t| t.as_secs_f64()),
            failed,
        ),
    })
}

/// Runs it.
pub async fn run(options: Options) -> Result<()> {
    ensure!(options.every > 0.0, "--every must be above 0");
    let target = Target::connect(&options.target, None).await?;
    let warm = Planned {
        at: Duration::ZERO,
        prompt: Prompt::Tokens(Prompts::default().alone(0, options.prompt)),
        output: 4,
    };
    let warm = offer(&target, vec![warm], pending(), |_| ()).await;
    let first = warm.requests.first().context("one request")?;
    ensure!(
        first.is_served(),
        "{} does not answer: {:?}",
        options.target,
        first.failure
    );
    let report = Report {
        name: options.name.clone(),
        alone: phase(&options, &target, false).await?,
        beside: phase(&options, &target, true).await?,
    };
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    println!("{}, {} streams; gaps in ms", report.name, options.streams);
    println!("| | gaps | p50 | p99 | p99.9 | max |");
    println!("|---|---|---|---|---|---|");
    for (name, gaps) in [
        ("tokens, alone", &report.alone.token),
        ("tokens, prompts beside", &report.beside.token),
        ("pieces, alone", &report.alone.piece),
        ("pieces, prompts beside", &report.beside.piece),
    ] {
        let ms = |s: Option<f64>| s.unwrap_or_default() * 1e3;
        println!(
            "| {name} | {} | {:.1} | {:.1} | {:.1} | {:.1} |",
            gaps.count,
            ms(gaps.p50),
            ms(gaps.p99),
            ms(gaps.p999),
            ms(gaps.max)
        );
    }
    let b = &report.beside;
    println!(
        "{} prompts of {} tokens arrived, {} failed",
        b.arrivals, options.prompt, b.arrivals_failed
    );
    Ok(())
}
