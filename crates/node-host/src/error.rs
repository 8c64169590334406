//! Why a node did not come up, or did not end well. Each says what to change.

use baton_cluster_state::{RegisterError, StoreError};
use baton_engine::{InvalidStub, LoadError, StepError};
use baton_kv_transfer::{ArenaError, StartError};
use baton_node_runtime::{AdminError, BindError, format_bytes, telemetry::TelemetryError};
use baton_text::CardError;
use std::path::PathBuf;

/// Why a node did not come up, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum BringUpError {
    /// A flag that does not fit.
    #[error("{flag} is {value}; expected {expected}")]
    Option {
        /// Which.
        flag: &'static str,
        /// What was given.
        value: String,
        /// What would do.
        expected: String,
    },
    /// More KV memory than there is.
    #[error(
        "--kv-bytes asks for {wanted}, but this process can get {available} (memory that is free on the machine and in its \
         control group); give a smaller --kv-bytes, or leave it out to take half",
        wanted = format_bytes(*wanted), available = format_bytes(*available)
    )]
    KvMemory {
        /// What was asked for.
        wanted: u64,
        /// What there is.
        available: u64,
    },
    /// Too little KV memory for any request.
    #[error(
        "--kv-bytes {given} holds {blocks} KV blocks of {block}; at least {least} are needed, that is {least_bytes}",
        given = format_bytes(*given), block = format_bytes(*block_bytes), least_bytes = format_bytes(least * block_bytes)
    )]
    KvTooSmall {
        /// What there is for KV, in bytes.
        given: u64,
        /// Blocks that fit in.
        blocks: u64,
        /// Bytes of one.
        block_bytes: u64,
        /// Blocks that it takes to serve anything.
        least: u64,
    },
    /// A port that cannot be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// A socket that does not tell its address.
    #[error("{flag}: {source}")]
    Socket {
        /// Which flag named it.
        flag: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The admin port.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// Logs or metrics.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The node's place in the cluster.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// No such model.
    #[error("--model {path}: {source}; give a .gguf file, a folder with config.json and *.safetensors, or stub", path = path.display())]
    ModelPath {
        /// What was given.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The model's weights.
    #[error("--model: {0}")]
    Load(#[from] LoadError),
    /// The model's tokenizer.
    #[error("--model: {0}")]
    Card(#[from] CardError),
    /// The stub's description.
    #[error("--model: {0}")]
    Stub(#[from] InvalidStub),
    /// The KV memory.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The hand-over endpoint.
    #[error(transparent)]
    Endpoint(#[from] StartError),
    /// The model does not compute on this machine.
    #[error("the model's self-test failed: {0}")]
    SelfTest(StepError),
    /// The model computes nonsense on this machine.
    #[error(
        "the model's self-test gave {found} instead of finite logits: the weights are damaged or of an unsupported kind"
    )]
    SelfTestOutput {
        /// What came.
        found: f32,
    },
    /// A task panicked or the gRPC server broke.
    #[error("{reason}")]
    Fatal {
        /// What happened.
        reason: String,
    },
    /// The process was told to end before it was ready.
    #[error("told to end while starting")]
    Interrupted,
}

impl BringUpError {
    /// The same start may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Bind(error) => error.is_retryable(),
            Self::Admin(error) => error.is_retryable(),
            Self::Store(error) => error.is_retryable(),
            Self::Register(error) => error.is_retryable(),
            Self::Load(error) => error.is_retryable(),
            Self::Endpoint(error) => error.is_retryable(),
            Self::KvMemory { .. } | Self::Fatal { .. } | Self::Interrupted => true,
            Self::Option { .. }
            | Self::KvTooSmall { .. }
            | Self::Socket { .. }
            | Self::ModelPath { .. }
            | Self::Telemetry(_)
            | Self::Card(_)
            | Self::Stub(_)
            | Self::Arena(_)
            | Self::SelfTest(_)
            | Self::SelfTestOutput { .. } => false,
        }
    }
}
