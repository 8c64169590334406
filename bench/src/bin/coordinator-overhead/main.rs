//! What the coordinator adds to each token: an echo node of zero cost stamps every token as it sends it, the client stamps
//! it as it comes out of the coordinator, and, interleaved, the same straight from the node. One machine, one clock.

mod echo_node;
mod measure;
mod open_loop;

use anyhow::Result;
use clap::Parser;
use echo_node::{EchoNode, Pace};
use std::time::Duration;

/// Measures the coordinator's overhead per token.
#[derive(Parser)]
struct Arguments {
    /// Streams at a time.
    #[arg(long, default_value_t = 8)]
    streams: usize,
    /// Tokens per stream.
    #[arg(long, default_value_t = 200)]
    tokens: u32,
    /// Time between a stream's tokens, microseconds.
    #[arg(long, default_value_t = 5000)]
    gap_us: u64,
    /// All streams' tokens at the same moments, as one node's batch gives them, instead of spread over the gap.
    #[arg(long)]
    aligned: bool,
    /// Instead of so many streams at a time: this many new ones each second, their tokens in frames of 8 without a gap
    #[arg(long, value_name = "REQUESTS/S")]
    rate: Option<f64>,
    /// Seconds of each half of a round, with --rate
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Interleaved rounds of (through the coordinator, straight from the node).
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// One line of JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut coordinator = measure::Coordinator::start().await?;
    let pace = match arguments.rate {
        Some(_) => Pace {
            gap: Duration::ZERO,
            aligned: true,
            frame: open_loop::FRAME_TOKENS,
        },
        None => Pace {
            gap: Duration::from_micros(arguments.gap_us),
            aligned: arguments.aligned,
            frame: 1,
        },
    };
    let node = EchoNode::start(&coordinator.store, pace).await?;
    if let Some(rate) = arguments.rate {
        let figures = open_loop::run(&mut coordinator, &node, &arguments, rate).await?;
        match arguments.json {
            true => println!("{}", serde_json::to_string(&figures)?),
            false => println!("{figures}"),
        }
        return Ok(());
    }
    let figures = measure::run(&mut coordinator, &node, &arguments).await?;
    if arguments.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!("{figures}");
    }
    Ok(())
}
