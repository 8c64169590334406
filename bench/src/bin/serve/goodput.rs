//! The highest rate at which a server keeps its promises: an open loop at rates that are doubled, halved and then bisected.

use anyhow::{Context, Result, bail, ensure};
use baton_load::{Observed, Percentiles, Prompts, Run, Target, mix, offer};
use baton_planner::slo::{Metric, Slo};
use baton_planner::workload::{Arrivals, Generator, Lengths, Workload, read};
use serde::Serialize;
use std::future::pending;
use std::path::PathBuf;

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Where: an OpenAI-compatible `http://HOST:PORT`, or `HOST:PORT` of Baton's gRPC
    #[arg(long, value_name = "ENDPOINT")]
    target: String,
    /// `mixed` (Poisson arrivals of --input and --output tokens), or a trace's file
    #[arg(long, value_name = "mixed|FILE", default_value = "mixed")]
    workload: String,
    /// Tokens of each prompt of `mixed`
    #[arg(long, value_name = "TOKENS", default_value_t = 328)]
    input: u32,
    /// Tokens of each answer of `mixed`
    #[arg(long, value_name = "TOKENS", default_value_t = 48)]
    output: u32,
    /// Prompts and answers of a trace are divided by this
    #[arg(long, value_name = "N", default_value_t = 32.0)]
    shorter: f64,
    /// What each request must keep; ITL is judged by the gaps between what arrives, as it arrives
    #[arg(long, value_name = "SLO", default_value = "ttft_p90=2s,itl_p99=50ms")]
    slo: Slo,
    /// Share of the requests that must keep it, percent
    #[arg(long, value_name = "PERCENT", default_value_t = 90.0)]
    share: f64,
    /// Only this rate; without it the highest one is searched
    #[arg(long, value_name = "REQUESTS/S")]
    rate: Option<f64>,
    /// Where the search begins
    #[arg(long, value_name = "REQUESTS/S", default_value_t = 0.5)]
    from: f64,
    /// How long requests come at each rate
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    seconds: f64,
    /// The search ends where two rates are closer than this, percent
    #[arg(long, value_name = "PERCENT", default_value_t = 12.0)]
    within: f64,
    /// Which requests are drawn
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// What the lines of JSON call the server
    #[arg(long, value_name = "NAME", default_value = "")]
    name: String,
    /// Prints one line of JSON per rate, and one for the search
    #[arg(long)]
    json: bool,
}

/// Fewest requests at a rate.
const REQUESTS_MIN: f64 = 16.0;
/// Rates below this are not looked at.
const RATE_MIN: f64 = 0.02;

/// One rate.
#[derive(Debug, Serialize)]
struct Trial {
    name: String,
    rate: f64,
    requests: usize,
    failed: usize,
    good_share: f64,
    ttft: Percentiles,
    /// Gaps between pieces of an answer as they arrived, seconds.
    gap: Percentiles,
    e2e: Percentiles,
    took_s: f64,
}

#[derive(Serialize)]
struct Found {
    name: String,
    /// The highest rate that held; 0 where none did.
    goodput_rate: f64,
    /// The lowest that did not.
    first_missed: Option<f64>,
}

fn workload(options: &Options, rate: f64) -> Result<Workload> {
    let requests = (rate * options.seconds).max(REQUESTS_MIN).ceil() as usize;
    if options.workload == "mixed" {
        let generator = Generator {
            requests,
            arrivals: Arrivals::Poisson(rate),
            inputs: Lengths::Constant(options.input),
            outputs: Lengths::Constant(options.output),
        };
        return Ok(generator.draw(options.seed));
    }
    let mut trace = read(&PathBuf::from(&options.workload))?;
    trace.spread_ticks(options.seed);
    trace.longer_inputs(1.0 / options.shorter)?;
    trace.longer_outputs(1.0 / options.shorter)?;
    trace.first(requests);
    trace.at_rate(rate)?;
    Ok(trace)
}

/// All of its times are within their bounds, and as many of its gaps as the clause asks for.
fn good(request: &Observed, slo: &Slo) -> bool {
    let keeps = |metric: Metric, time: Option<std::time::Duration>| match (slo.on(metric), time) {
        (None, _) => true,
        (Some(clause), Some(time)) => time.as_secs_f64() <= clause.bound.seconds(),
        (Some(_), None) => false,
    };
    let itl = slo.on(Metric::Itl).is_none_or(|clause| {
        let (mut all, mut late) = (0.0, 0.0);
        for gap in request.frame_gaps() {
            all += 1.0;
            late += f64::from(u8::from(gap > clause.bound.seconds()));
        }
        late <= all * (1.0 - clause.share())
    });
    let tpot = request.tokens() < 2 || keeps(Metric::Tpot, request.tpot());
    request.is_served() && keeps(Metric::Ttft, request.ttft()) && keeps(Metric::E2e, request.e2e()) && tpot && itl
}

