//! Control messages from and to the words of `session`. Whatever cannot be meant is an error that names the field.

use super::wire::{
    Abort, Body, Code, Committed, Complete, Dtype, Envelope, Failure, Fence, Fenced, Geometry, Grant, Refused,
};
use super::wire::{PathBroken, Renew, Reserve};
use crate::TransferError;
use crate::session::{Header, ToReceiver, ToSender};
use baton_types::{Attempt, BlockId, Budget, Epoch, KvDtype, KvGeometry, Ticket};
use std::ops::Range;

/// A message that means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("control message: {field} is missing or out of range")]
pub(super) struct Meaningless {
    pub(super) field: &'static str,
}

/// A message in the words of `session`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meaning {
    KeepAlive,
    ToReceiver(Header, ToReceiver),
    ToSender(Header, ToSender),
}

fn envelope(header: &Header, body: Body) -> Envelope {
    Envelope {
        from: 0,
        to: 0,
        ticket: header.ticket.0.to_be_bytes().to_vec(),
        attempt: header.attempt.0,
        epoch: header.epoch.map_or(0, |epoch| epoch.0),
        body: Some(body),
    }
}

fn failure(error: &TransferError) -> Option<Failure> {
    let (code, reason) = match error {
        TransferError::Aborted { reason } => (Code::Aborted, reason.clone()),
        TransferError::NoRoom { reason } => (Code::NoRoom, reason.clone()),
        TransferError::Fenced => (Code::Fenced, String::new()),
        TransferError::AlreadyCommitted => (Code::AlreadyCommitted, String::new()),
        TransferError::UnknownTicket => (Code::UnknownTicket, String::new()),
        TransferError::PeerGone { reason } => (Code::PeerGone, reason.clone()),
        TransferError::PathFailed { reason, .. } => (Code::PathFailed, reason.clone()),
        TransferError::LeaseExpired => (Code::LeaseExpired, String::new()),
        TransferError::Deadline => (Code::Deadline, String::new()),
        TransferError::Corrupt { reason } => (Code::Corrupt, reason.clone()),
        TransferError::Protocol { reason } => (Code::Protocol, reason.clone()),
        TransferError::ShuttingDown => (Code::ShuttingDown, String::new()),
        TransferError::Refused { .. } | TransferError::NoPath { .. } | TransferError::TooMany { .. } => {
            (Code::Aborted, error.to_string())
        }
    };
    Some(Failure {
        code: code.into(),
        reason,
    })
}

fn error(failure: Option<Failure>) -> TransferError {
    let Failure { code, reason } = failure.unwrap_or_default();
    // A code of a later build is a failure all the same.
    match Code::try_from(code).unwrap_or(Code::Unspecified) {
        Code::Unspecified | Code::Aborted => TransferError::Aborted { reason },
        Code::NoRoom => TransferError::NoRoom { reason },
        Code::Fenced => TransferError::Fenced,
        Code::AlreadyCommitted => TransferError::AlreadyCommitted,
        Code::UnknownTicket => TransferError::UnknownTicket,
        Code::PeerGone => TransferError::PeerGone { reason },
        Code::PathFailed => TransferError::PathFailed {
            path: "peer's".to_owned(),
            reason,
        },
        Code::LeaseExpired => TransferError::LeaseExpired,
        Code::Deadline => TransferError::Deadline,
        Code::Corrupt => TransferError::Corrupt { reason },
        Code::Protocol => TransferError::Protocol { reason },
        Code::ShuttingDown => TransferError::ShuttingDown,
    }
}

pub(super) fn to_receiver(header: &Header, message: &ToReceiver) -> Envelope {
    let body = match message {
        ToReceiver::Reserve {
            context_tokens,
            path,
            budget,
            digest,
        } => Body::Reserve(Reserve {
            context_tokens: *context_tokens,
            path: path.name().to_owned(),
            budget_us: Budget(*budget).as_us(),
            digest: *digest,
        }),
        ToReceiver::Renew => Body::Renew(Renew {}),
        ToReceiver::Complete {
            blocks,
            payload,
            digest,
        } => Body::Complete(Complete {
            first: blocks.start,
            end: blocks.end,
            payload: payload.clone(),
            digest: *digest,
        }),
        ToReceiver::Abort { error } => Body::Abort(Abort {
            failure: failure(error),
        }),
        ToReceiver::Fenced { connections } => Body::Fenced(Fenced {
            connections: *connections,
        }),
        ToReceiver::PathBroken { error } => Body::PathBroken(PathBroken {
            failure: failure(error),
        }),
    };
    envelope(header, body)
}

