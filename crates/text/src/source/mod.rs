//! Where model cards come from: GGUF files, Hugging Face folders, and nothing at all (the stub).

mod bpe;
mod gguf;
mod gguf_text;
mod huggingface;

use crate::{TextCard, TextError};
use std::path::{Path, PathBuf};

pub(crate) use bpe::stub_text;

/// A model whose text part cannot be read. Each variant names the file.
#[derive(Debug, thiserror::Error)]
pub enum CardError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file ends within its metadata.
    #[error("{} is truncated: it ends within {field}; fetch it again", path.display())]
    Truncated {
        /// Which file.
        path: PathBuf,
        /// What was being read.
        field: String,
    },
    /// The file is not what it should be.
    #[error("{}: {field}: {reason}", path.display())]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// Which field.
        field: String,
        /// Why.
        reason: String,
    },
    /// The file is of a kind that Baton does not serve.
    #[error("{}: {field} is `{found}`, which is not supported; supported: {supported}", path.display())]
    Unsupported {
        /// Which file.
        path: PathBuf,
        /// Which field.
        field: String,
        /// Its value.
        found: String,
        /// What it may be.
        supported: &'static str,
    },
    /// The tokenizer that the file describes cannot be built.
    #[error("{}: {source}", path.display())]
    Tokenizer {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: TextError,
    },
}

impl CardError {
    /// The same file will fail again.
    pub fn is_retryable(&self) -> bool {
        false
    }
}

/// Reads a `.gguf` file or a Hugging Face folder.
pub(crate) fn read(path: &Path) -> Result<TextCard, CardError> {
    if path.is_dir() {
        huggingface::read(path)
    } else {
        gguf_text::read(path)
    }
}

/// As clients name the model: the last part of the path, without `.gguf`.
fn name_of(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let last = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    last.strip_suffix(".gguf").map(str::to_owned).unwrap_or(last)
}
