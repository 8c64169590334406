//! What can be wrong with a trace.

use std::path::PathBuf;

/// A trace that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// Not to be read.
    #[error("cannot read the trace {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Neither of the formats.
    #[error(
        "{path} is no trace: expected JSON lines with timestamp, input_length, output_length (Mooncake), or CSV with \
         TIMESTAMP,ContextTokens,GeneratedTokens (Azure)"
    )]
    Format {
        /// Which file.
        path: PathBuf,
    },
    /// No request in it.
    #[error("the trace {path} is empty: there is nothing to plan for")]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// One line is wrong.
    #[error("{path}, line {line}: {reason}")]
    Line {
        /// Which file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The ids do not belong to the lengths.
    #[error(
        "{path}: no block size makes input_length and the number of hash_ids agree: is input_length in tokens, and are \
         all blocks of the prompt there?"
    )]
    BlockSize {
        /// Which file.
        path: PathBuf,
    },
    /// Scaled down to nothing, or by what is no factor.
    #[error("{what} {value} cannot be used: {expected}")]
    Scale {
        /// Which figure.
        what: &'static str,
        /// Its value.
        value: f64,
        /// What it must be.
        expected: &'static str,
    },
}

impl WorkloadError {
    /// A file does not mend itself.
    pub fn is_retryable(&self) -> bool {
        false
    }
}
