//! The way in: which format a path holds, and what runs it.

use crate::backend::{Backend, CpuBackend, Isa};
use crate::error::LoadError;
use baton_types::KvDtype;
use std::path::Path;

/// How to run a model.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoadOptions {
    /// Compute threads; 0 takes every core.
    pub threads: usize,
    /// Element type of the KV that steps will be given.
    pub kv_dtype: KvDtype,
    /// Forces an instruction-set path; `None` takes the fastest.
    pub isa: Option<Isa>,
}

/// Loads a `.gguf` file, or a folder with config.json and *.safetensors. `progress(done, total)` counts bytes of weights.
///
/// # Errors
/// See [`LoadError`]: each names file, field and remedy.
pub fn load(
    _path: &Path,
    _options: &LoadOptions,
    _progress: &mut dyn FnMut(u64, u64),
) -> Result<Box<dyn Backend>, LoadError> {
    let _ = CpuBackend {};
    todo!()
}
