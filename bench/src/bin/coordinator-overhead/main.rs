//! What the coordinator adds to each token: an echo node of zero cost stamps every token as it sends it, the client stamps
//! it as it comes out of the coordinator, and, interleaved, the same straight from the node. One machine, one clock.

mod echo_node;
mod measure;

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
    let pace = Pace {
        gap: Duration::from_micros(arguments.gap_us),
        aligned: arguments.aligned,
    };
    let node = EchoNode::start(&coordinator.store, pace).await?;
    let figures = measure::run(&mut coordinator, &node, &arguments).await?;
    if arguments.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!("{figures}");
    }
    Ok(())
}
