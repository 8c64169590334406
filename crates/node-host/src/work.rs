//! Whether a node takes a request, and the refusals in gRPC's words.

use crate::engine::{SequenceError, SubmitError};
use crate::host::Host;
use baton_kv_transfer::{ExpectError, Fallback, HandoverReport, TransferError};
use baton_proto::v1;
use baton_types::{BlockHashChain, Work};
use std::time::Duration;
use tonic::{Code, Status};

/// Why a node does not take a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkRefused {
    /// It finishes what it has, to leave or to take up another role.
    #[error("node {node} is draining and takes no new work")]
    Draining {
        /// Its name.
        node: String,
    },
    /// The caller means another life of this node.
    #[error("instance {wanted} was meant; this is {found}")]
    WrongInstance {
        /// Whom the caller means.
        wanted: String,
        /// Who this is.
        found: String,
    },
    /// The caller tokenized for another model.
    #[error("model_fingerprint is {wanted}; this node runs {found}")]
    WrongModel {
        /// The caller's model.
        wanted: String,
        /// This node's.
        found: String,
    },
    /// A field that cannot be served.
    #[error("{field}: {problem}")]
    Invalid {
        /// Which.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// No time is left.
    #[error("the deadline has passed")]
    Deadline,
}

impl WorkRefused {
    /// Another node may take it.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Draining { .. } | Self::WrongInstance { .. } => true,
            Self::WrongModel { .. } | Self::Invalid { .. } | Self::Deadline => false,
        }
    }
}

impl From<WorkRefused> for Status {
    fn from(refused: WorkRefused) -> Self {
        let code = match refused {
            WorkRefused::Draining { .. } => Code::Unavailable,
            WorkRefused::WrongInstance { .. } | WorkRefused::WrongModel { .. } => Code::FailedPrecondition,
            WorkRefused::Invalid { .. } => Code::InvalidArgument,
            WorkRefused::Deadline => Code::DeadlineExceeded,
        };
        Self::new(code, refused.to_string())
    }
}

/// Checks a request before anything is kept for it. `instance` is the life of the node that the caller means.
///
/// # Errors
/// The first thing that speaks against it.
pub fn check(host: &Host, work: &Work, instance: &str) -> Result<(), WorkRefused> {
    let identity = host.identity();
    if !host.phase().takes_work() {
        return Err(WorkRefused::Draining {
            node: identity.node_id.to_string(),
        });
    }
    let own = identity.instance.to_string();
    if instance != own {
        return Err(WorkRefused::WrongInstance {
            wanted: instance.to_owned(),
            found: own,
        });
    }
    let model = host.model();
    if work.fingerprint != model.fingerprint {
        let (wanted, found) = (work.fingerprint.to_string(), model.fingerprint.to_string());
        return Err(WorkRefused::WrongModel { wanted, found });
    }
    if work.budget.is_spent() {
        return Err(WorkRefused::Deadline);
    }
    check_tokens(host, work)
}

/// Refuses what is more than may wait and run at once.
///
/// # Errors
/// `RESOURCE_EXHAUSTED` with `retry-after-ms`.
pub fn check_place(host: &Host) -> Result<(), Status> {
    let (living, limits) = (host.requests(), host.limits());
    let most = limits.queue_capacity + limits.running_max;
    if living <= most {
        return Ok(());
    }
    let retry_after = host.engine().load().retry_after();
    Err(exhausted(
        format!("{most} requests are here already; no more than that may be"),
        retry_after,
    ))
}

fn check_tokens(host: &Host, work: &Work) -> Result<(), WorkRefused> {
    let invalid = |field, problem| Err(WorkRefused::Invalid { field, problem });
    let (config, geometry) = (&host.model().config, &host.model().geometry);
    if work.prompt.is_empty() {
        return invalid("prompt", "it is empty".into());
    }
    for (field, tokens) in [("prompt", &work.prompt), ("generated", &work.generated)] {
        if let Some(token) = tokens.iter().find(|token| **token >= config.vocab) {
            return invalid(
                field,
                format!("token {token}; the model's ids are below {}", config.vocab),
            );
        }
    }
    let max_tokens = work.sampling.max_tokens as usize;
    let context = config.context_tokens as usize;
    if work.prompt.len() >= context {
        let problem = format!("{} tokens; the model's context holds {context}", work.prompt.len());
        return invalid("prompt", problem);
    }
    let longest = work.prompt.len().saturating_add(max_tokens);
    if longest > context {
        let problem = format!(
            "{} prompt tokens and {max_tokens} more; the model's context holds {context}",
            work.prompt.len()
        );
        return invalid("max_tokens", problem);
    }
    if work.generated.len() >= max_tokens {
        let problem = format!("{} were generated of at most {max_tokens}", work.generated.len());
        return invalid("generated", problem);
    }
    let (needed, total) = (geometry.blocks_for(longest), host.pool().counts().total as usize);
    if needed > total {
        let problem = format!(
            "{longest} tokens need {needed} KV blocks, the node has {total}; ask for fewer, or give the node more --kv-bytes"
        );
        return invalid("max_tokens", problem);
    }
    let full = work.context_tokens() / geometry.block_tokens as usize;
    if work.block_hashes.len() > full {
        return invalid(
            "block_hashes",
            format!("{} of {full} full blocks", work.block_hashes.len()),
        );
    }
    Ok(())
}

