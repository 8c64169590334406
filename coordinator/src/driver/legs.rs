//! The streams to nodes, and the conversion of what they say. A leg yields core events and ends with a failure where its
//! stream ends early; dropping it resets the stream, which cancels the node's work.

use crate::PathFallback;
use crate::core::{
    DecodeEvent, Failure, FailureKind, FirstToken, Handover, LocalPrefill, Peer, PrefillEvent, TokenBatch,
};
use baton_proto::convert::{ConvertError, finish_reason, parse_id, parse_ticket};
use baton_proto::v1;
use baton_proto::v1::node_client::NodeClient;
use baton_types::{Attempt, NodeId};
use futures::stream::{BoxStream, StreamExt};
use std::error::Error;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

/// Commands that a decode leg can have under way: open, supersede after supersede.
const COMMANDS_MAX: usize = 8;
/// Prompts of long contexts come near 4 MiB as token ids.
const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// What a prefill node says.
pub(super) fn prefill(channel: Channel, request: v1::PrefillRequest) -> BoxStream<'static, PrefillEvent> {
    let open = async move {
        let mut client = NodeClient::new(channel).max_encoding_message_size(MESSAGE_BYTES_MAX);
        client.prefill(request).await.map(tonic::Response::into_inner)
    };
    futures::stream::once(open)
        .flat_map(|opened| match opened {
            Ok(stream) => messages(stream).map(|result| result.and_then(prefill_event)).boxed(),
            Err(status) => failed(not_opened(&status)),
        })
        .map(|result| result.unwrap_or_else(PrefillEvent::Failed))
        .boxed()
}

/// The stream to a decode node and what it says.
pub(super) fn decode(
    channel: Channel,
    open: v1::DecodeOpen,
) -> (mpsc::Sender<v1::DecodeCommand>, BoxStream<'static, DecodeEvent>) {
    let (commands, outgoing) = mpsc::channel(COMMANDS_MAX);
    let first = v1::DecodeCommand {
        command: Some(v1::decode_command::Command::Open(open)),
    };
    let outgoing = futures::stream::once(async { first }).chain(ReceiverStream::new(outgoing));
    let open = async move {
        let mut client = NodeClient::new(channel).max_encoding_message_size(MESSAGE_BYTES_MAX);
        client.decode(outgoing).await.map(tonic::Response::into_inner)
    };
    let events = futures::stream::once(open)
        .flat_map(|opened| match opened {
            Ok(stream) => messages(stream).map(|result| result.and_then(decode_event)).boxed(),
            Err(status) => failed(not_opened(&status)),
        })
        .map(|result| result.unwrap_or_else(DecodeEvent::Failed))
        .boxed();
    (commands, events)
}

/// Messages, then one failure for the stream's end: a leg that did its work is closed before it is reached.
fn messages<M: Send + 'static>(stream: Streaming<M>) -> BoxStream<'static, Result<M, Failure>> {
    let end = futures::stream::once(async {
        Err(Failure {
            kind: FailureKind::Failed { peer: false },
            message: "it ended its stream early".to_owned(),
        })
    });
    stream
        .map(|result| result.map_err(|status| broken(&status)))
        .chain(end)
        .boxed()
}

fn failed<M: Send + 'static>(failure: Failure) -> BoxStream<'static, Result<M, Failure>> {
    futures::stream::once(async { Err(failure) }).boxed()
}

fn not_opened(status: &Status) -> Failure {
    failure_of(status, FailureKind::Unreachable)
}

fn broken(status: &Status) -> Failure {
    failure_of(status, FailureKind::Died)
}

/// A status with a cause was made here, out of a broken connection; one without came from the node.
fn failure_of(status: &Status, connection: FailureKind) -> Failure {
    let kind = match status.code() {
        _ if status.source().is_some() => connection,
        Code::ResourceExhausted => FailureKind::Full { peer: false },
        Code::InvalidArgument => FailureKind::Rejected,
        Code::DeadlineExceeded => FailureKind::Deadline,
        _ => FailureKind::Failed { peer: false },
    };
    let message = match status.source() {
        Some(source) => format!("{}: {source}", status.message()),
        None => status.message().to_owned(),
    };
    Failure { kind, message }
}

fn work_failed(failed: v1::WorkFailed) -> Failure {
    let peer = failed.peer_at_fault;
    let kind = match Code::from_i32(i32::try_from(failed.code).unwrap_or_default()) {
        Code::ResourceExhausted => FailureKind::Full { peer },
        Code::InvalidArgument => FailureKind::Rejected,
        Code::DeadlineExceeded => FailureKind::Deadline,
        // Another process answers at the address, or it has another model: others may still serve.
        Code::FailedPrecondition => FailureKind::Failed { peer },
        _ if failed.retryable => FailureKind::Failed { peer },
        _ => FailureKind::Fatal,
    };
    Failure {
        kind,
        message: failed.message,
    }
}

fn nonsense(error: &ConvertError) -> Failure {
    Failure {
        kind: FailureKind::Failed { peer: false },
        message: format!("its message makes no sense: {error}"),
    }
}

fn missing(field: &'static str) -> Failure {
    nonsense(&ConvertError::Missing { field })
}