pub(super) fn to_sender(header: &Header, message: &ToSender) -> Envelope {
    let body = match message {
        ToSender::Grant {
            held,
            digest_from,
            wanted,
            destinations,
            lease,
        } => Body::Grant(Grant {
            held: *held,
            first: wanted.start,
            end: wanted.end,
            destinations: destinations.iter().map(|block| block.0).collect(),
            lease_us: Budget(*lease).as_us(),
            digest_from: *digest_from,
        }),
        ToSender::Refused { error } => Body::Refused(Refused {
            failure: failure(error),
        }),
        ToSender::Committed => Body::Committed(Committed {}),
        ToSender::Fence { error } => Body::Fence(Fence {
            failure: failure(error),
        }),
    };
    envelope(header, body)
}

fn range(field: &'static str, first: u32, end: u32) -> Result<Range<u32>, Meaningless> {
    if first <= end {
        Ok(first..end)
    } else {
        Err(Meaningless { field })
    }
}

/// The meaning of a message, its instances apart.
pub(super) fn meaning(envelope: Envelope) -> Result<Meaning, Meaningless> {
    let body = envelope.body.ok_or(Meaningless { field: "body" })?;
    if matches!(body, Body::KeepAlive(_)) {
        return Ok(Meaning::KeepAlive);
    }
    let ticket = <[u8; 16]>::try_from(envelope.ticket.as_slice()).map_err(|_| Meaningless { field: "ticket" })?;
    let header = Header {
        ticket: Ticket(u128::from_be_bytes(ticket)),
        attempt: Attempt(envelope.attempt),
        epoch: (envelope.epoch != 0).then_some(Epoch(envelope.epoch)),
    };
    let to_receiver = |message| Ok(Meaning::ToReceiver(header, message));
    let to_sender = |message| Ok(Meaning::ToSender(header, message));
    match body {
        Body::KeepAlive(_) => Ok(Meaning::KeepAlive),
        Body::Reserve(Reserve {
            context_tokens,
            path,
            budget_us,
            digest,
        }) => to_receiver(ToReceiver::Reserve {
            context_tokens,
            path: path.parse().map_err(|_| Meaningless { field: "path" })?,
            budget: Budget::from_us(budget_us).0,
            digest,
        }),
        Body::Renew(Renew {}) => to_receiver(ToReceiver::Renew),
        Body::Complete(Complete {
            first,
            end,
            payload,
            digest,
        }) => to_receiver(ToReceiver::Complete {
            blocks: range("blocks", first, end)?,
            payload,
            digest,
        }),
        Body::Abort(Abort { failure }) => to_receiver(ToReceiver::Abort { error: error(failure) }),
        Body::Fenced(Fenced { connections }) => to_receiver(ToReceiver::Fenced { connections }),
        Body::PathBroken(PathBroken { failure }) => to_receiver(ToReceiver::PathBroken { error: error(failure) }),
        Body::Grant(Grant {
            held,
            first,
            end,
            destinations,
            lease_us,
            digest_from,
        }) => to_sender(ToSender::Grant {
            held,
            digest_from,
            wanted: range("wanted", first, end)?,
            destinations: destinations.into_iter().map(BlockId).collect(),
            lease: Budget::from_us(lease_us).0,
        }),
        Body::Refused(Refused { failure }) => to_sender(ToSender::Refused { error: error(failure) }),
        Body::Committed(Committed {}) => to_sender(ToSender::Committed),
        Body::Fence(Fence { failure }) => to_sender(ToSender::Fence { error: error(failure) }),
    }
}

pub(super) fn geometry_out(geometry: &KvGeometry) -> Geometry {
    let dtype = match geometry.dtype {
        KvDtype::F16 => Dtype::F16,
        KvDtype::Bf16 => Dtype::Bf16,
        KvDtype::F32 => Dtype::F32,
        KvDtype::Q8 => Dtype::Q8,
    };
    Geometry {
        layers: geometry.layers,
        kv_heads: geometry.kv_heads,
        head_dim: geometry.head_dim,
        block_tokens: geometry.block_tokens,
        dtype: dtype.into(),
    }
}