fn judge(options: &Options, rate: f64, run: &Run) -> Trial {
    let served = || run.requests.iter().filter(|r| r.is_served());
    let failed = run.requests.len() - served().count();
    let seconds = |of: fn(&Observed) -> Option<std::time::Duration>| {
        let times: Vec<f64> = served().filter_map(of).map(|t| t.as_secs_f64()).collect();
        Percentiles::of(times, failed)
    };
    Trial {
        name: options.name.clone(),
        rate,
        requests: run.requests.len(),
        failed,
        good_share: served().filter(|r| good(r, &options.slo)).count() as f64 / run.requests.len().max(1) as f64,
        ttft: seconds(Observed::ttft),
        gap: Percentiles::of(served().flat_map(Observed::frame_gaps), 0),
        e2e: seconds(Observed::e2e),
        took_s: run.took.as_secs_f64(),
    }
}

/// Offers the workload at a rate; whether enough of it was good.
async fn holds(options: &Options, target: &Target, rate: f64) -> Result<bool> {
    // Each rate has prompts of its own, so that none finds another's prefixes.
    let salt = mix(options.seed) ^ rate.to_bits();
    let prompts = Prompts {
        salt,
        ..Prompts::default()
    };
    let schedule = prompts.schedule(&workload(options, rate)?);
    let run = offer(target, schedule, pending(), |_| ()).await;
    let trial = judge(options, rate, &run);
    let held = 100.0 * trial.good_share >= options.share;
    if options.json {
        println!("{}", serde_json::to_string(&trial)?);
    } else {
        println!("{}", line(&trial, held));
    }
    if let Some(observed) = run.requests.iter().find(|r| !r.is_served()) {
        eprintln!("a request without a whole answer: {:?}", observed.failure);
    }
    Ok(held)
}

fn line(trial: &Trial, held: bool) -> String {
    let ms = |seconds: Option<f64>| seconds.map_or_else(|| "-".to_owned(), |s| format!("{:.0}", s * 1e3));
    format!(
        "{} {:.2}/s: {:.0}% of {} good{}; TTFT p50 {} p90 {} ms, gaps p50 {} p99 {} max {} ms",
        trial.name,
        trial.rate,
        100.0 * trial.good_share,
        trial.requests,
        if held { "" } else { " (too few)" },
        ms(trial.ttft.p50),
        ms(trial.ttft.p90),
        ms(trial.gap.p50),
        ms(trial.gap.p99),
        ms(trial.gap.max),
    )
}

/// Runs it.
pub async fn run(options: Options) -> Result<()> {
    ensure!(
        options.from > 0.0 && options.seconds > 0.0 && options.within > 0.0 && options.shorter > 0.0,
        "--from, --seconds, --within and --shorter must be above 0"
    );
    ensure!(options.share > 0.0 && options.share <= 100.0, "--share is a percentage");
    let target = Target::connect(&options.target, None).await?;
    warm(&options, &target).await?;
    if let Some(rate) = options.rate {
        ensure!(rate > 0.0, "--rate must be above 0");
        return holds(&options, &target, rate).await.map(|_| ());
    }
    let (mut held, mut missed) = (0.0, None);
    let mut rate = options.from;
    loop {
        if holds(&options, &target, rate).await? {
            held = rate;
        } else {
            missed = Some(rate);
        }
        rate = match missed {
            None => held * 2.0,
            Some(missed) if held == 0.0 => missed / 2.0,
            Some(missed) if missed / held <= 1.0 + options.within / 100.0 => break,
            Some(missed) => (held * missed).sqrt(),
        };
        if rate < RATE_MIN {
            break;
        }
    }
    let found = Found {
        name: options.name.clone(),
        goodput_rate: held,
        first_missed: missed,
    };
    if options.json {
        println!("{}", serde_json::to_string(&found)?);
    } else {
        println!("{} keeps its SLO at {held:.2} requests/s", found.name);
    }
    Ok(())
}

/// One request that does not count: the first one of a process pays for what is made once.
async fn warm(options: &Options, target: &Target) -> Result<()> {
    let mut one = workload(options, 1.0)?;
    one.first(1);
    let prompts = Prompts {
        salt: u64::MAX,
        ..Prompts::default()
    };
    let run = offer(target, prompts.schedule(&one), pending(), |_| ()).await;
    let first = run.requests.first().context("one request")?;
    if !first.is_served() {
        bail!("{} does not answer: {:?}", options.target, first.failure);
    }
    Ok(())
}