fn prefill_event(wire: v1::PrefillEvent) -> Result<PrefillEvent, Failure> {
    use v1::prefill_event::Event;
    match wire.event.ok_or_else(|| missing("event"))? {
        Event::Started(v1::PrefillStarted {
            queue_us,
            cached_tokens,
        }) => Ok(PrefillEvent::Started {
            queue_us,
            cached_tokens,
        }),
        Event::FirstToken(first) => Ok(PrefillEvent::FirstToken(FirstToken {
            index: first.index as usize,
            token: first.token,
            logprobs: first.logprobs.map(Into::into),
            finish: finish_reason(first.finish_reason).map_err(|error| nonsense(&error))?,
            prefill_us: first.prefill_us,
            prefill_tokens: first.prefill_tokens,
        })),
        Event::HandedOver(wire) => Ok(PrefillEvent::HandedOver(handover(wire))),
        Event::Failed(failed) => Err(work_failed(failed)),
    }
}

fn handover(wire: v1::HandedOver) -> Handover {
    let v1::HandedOver {
        path,
        bytes,
        exposed_us,
        reserve_us,
        fallbacks,
        busy_us,
    } = wire;
    Handover {
        path,
        fallbacks: fallbacks.into_iter().map(path_fallback).collect(),
        bytes,
        exposed_us,
        reserve_us,
        busy_us,
    }
}

fn handed_on(wire: v1::HandedOn) -> Result<DecodeEvent, Failure> {
    use v1::handed_on::End;
    let ticket = parse_ticket(&wire.ticket).map_err(|error| nonsense(&error))?;
    let result = match wire.end.ok_or_else(|| missing("end"))? {
        End::HandedOver(report) => Ok(handover(report)),
        End::Failed(failed) => Err(work_failed(failed)),
    };
    Ok(DecodeEvent::HandedOn { ticket, result })
}

fn path_fallback(wire: v1::PathFallback) -> PathFallback {
    let v1::PathFallback { from, to, reason } = wire;
    PathFallback { from, to, reason }
}

fn decode_event(wire: v1::DecodeEvent) -> Result<DecodeEvent, Failure> {
    use v1::decode_event::Event;
    match wire.event.ok_or_else(|| missing("event"))? {
        Event::Accepted(accepted) => {
            let peer = accepted.peer.ok_or_else(|| missing("accepted.peer"))?;
            Ok(DecodeEvent::Accepted {
                ticket: parse_ticket(&accepted.ticket).map_err(|error| nonsense(&error))?,
                peer: Peer {
                    node: NodeId::new(peer.node_id),
                    instance: parse_id("instance", &peer.instance).map_err(|error| nonsense(&error))?,
                    addresses: peer.addresses,
                },
            })
        }
        Event::Committed(committed) => Ok(DecodeEvent::Committed {
            attempt: Attempt(committed.attempt),
            index: committed.index as usize,
            token: committed.token,
            handover_bytes: committed.handover_bytes,
            held_tokens: committed.held_tokens,
        }),
        Event::Tokens(tokens) => {
            let local = tokens.prefill_us.map(|prefill_us| LocalPrefill {
                queue_us: tokens.queue_us.unwrap_or_default(),
                prefill_us,
                prefill_tokens: tokens.prefill_tokens.unwrap_or_default(),
                cached_tokens: tokens.cached_tokens.unwrap_or_default(),
            });
            let batch = TokenBatch {
                first_index: tokens.first_index as usize,
                tokens: tokens.tokens,
                logprobs: tokens.logprobs.into_iter().map(Into::into).collect(),
            };
            Ok(DecodeEvent::Tokens { batch, local })
        }
        Event::Finished(finished) => Ok(DecodeEvent::Finished {
            reason: finish_reason(finished.finish_reason)
                .map_err(|error| nonsense(&error))?
                .ok_or_else(|| missing("finish_reason"))?,
            decoded_tokens: finished.decoded_tokens,
            decode_us: finished.decode_us,
        }),
        Event::Leaving(v1::Leaving {}) => Ok(DecodeEvent::Leaving),
        Event::HandedOn(wire) => handed_on(wire),
        Event::Failed(failed) => Err(work_failed(failed)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_s_own_status_is_told_from_a_broken_connection() {
        let kind = |status: &Status| broken(status).kind;
        assert_eq!(
            kind(&Status::unavailable("draining")),
            FailureKind::Failed { peer: false }
        );
        assert_eq!(
            kind(&Status::resource_exhausted("full")),
            FailureKind::Full { peer: false }
        );
        let io = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        assert_eq!(kind(&Status::from_error(Box::new(io))), FailureKind::Died);
        let io = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        assert_eq!(
            not_opened(&Status::from_error(Box::new(io))).kind,
            FailureKind::Unreachable
        );
    }

    #[test]
    fn failures_keep_their_blame() {
        let failed = |code: Code, retryable, peer_at_fault| {
            work_failed(v1::WorkFailed {
                code: code as u32,
                message: "x".into(),
                retryable,
                peer_at_fault,
            })
            .kind
        };
        assert_eq!(
            failed(Code::Unavailable, true, true),
            FailureKind::Failed { peer: true }
        );
        assert_eq!(
            failed(Code::ResourceExhausted, true, true),
            FailureKind::Full { peer: true }
        );
        assert_eq!(failed(Code::Internal, false, false), FailureKind::Fatal);
        assert_eq!(
            failed(Code::FailedPrecondition, false, false),
            FailureKind::Failed { peer: false }
        );
    }

    #[test]
    fn nonsense_is_a_failure_that_names_the_field() {
        let failure = decode_event(v1::DecodeEvent { event: None }).unwrap_err();
        assert!(failure.message.contains("event is missing"), "{failure:?}");
        let finished = v1::DecodeFinished::default();
        let event = v1::DecodeEvent {
            event: Some(v1::decode_event::Event::Finished(finished)),
        };
        assert!(decode_event(event).unwrap_err().message.contains("finish_reason"));
    }
}
