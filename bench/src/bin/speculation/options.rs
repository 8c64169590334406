//! What is measured.

use baton_node_host::engine::Speculation;
use clap::Parser;
use std::path::PathBuf;

/// Measures speculation.
#[derive(Parser)]
pub struct Options {
    /// A .gguf file or a folder with config.json and *.safetensors, with a chat template.
    #[arg(long)]
    pub model: PathBuf,
    /// Compute threads; 0 takes every core.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Times that each engine answers each prompt.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Tokens of an answer, at most.
    #[arg(long, default_value_t = 160)]
    pub tokens: u32,
    /// Sequences that decode together.
    #[arg(long, default_value_t = 1)]
    pub at_once: usize,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// The other engine drafts: auto, or always.
    #[arg(long, value_enum, default_value = "auto")]
    pub speculation: Speculation,
    /// Print the answers too.
    #[arg(long)]
    pub show: bool,
    /// Lines of JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}
