//! What can go wrong in loading a model and in computing a step.

use baton_types::{BlockId, GeometryMismatch, OutOfArena};
use std::path::PathBuf;

/// A model that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file system said no.
    #[error("cannot read {path}: {source}; check the path and its permissions", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Neither a GGUF file nor a folder with config.json.
    #[error(
        "{path} is no model: expected a .gguf file or a folder with config.json and *.safetensors",
        path = path.display()
    )]
    NotAModel {
        /// What was given.
        path: PathBuf,
    },
    /// The file ends before what its header promises.
    #[error(
        "{path} is truncated: {field} needs {needed} bytes, the file has {present}; download it again",
        path = path.display()
    )]
    Truncated {
        /// Which file.
        path: PathBuf,
        /// Which part does not fit.
        field: String,
        /// End of that part, in bytes from the file's start.
        needed: u64,
        /// Bytes in the file.
        present: u64,
    },
    /// The file contradicts its own format.
    #[error("{path} is corrupt: {field}: {reason}; download it again", path = path.display())]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// Which part.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A family of models that does not run here.
    #[error("{path} has architecture `{found}`; supported are {supported}", path = path.display())]
    UnsupportedArchitecture {
        /// Which file.
        path: PathBuf,
        /// Its architecture.
        found: String,
        /// What runs.
        supported: &'static str,
    },
    /// A weight's element type that does not run here.
    #[error(
        "{path}: tensor {tensor} has type {found}; supported are {supported}; requantise the model to one of these",
        path = path.display()
    )]
    UnsupportedTensorType {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Its type.
        found: String,
        /// What runs.
        supported: &'static str,
    },
    /// A feature that would change the output if it were ignored.
    #[error("{path}: {field} is {found}, which is not supported; expected {expected}", path = path.display())]
    UnsupportedFeature {
        /// Which file.
        path: PathBuf,
        /// Which field of its configuration.
        field: String,
        /// Its value.
        found: String,
        /// What is supported.
        expected: String,
    },
    /// A hyperparameter that is absent.
    #[error("{path}: {field} is missing; convert the model again with a current converter", path = path.display())]
    MissingField {
        /// Which file.
        path: PathBuf,
        /// Which field.
        field: String,
    },
    /// A hyperparameter that makes no sense.
    #[error("{path}: {field} is {found}; expected {expected}; the model's configuration is wrong", path = path.display())]
    InvalidField {
        /// Which file.
        path: PathBuf,
        /// Which field.
        field: String,
        /// Its value.
        found: String,
        /// What would do.
        expected: String,
    },
    /// A weight that is absent.
    #[error("{path}: tensor {tensor} is missing; the file is incomplete, download or convert it again", path = path.display())]
    MissingTensor {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
    },
    /// A weight whose shape contradicts the hyperparameters.
    #[error(
        "{path}: tensor {tensor} has shape {found:?}, expected {expected:?}; weights and configuration do not belong together",
        path = path.display()
    )]
    WrongShape {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Its shape, outermost dimension first.
        found: Vec<u64>,
        /// What the hyperparameters ask for.
        expected: Vec<u64>,
    },
    /// A forced instruction-set path that this machine does not run.
    #[error("this machine does not run the {isa} kernels; leave the choice to the engine or use `portable`")]
    UnavailableIsa {
        /// Which.
        isa: &'static str,
    },
    /// The system has no memory for a weight.
    #[error("{path}: no memory for tensor {tensor}: {source}; end other programs or take a smaller model", path = path.display())]
    Memory {
        /// The model.
        path: PathBuf,
        /// Which weight.
        tensor: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Worker threads could not be started.
    #[error("cannot start {threads} compute threads: {source}")]
    Threads {
        /// How many were wanted.
        threads: usize,
        /// Why.
        source: std::io::Error,
    },
}

impl LoadError {
    /// Whether the same call may succeed later without anybody changing the model.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Io { source, .. } | Self::Memory { source, .. } | Self::Threads { source, .. } => {
                matches!(
                    source.kind(),
                    std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock
                )
            }
            Self::NotAModel { .. }
            | Self::Truncated { .. }
            | Self::Corrupt { .. }
            | Self::UnsupportedArchitecture { .. }
            | Self::UnsupportedTensorType { .. }
            | Self::UnsupportedFeature { .. }
            | Self::MissingField { .. }
            | Self::InvalidField { .. }
            | Self::MissingTensor { .. }
            | Self::WrongShape { .. }
            | Self::UnavailableIsa { .. } => false,
        }
    }
}

/// A step that was not computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// The observer broke it off.
    #[error("step aborted by its observer after layer {layer}")]
    Aborted {
        /// The last layer that was computed.
        layer: u32,
    },
    /// A slice without tokens.
    #[error("slice {slice} has no tokens")]
    EmptySlice {
        /// Which slice.
        slice: usize,
    },
    /// A token id beyond the vocabulary.
    #[error("slice {slice} has token {token}; ids are below {vocab}")]
    TokenOutOfRange {
        /// Which slice.
        slice: usize,
        /// The id.
        token: u32,
        /// How many ids there are.
        vocab: u32,
    },
    /// A position beyond the model's context.
    #[error("slice {slice} ends at position {end}; the context holds {context_tokens} tokens")]
    BeyondContext {
        /// Which slice.
        slice: usize,
        /// One past its last position.
        end: usize,
        /// The limit.
        context_tokens: u32,
    },
    /// Too few blocks for the slice's positions.
    #[error("slice {slice} ends at position {end} and has {blocks} blocks of {block_tokens} tokens")]
    TooFewBlocks {
        /// Which slice.
        slice: usize,
        /// One past its last position.
        end: usize,
        /// How many blocks it has.
        blocks: usize,
        /// Tokens per block.
        block_tokens: u32,
    },
    /// A block that the arena does not have.
    #[error("slice {slice}: {source}")]
    OutOfArena {
        /// Which slice.
        slice: usize,
        /// Which block, and how many there are.
        source: OutOfArena,
    },
    /// A block that one slice writes and another one writes or reads.
    #[error("block {block:?} of slice {slice} is written by another slice of the same step, or stands in it twice")]
    BlockConflict {
        /// Which slice.
        slice: usize,
        /// Which block.
        block: BlockId,
    },
    /// The arena was made for another model.
    #[error("the arena does not fit the model: {0}")]
    Geometry(#[from] GeometryMismatch),
}

impl StepError {
    /// Whether the same step may succeed later: only one that was broken off.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Aborted { .. } => true,
            Self::EmptySlice { .. }
            | Self::TokenOutOfRange { .. }
            | Self::BeyondContext { .. }
            | Self::TooFewBlocks { .. }
            | Self::OutOfArena { .. }
            | Self::BlockConflict { .. }
            | Self::Geometry(_) => false,
        }
    }
}