/// The identity chain behind the work's last full block, where this node can continue it: the wire carries cut hashes
/// only, so the chain is made anew and compared. Blocks that another arithmetic computed are not continued by this one's.
pub fn chain(host: &Host, work: &Work) -> Option<BlockHashChain> {
    let block_tokens = host.model().geometry.block_tokens as usize;
    let mut chain = BlockHashChain::new(&host.cache_scope(&work.cache_salt));
    let tokens: Vec<u32> = work.prompt.iter().chain(&work.generated).copied().collect();
    let last = tokens
        .chunks_exact(block_tokens)
        .map(|block| chain.push_block(block))
        .last();
    let complete = work.block_hashes.len() == tokens.len() / block_tokens;
    (complete && last.is_some() && last.as_ref() == work.block_hashes.last()).then_some(chain)
}

/// A full queue and a node that goes down, in gRPC's words, with `retry-after-ms` where waiting helps.
pub fn submit_status(error: &SubmitError) -> Status {
    match error {
        SubmitError::QueueFull { retry_after, .. } => exhausted(error.to_string(), *retry_after),
        SubmitError::ShuttingDown => Status::unavailable(error.to_string()),
    }
}

/// `RESOURCE_EXHAUSTED` with `retry-after-ms`.
pub fn exhausted(message: String, retry_after: Duration) -> Status {
    let mut status = Status::resource_exhausted(message);
    let ms = u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX).max(1);
    status.metadata_mut().insert("retry-after-ms", ms.into());
    status
}

/// Why a hand-over is not expected, in gRPC's words.
pub fn expect_status(error: &ExpectError) -> Status {
    let message = error.to_string();
    match error {
        ExpectError::Duplicate { .. } => Status::already_exists(message),
        ExpectError::TooLarge { .. } => Status::invalid_argument(format!("max_tokens: {message}")),
        ExpectError::TooMany { .. } => exhausted(message, Duration::from_millis(500)),
        ExpectError::Deadline => Status::deadline_exceeded(message),
        ExpectError::ShuttingDown => Status::unavailable(message),
    }
}

/// Which end of a hand-over tells of its failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandoverEnd {
    /// The prefill node.
    Sender,
    /// The decode node.
    Receiver,
}

/// A failed hand-over as an event.
pub fn transfer_failed(error: &TransferError, told_by: HandoverEnd) -> v1::WorkFailed {
    let code = match error {
        TransferError::Deadline => Code::DeadlineExceeded,
        TransferError::NoRoom { .. } | TransferError::TooMany { .. } => Code::ResourceExhausted,
        TransferError::Refused { .. } => Code::FailedPrecondition,
        TransferError::Fenced | TransferError::AlreadyCommitted | TransferError::Aborted { .. } => Code::Aborted,
        TransferError::Corrupt { .. } => Code::DataLoss,
        TransferError::NoPath { .. }
        | TransferError::UnknownTicket
        | TransferError::PeerGone { .. }
        | TransferError::PathFailed { .. }
        | TransferError::LeaseExpired
        | TransferError::Protocol { .. }
        | TransferError::ShuttingDown => Code::Unavailable,
    };
    // Whose want of room, and who gave up, depends on the end that one looks from.
    let peer_at_fault = match error {
        TransferError::NoRoom { .. } | TransferError::UnknownTicket => told_by == HandoverEnd::Sender,
        TransferError::Aborted { .. } => told_by == HandoverEnd::Receiver,
        other => other.peer_at_fault(),
    };
    failed(code, error.to_string(), error.is_retryable(), peer_at_fault)
}

/// A hand-over as its sender saw it. `exposed`: what compute did not hide.
pub fn handed_over(report: HandoverReport, exposed: Duration) -> v1::HandedOver {
    let us = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    let fallback = |fallback: Fallback| v1::PathFallback {
        from: fallback.from.to_string(),
        to: fallback.to.to_string(),
        reason: fallback.reason,
    };
    v1::HandedOver {
        path: report.path.to_string(),
        bytes: report.bytes,
        exposed_us: us(exposed),
        reserve_us: us(report.reserve_wait),
        fallbacks: report.fallbacks.into_iter().map(fallback).collect(),
        busy_us: us(report.busy),
    }
}

/// A sequence that ended early, as an event.
pub fn sequence_failed(error: &SequenceError) -> v1::WorkFailed {
    let code = match error {
        SequenceError::Step(_) | SequenceError::Arena(_) => Code::Internal,
        SequenceError::Grammar(_) => Code::InvalidArgument,
        SequenceError::ShuttingDown => Code::Unavailable,
    };
    failed(code, error.to_string(), error.is_retryable(), false)
}

/// The node has no more time for what it has, as an event.
pub fn overdue_failed(host: &Host) -> v1::WorkFailed {
    let node = &host.identity().node_id;
    let message = format!("node {node} is draining, and its time for running requests is over");
    failed(Code::Unavailable, message, true, false)
}

/// The deadline has passed, as an event.
pub fn deadline_failed() -> v1::WorkFailed {
    failed(
        Code::DeadlineExceeded,
        "the deadline has passed".to_owned(),
        false,
        false,
    )
}

/// The node could not take or keep the sequence, as an event.
pub fn status_failed(status: &Status, retryable: bool) -> v1::WorkFailed {
    failed(status.code(), status.message().to_owned(), retryable, false)
}

fn failed(code: Code, message: String, retryable: bool, peer_at_fault: bool) -> v1::WorkFailed {
    v1::WorkFailed {
        code: u32::try_from(code as i32).unwrap_or(2),
        message,
        retryable,
        peer_at_fault,
    }
}
