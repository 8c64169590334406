//! What the coordinator says during a request, reduced to what matters.

use baton_kv_transfer::Peer;
use baton_node_host::EventStream;
use baton_proto::convert;
use baton_proto::v1::{self, decode_command::Command};
use baton_types::{Attempt, NodeId, Ticket};
use std::future::pending;
use tokio_stream::StreamExt;
use tonic::Status;

/// The coordinator's side of one request.
pub(crate) struct Commands {
    stream: EventStream<v1::DecodeCommand>,
    /// It has said everything; the request goes on without more commands.
    finished: bool,
}

/// What the coordinator wants after it opened the request.
pub(crate) enum Wish {
    /// The next attempt has this number.
    Supersede(Attempt),
    /// Hand the sequence to another decode node.
    HandOn(HandOnSpec),
    /// Stop.
    Cancel,
    /// The coordinator, or the connection to it, is gone.
    Gone,
    /// It said something that makes no sense here.
    Nonsense(Status),
}

/// Whom a running sequence goes to, and how far.
pub(crate) struct HandOnSpec {
    pub ticket: Ticket,
    pub attempt: Attempt,
    pub peer: Peer,
    /// Tokens whose KV goes.
    pub context_tokens: usize,
    /// Generated tokens that the other node was told.
    pub known_tokens: usize,
}

impl TryFrom<v1::HandOn> for HandOnSpec {
    type Error = Status;

    fn try_from(wire: v1::HandOn) -> Result<Self, Status> {
        let decode = wire.decode.ok_or(convert::ConvertError::Missing { field: "decode" })?;
        Ok(Self {
            ticket: convert::parse_ticket(&wire.ticket)?,
            attempt: Attempt(wire.attempt),
            peer: Peer {
                node: NodeId::new(decode.node_id),
                instance: convert::parse_id("decode.instance", &decode.instance)?,
                addresses: decode.addresses,
            },
            context_tokens: wire.context_tokens as usize,
            known_tokens: wire.known_tokens as usize,
        })
    }
}

impl Commands {
    pub fn new(stream: EventStream<v1::DecodeCommand>) -> Self {
        Self {
            stream,
            finished: false,
        }
    }

    /// The first command.
    pub async fn open(&mut self) -> Result<v1::DecodeOpen, Status> {
        match self.stream.next().await {
            Some(Ok(v1::DecodeCommand {
                command: Some(Command::Open(open)),
            })) => Ok(open),
            Some(Ok(_)) => Err(Status::invalid_argument("command: the first one must be open")),
            Some(Err(status)) => Err(status),
            None => Err(Status::cancelled("the stream ended before it was opened")),
        }
    }

    /// The next wish; pending for ever once the coordinator has none left. Cancel safe.
    pub async fn next(&mut self) -> Wish {
        if self.finished {
            return pending().await;
        }
        match self.stream.next().await {
            Some(Ok(v1::DecodeCommand { command })) => match command {
                Some(Command::Supersede(next)) if next.attempt > 0 => Wish::Supersede(Attempt(next.attempt)),
                Some(Command::Supersede(_)) => {
                    Wish::Nonsense(Status::invalid_argument("attempt: attempts count from 1"))
                }
                Some(Command::HandOn(wire)) => HandOnSpec::try_from(wire).map_or_else(Wish::Nonsense, Wish::HandOn),
                Some(Command::Cancel(_)) => Wish::Cancel,
                Some(Command::Open(_)) => {
                    Wish::Nonsense(Status::invalid_argument("command: the stream is open already"))
                }
                None => Wish::Nonsense(Status::invalid_argument("command is missing")),
            },
            Some(Err(_)) => Wish::Gone,
            None => {
                self.finished = true;
                pending().await
            }
        }
    }
}
