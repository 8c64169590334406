//! What `kv-transfer/fuzz` feeds: both ends of the handshake, and a running line.

use super::convert::{self, Meaning};
use super::handshake::{answer, greet};
use super::line::{Line, LineOptions, Spoken, run};
use super::wire::Hello;
use super::{codec, wire};
use crate::session::{Header, ToReceiver, ToSender};
use crate::{Identity, PathKind, TransferError};
use baton_node_runtime::Clock;
use baton_types::{
    Attempt, BlockId, Epoch, Instance, KvDtype, KvGeometry, ModelFingerprint, NodeId, NumericsId, Ticket,
};
use prost::Message;
use std::time::Duration;
use tokio::io::{join, sink};

const ME: Instance = Instance(1);
const PEER: Instance = Instance(2);

fn identity(instance: Instance) -> Identity {
    Identity {
        node: NodeId::new("fuzzed"),
        instance,
        fingerprint: ModelFingerprint([3; 32]),
        geometry: KvGeometry {
            layers: 2,
            kv_heads: 1,
            head_dim: 8,
            block_tokens: 16,
            dtype: KvDtype::F16,
        },
        numerics: NumericsId("n".into()),
        build: "b".into(),
    }
}

/// A handshake from either side, or a running line, whose other end says these bytes. What is understood is what encoding
/// it gives.
pub(crate) async fn line(choice: u8, bytes: &[u8]) {
    let mut stream = join(bytes, sink());
    match choice % 4 {
        0 => drop(greet(&mut stream, &identity(ME), PEER).await),
        1 => drop(answer(&mut stream, &identity(ME), |_| std::future::ready(())).await),
        2 => {
            let (line, running) = Line::new(LineOptions {
                me: ME,
                peer: PEER,
                keep_alive: Duration::from_secs(60),
            });
            run(stream, running, Clock::new(), understood).await;
            drop(line);
        }
        // One message without its instances, which a fuzzer guesses late.
        _ => {
            let Ok(envelope) = wire::Envelope::decode(bytes) else {
                return;
            };
            match convert::meaning(envelope) {
                Ok(Meaning::ToReceiver(header, message)) => understood(Spoken::ToReceiver(header, message)),
                Ok(Meaning::ToSender(header, message)) => understood(Spoken::ToSender(header, message)),
                Ok(Meaning::KeepAlive) | Err(_) => {}
            }
        }
    }
}

fn understood(spoken: Spoken) {
    let (envelope, meant) = match spoken {
        Spoken::ToReceiver(header, message) => (
            convert::to_receiver(&header, &message),
            Meaning::ToReceiver(header, message),
        ),
        Spoken::ToSender(header, message) => (
            convert::to_sender(&header, &message),
            Meaning::ToSender(header, message),
        ),
    };
    let mut bytes = Vec::new();
    codec::encode(&envelope, &mut bytes);
    let again = wire::Envelope::decode(&bytes[4..]).expect("what was encoded decodes");
    assert_eq!(convert::meaning(again), Ok(meant), "a message that encodes to another");
}

/// Inputs that reach each part of [`line`], with their choice.
pub(crate) fn seeds() -> Vec<(u8, Vec<u8>)> {
    let preamble = [&b"BATON-KV"[..], &crate::WIRE_MAJOR.to_le_bytes()].concat();
    let hello = |from: Instance, to: u64| {
        let me = identity(from);
        let mut bytes = preamble.clone();
        let hello = Hello {
            node: me.node.as_str().to_owned(),
            instance: from.0,
            expected_instance: to,
            fingerprint: me.fingerprint.0.to_vec(),
            geometry: Some(convert::geometry_out(&me.geometry)),
            numerics: me.numerics.0.clone(),
            build: me.build,
        };
        codec::encode(&hello, &mut bytes);
        bytes
    };
    let mut seeds = vec![(0, hello(PEER, 0)), (1, hello(PEER, ME.0)), (1, preamble.clone())];
    let mut all = Vec::new();
    for mut envelope in messages() {
        seeds.push((3, envelope.encode_to_vec()));
        (envelope.from, envelope.to) = (PEER.0, ME.0);
        codec::encode(&envelope, &mut all);
    }
    seeds.push((2, all));
    seeds
}

/// One of each kind.
#[allow(clippy::needless_update)] // Fields are added to messages now and then, and these need not know.
fn messages() -> Vec<wire::Envelope> {
    let header = Header {
        ticket: Ticket(5),
        attempt: Attempt::FIRST,
        epoch: Some(Epoch(7)),
    };
    let error = || TransferError::Corrupt { reason: "x".into() };
    let to_receiver = [
        ToReceiver::Renew,
        ToReceiver::Abort { error: error() },
        ToReceiver::Fenced { connections: 2 },
    ];
    let to_sender = [
        ToSender::Committed,
        ToSender::Refused {
            error: TransferError::Deadline,
        },
        ToSender::Fence { error: error() },
    ];
    let to_receiver = to_receiver.iter().map(|message| convert::to_receiver(&header, message));
    let to_sender = to_sender.iter().map(|message| convert::to_sender(&header, message));
    let mut messages: Vec<_> = to_receiver.chain(to_sender).collect();
    // Those whose fields grow are said in the words of the wire, where a field that is left out has its default.
    let bodies = [
        wire::Body::Reserve(wire::Reserve {
            context_tokens: 40,
            path: PathKind::Tcp.name().to_owned(),
            budget_us: 1_000_000,
            ..wire::Reserve::default()
        }),
        wire::Body::Complete(wire::Complete {
            end: 3,
            payload: b"token".as_slice().into(),
            ..wire::Complete::default()
        }),
        wire::Body::Grant(wire::Grant {
            held: 1,
            first: 1,
            end: 3,
            destinations: [BlockId(4), BlockId(9)].map(|block| block.0).to_vec(),
            lease_us: 1_000_000,
            ..wire::Grant::default()
        }),
    ];
    messages.extend(bodies.map(|body| wire::Envelope {
        ticket: header.ticket.0.to_be_bytes().to_vec(),
        attempt: 1,
        epoch: 7,
        body: Some(body),
        ..wire::Envelope::default()
    }));
    messages
}
