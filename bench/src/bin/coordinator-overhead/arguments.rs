//! What it is asked to measure.

use clap::Parser;

/// Measures the coordinator's overhead per token.
#[derive(Parser)]
pub struct Arguments {
    /// Streams at a time.
    #[arg(long, default_value_t = 8)]
    pub streams: usize,
    /// Tokens per stream.
    #[arg(long, default_value_t = 200)]
    pub tokens: u32,
    /// Time between a stream's tokens, microseconds.
    #[arg(long, default_value_t = 5000)]
    pub gap_us: u64,
    /// All streams' tokens at the same moments, as one node's batch gives them, instead of spread over the gap.
    #[arg(long)]
    pub aligned: bool,
    /// Instead of so many streams at a time: this many new ones each second, their tokens in frames of 8 without a gap
    #[arg(long, value_name = "REQUESTS/S")]
    pub rate: Option<f64>,
    /// Seconds of each half of a round, with --rate
    #[arg(long, default_value_t = 5)]
    pub seconds: u64,
    /// Interleaved rounds of (through the coordinator, straight from the node).
    #[arg(long, default_value_t = 7)]
    pub rounds: usize,
    /// One line of JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}
