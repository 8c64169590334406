//! Load on a whole cluster of real processes: what the coordinator carries, what routing by prefixes saves, and what
//! happens when more comes than can be served.

mod capacity;
mod client;
mod goodput;
mod handover_cost;
mod interference;
mod overload;
mod replay;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Puts load on a cluster.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    load: Load,
}

#[derive(Subcommand)]
enum Load {
    /// Streamed requests per second over nodes whose engine costs nothing, then the latency at half of that
    Capacity(capacity::Options),
    /// Requests of a trace, once for each policy
    Replay(replay::Options),
    /// Three times what the cluster can serve
    Overload(overload::Options),
    /// The highest rate at which any OpenAI-compatible server keeps an SLO
    Goodput(goodput::Options),
    /// The gaps of steady streams of any such server, without and with long prompts beside them
    Interference(interference::Options),
    /// The whole time of a request that is handed over against one that is not, by turns
    HandoverCost(handover_cost::Options),
}

#[tokio::main]
async fn main() -> Result<()> {
    match Arguments::parse().load {
        Load::Capacity(options) => capacity::run(options).await,
        Load::Replay(options) => replay::run(options).await,
        Load::Overload(options) => overload::run(options).await,
        Load::Goodput(options) => goodput::run(options).await,
        Load::Interference(options) => interference::run(options).await,
        Load::HandoverCost(options) => handover_cost::run(options).await,
    }
}