pub(super) fn geometry_in(geometry: &Geometry) -> Result<KvGeometry, Meaningless> {
    let dtype = match Dtype::try_from(geometry.dtype) {
        Ok(Dtype::F16) => KvDtype::F16,
        Ok(Dtype::Bf16) => KvDtype::Bf16,
        Ok(Dtype::F32) => KvDtype::F32,
        Ok(Dtype::Q8) => KvDtype::Q8,
        Ok(Dtype::Unspecified) | Err(_) => return Err(Meaningless { field: "dtype" }),
    };
    Ok(KvGeometry {
        layers: geometry.layers,
        kv_heads: geometry.kv_heads,
        head_dim: geometry.head_dim,
        block_tokens: geometry.block_tokens,
        dtype,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PathKind;
    use bytes::Bytes;
    use proptest::prelude::*;
    use prost::Message;
    use std::time::Duration;

    fn headers() -> impl Strategy<Value = Header> {
        (any::<u128>(), any::<u32>(), 0..5u64).prop_map(|(ticket, attempt, epoch)| Header {
            ticket: Ticket(ticket),
            attempt: Attempt(attempt),
            epoch: (epoch > 0).then_some(Epoch(epoch)),
        })
    }

    fn errors() -> impl Strategy<Value = TransferError> {
        let reason = || ".{0,20}";
        prop_oneof![
            reason().prop_map(|reason| TransferError::Aborted { reason }),
            reason().prop_map(|reason| TransferError::NoRoom { reason }),
            reason().prop_map(|reason| TransferError::PeerGone { reason }),
            reason().prop_map(|reason| TransferError::Corrupt { reason }),
            reason().prop_map(|reason| TransferError::Protocol { reason }),
            reason().prop_map(|reason| TransferError::PathFailed {
                path: "peer's".into(),
                reason
            }),
            Just(TransferError::Fenced),
            Just(TransferError::AlreadyCommitted),
            Just(TransferError::UnknownTicket),
            Just(TransferError::LeaseExpired),
            Just(TransferError::Deadline),
            Just(TransferError::ShuttingDown),
        ]
    }

    fn ranges() -> impl Strategy<Value = Range<u32>> {
        (any::<u32>(), any::<u32>()).prop_map(|(a, b)| a.min(b)..a.max(b))
    }

    fn durations() -> impl Strategy<Value = Duration> {
        any::<u64>().prop_map(Duration::from_micros)
    }

    fn meanings() -> impl Strategy<Value = Meaning> {
        let receiver = prop_oneof![
            (any::<u64>(), 0..PathKind::ALL.len(), durations()).prop_map(|(context_tokens, path, budget)| {
                ToReceiver::Reserve {
                    context_tokens,
                    path: PathKind::ALL[path],
                    budget,
                    digest: context_tokens % 2 == 0,
                }
            }),
            Just(ToReceiver::Renew),
            (
                ranges(),
                proptest::collection::vec(any::<u8>(), 0..50),
                any::<Option<u64>>()
            )
                .prop_map(|(blocks, payload, digest)| ToReceiver::Complete {
                    blocks,
                    payload: Bytes::from(payload),
                    digest,
                }),
            errors().prop_map(|error| ToReceiver::PathBroken { error }),
            errors().prop_map(|error| ToReceiver::Abort { error }),
            any::<u32>().prop_map(|connections| ToReceiver::Fenced { connections }),
        ];
        let sender = prop_oneof![
            (
                any::<(u32, u32)>(),
                ranges(),
                proptest::collection::vec(any::<u32>(), 0..9),
                durations()
            )
                .prop_map(|((held, digest_from), wanted, destinations, lease)| ToSender::Grant {
                    held,
                    digest_from,
                    wanted,
                    destinations: destinations.into_iter().map(BlockId).collect(),
                    lease,
                }),
            errors().prop_map(|error| ToSender::Refused { error }),
            Just(ToSender::Committed),
            errors().prop_map(|error| ToSender::Fence { error }),
        ];
        prop_oneof![
            (headers(), receiver).prop_map(|(header, message)| Meaning::ToReceiver(header, message)),
            (headers(), sender).prop_map(|(header, message)| Meaning::ToSender(header, message)),
        ]
    }

    proptest! {
        #[test]
        fn every_message_survives_the_wire(meant in meanings()) {
            let envelope = match &meant {
                Meaning::KeepAlive => unreachable!("not generated"),
                Meaning::ToReceiver(header, message) => to_receiver(header, message),
                Meaning::ToSender(header, message) => to_sender(header, message),
            };
            let bytes = envelope.encode_to_vec();
            let back = Envelope::decode(bytes.as_slice()).unwrap();
            prop_assert_eq!(meaning(back), Ok(meant));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(envelope) = Envelope::decode(bytes.as_slice()) {
                let _ = meaning(envelope);
            }
        }

        #[test]
        fn no_damaged_message_makes_it_panic(meant in meanings(), at in any::<usize>(), value in any::<u8>()) {
            let envelope = match &meant {
                Meaning::KeepAlive => unreachable!("not generated"),
                Meaning::ToReceiver(header, message) => to_receiver(header, message),
                Meaning::ToSender(header, message) => to_sender(header, message),
            };
            let mut bytes = envelope.encode_to_vec();
            let at = at % bytes.len();
            bytes[at] = value;
            if let Ok(envelope) = Envelope::decode(bytes.as_slice()) {
                let _ = meaning(envelope);
            }
        }
    }

    #[test]
    fn an_unknown_failure_is_a_failure() {
        let error = error(Some(Failure {
            code: 999,
            reason: "of a later build".into(),
        }));
        assert!(matches!(error, TransferError::Aborted { .. }));
        assert_eq!(meaning(Envelope::default()), Err(Meaningless { field: "body" }));
    }
}
