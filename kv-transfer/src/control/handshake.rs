//! Who may talk to whom. Each side says what it is, and each checks the other, so that both know which field differs.
//!
//! Order: the dialling side's preamble and `Hello`, then the answering side's. The preamble (magic, major version) has the
//! same form in every version; where the majors differ, no `Hello` follows.

use super::codec;
use super::convert::{geometry_in, geometry_out};
use super::wire::Hello;
use crate::{Identity, TransferError, WIRE_MAJOR};
use baton_types::{Instance, ModelFingerprint, NodeId};
use std::io::ErrorKind;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const MAGIC: &[u8; 8] = b"BATON-KV";
const HELLO_BYTES_MAX: usize = 4096;

/// Why two processes do not talk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// They must not.
    #[error(transparent)]
    Refused(TransferError),
    /// What answers is another process than the one meant.
    #[error("process instance {found} was found where {wanted} was meant")]
    WrongInstance { wanted: Instance, found: Instance },
    /// It is no Baton node, or broke off.
    #[error("the handshake broke off: {0}")]
    Broken(String),
}

/// The other side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remote {
    pub node: NodeId,
    pub instance: Instance,
}

fn broken(error: std::io::Error) -> HandshakeError {
    match error.kind() {
        ErrorKind::UnexpectedEof => HandshakeError::Broken("the connection was closed".to_owned()),
        _ => HandshakeError::Broken(error.to_string()),
    }
}

fn preamble(out: &mut Vec<u8>) {
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&WIRE_MAJOR.to_le_bytes());
}

fn hello(me: &Identity, expected: Option<Instance>, out: &mut Vec<u8>) {
    let hello = Hello {
        node: me.node.as_str().to_owned(),
        instance: me.instance.0,
        expected_instance: expected.map_or(0, |instance| instance.0),
        fingerprint: me.fingerprint.0.to_vec(),
        geometry: Some(geometry_out(&me.geometry)),
        numerics: me.numerics.0.clone(),
        build: me.build.clone(),
    };
    codec::encode(&hello, out);
}

/// The other side's major version.
async fn read_preamble(stream: &mut (impl AsyncRead + Unpin)) -> Result<u32, HandshakeError> {
    let mut magic = [0; MAGIC.len()];
    stream.read_exact(&mut magic).await.map_err(broken)?;
    if magic != *MAGIC {
        return Err(HandshakeError::Broken(
            "the peer does not speak Baton's control protocol".to_owned(),
        ));
    }
    stream.read_u32_le().await.map_err(broken)
}

/// Checks what the other side says of itself.
fn check(me: &Identity, theirs: &Hello) -> Result<Remote, HandshakeError> {
    let malformed = |field: &str| HandshakeError::Broken(format!("the peer's {field} is malformed"));
    let fingerprint = <[u8; 32]>::try_from(theirs.fingerprint.as_slice()).map_err(|_| malformed("fingerprint"))?;
    let geometry = theirs.geometry.as_ref().ok_or_else(|| malformed("geometry"))?;
    let geometry = geometry_in(geometry).map_err(|_| malformed("geometry"))?;
    me.check_peer(WIRE_MAJOR, &ModelFingerprint(fingerprint), &geometry)
        .map_err(HandshakeError::Refused)?;
    if theirs.numerics != me.numerics.0 {
        tracing::warn!(
            peer = %theirs.node, ours = %me.numerics, theirs = %theirs.numerics,
            "peer computes with other numerics: its tokens may differ from ours"
        );
    }
    if theirs.build != me.build {
        tracing::info!(peer = %theirs.node, ours = %me.build, theirs = %theirs.build, "peer runs another build");
    }
    Ok(Remote {
        node: NodeId::new(theirs.node.as_str()),
        instance: Instance(theirs.instance),
    })
}

fn check_major(me: &Identity, theirs: u32) -> Result<(), HandshakeError> {
    me.check_peer(theirs, &me.fingerprint, &me.geometry)
        .map_err(HandshakeError::Refused)
}

/// The dialling side, which means to talk to `wanted`.
///
/// # Errors
/// Why they do not talk.
pub(crate) async fn greet(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    me: &Identity,
    wanted: Instance,
) -> Result<Remote, HandshakeError> {
    let mut out = Vec::new();
    preamble(&mut out);
    hello(me, Some(wanted), &mut out);
    stream.write_all(&out).await.map_err(broken)?;
    let major = read_preamble(stream).await?;
    check_major(me, major)?;
    let theirs: Hello = codec::read(stream, HELLO_BYTES_MAX).await.map_err(broken)?;
    // The instance first: another process may have taken the address, with another model.
    let found = Instance(theirs.instance);
    if found != wanted {
        return Err(HandshakeError::WrongInstance { wanted, found });
    }
    check(me, &theirs)
}

