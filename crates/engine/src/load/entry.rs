//! The way in: which format a path holds, and what runs it.

use super::{Checkpoint, gguf, safetensors};
use crate::backend::{Activations, Backend, CpuBackend, Isa};
use crate::error::LoadError;
use baton_types::KvDtype;
use std::path::Path;

/// How to run a model.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Compute threads; 0 takes every core, or one for each of `cpus`.
    pub threads: usize,
    /// The CPU of each compute thread; none: wherever the system puts them.
    pub cpus: Vec<usize>,
    /// Element type of the KV that steps will be given.
    pub kv_dtype: KvDtype,
    /// Forces an instruction-set path; `None` takes the fastest.
    pub isa: Option<Isa>,
    /// In which form activations meet quantised weights.
    pub activations: Activations,
}

/// Loads a `.gguf` file, or a folder with config.json and *.safetensors. `progress(done, total)` counts bytes of weights.
///
/// # Errors
/// See [`LoadError`]: each names file, field and remedy.
pub fn load(
    path: &Path,
    options: &LoadOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Box<dyn Backend>, LoadError> {
    let checkpoint = open(path)?;
    let total = checkpoint.weight_bytes();
    // Every byte is read twice, to be hashed and to be packed; half of the progress is each.
    let fingerprint = checkpoint.fingerprint(&mut |done| progress(done / 2, total));
    let mut packed = |done: u64| progress(total / 2 + done.min(total) / 2, total);
    let backend = CpuBackend::new(&checkpoint, fingerprint, options, &mut packed)?;
    progress(total, total);
    let config = backend.config();
    tracing::info!(
        architecture = config.architecture.name(),
        layers = config.layers,
        hidden = config.hidden,
        weight_bytes = total,
        numerics = %backend.numerics(),
        %fingerprint,
        "model loaded"
    );
    Ok(Box::new(backend))
}

fn open(path: &Path) -> Result<Checkpoint, LoadError> {
    let about = std::fs::metadata(path).map_err(|source| LoadError::Io {
        path: path.to_owned(),
        source,
    })?;
    if about.is_dir() {
        return if path.join("config.json").is_file() {
            safetensors::open(path)
        } else {
            Err(LoadError::NotAModel { path: path.to_owned() })
        };
    }
    gguf::open(path)
}