/// The answering side. Before it answers it runs `ready` with the other's instance, so that what that process left behind
/// can be cleared first.
///
/// # Errors
/// Why they do not talk.
pub(crate) async fn answer<R: Future<Output = ()>>(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    me: &Identity,
    ready: impl FnOnce(Instance) -> R,
) -> Result<Remote, HandshakeError> {
    let major = read_preamble(stream).await?;
    let mut out = Vec::new();
    preamble(&mut out);
    if let Err(refused) = check_major(me, major) {
        stream.write_all(&out).await.map_err(broken)?;
        return Err(refused);
    }
    let theirs: Hello = codec::read(stream, HELLO_BYTES_MAX).await.map_err(broken)?;
    ready(Instance(theirs.instance)).await;
    hello(me, None, &mut out);
    stream.write_all(&out).await.map_err(broken)?;
    let wanted = Instance(theirs.expected_instance);
    if wanted != me.instance {
        return Err(HandshakeError::WrongInstance {
            wanted,
            found: me.instance,
        });
    }
    check(me, &theirs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_types::{KvDtype, KvGeometry, NumericsId};

    fn identity(instance: u64) -> Identity {
        Identity {
            node: NodeId::new(format!("node-{instance}")),
            instance: Instance(instance),
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

    async fn shake(a: &Identity, b: &Identity, wanted: u64) -> [Result<Remote, HandshakeError>; 2] {
        let (mut left, mut right) = tokio::io::duplex(1 << 16);
        let (x, y) = tokio::join!(
            greet(&mut left, a, Instance(wanted)),
            answer(&mut right, b, |_| std::future::ready(()))
        );
        [x, y]
    }

    fn refused_field(result: &Result<Remote, HandshakeError>) -> Option<&str> {
        match result {
            Err(HandshakeError::Refused(TransferError::Refused { field, .. })) => Some(field),
            Ok(_) | Err(_) => None,
        }
    }

    #[tokio::test]
    async fn equals_talk() {
        let other = Identity {
            numerics: NumericsId("other".into()),
            build: "c".into(),
            ..identity(2)
        };
        let [x, y] = shake(&identity(1), &other, 2).await;
        assert_eq!(x.unwrap().instance, Instance(2));
        assert_eq!(
            y.unwrap(),
            Remote {
                node: NodeId::new("node-1"),
                instance: Instance(1)
            }
        );
    }

    #[tokio::test]
    async fn both_name_the_field_that_differs() {
        let mut other = identity(2);
        other.geometry.block_tokens = 32;
        for result in shake(&identity(1), &other, 2).await {
            assert_eq!(refused_field(&result), Some("block_tokens"));
        }
        let mut other = identity(2);
        other.geometry.dtype = KvDtype::Q8;
        for result in shake(&identity(1), &other, 2).await {
            assert_eq!(refused_field(&result), Some("dtype"));
        }
        let other = Identity {
            fingerprint: ModelFingerprint([4; 32]),
            ..identity(2)
        };
        for result in shake(&identity(1), &other, 2).await {
            assert_eq!(refused_field(&result), Some("fingerprint"));
        }
    }

    #[tokio::test]
    async fn another_process_is_not_talked_to() {
        for result in shake(&identity(1), &identity(2), 7).await {
            assert_eq!(
                result,
                Err(HandshakeError::WrongInstance {
                    wanted: Instance(7),
                    found: Instance(2)
                })
            );
        }
    }

    #[tokio::test]
    async fn another_major_version_is_named_by_both() {
        let (mut left, mut right) = tokio::io::duplex(1 << 16);
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&9u32.to_le_bytes());
        left.write_all(&out).await.unwrap();
        let refused = answer(&mut right, &identity(2), |_| std::future::ready(())).await;
        assert_eq!(refused_field(&refused), Some("wire_major"));
        assert_eq!(read_preamble(&mut left).await, Ok(WIRE_MAJOR), "and they can see ours");

        let (mut left, mut right) = tokio::io::duplex(1 << 16);
        right.write_all(&out).await.unwrap();
        let refused = greet(&mut left, &identity(1), Instance(2)).await;
        assert_eq!(refused_field(&refused), Some("wire_major"));
    }

    #[tokio::test]
    async fn a_stranger_is_no_peer() {
        let (mut left, mut right) = tokio::io::duplex(1 << 16);
        left.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let result = answer(&mut right, &identity(2), |_| std::future::ready(())).await;
        assert!(matches!(result, Err(HandshakeError::Broken(_))));
    }
}
