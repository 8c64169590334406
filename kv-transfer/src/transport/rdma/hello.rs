//! The rendezvous: what two processes tell each other over a tcp connection before their queue pairs are joined.
//!
//! The writer asks with one end per queue pair that it wants, the receiver answers with as many of its own and with what is
//! needed to write its arena. A frame is `BATON-RV | major u32 | length u32 | message`, integers little-endian. The
//! connection stays open afterwards and says nothing more: its end means that the other side is gone.

use super::verbs::RemoteEnd;
use crate::{Identity, WIRE_MAJOR};
use baton_types::{Instance, KvDtype, KvGeometry, ModelFingerprint};
use prost::Message;
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const MAGIC: [u8; 8] = *b"BATON-RV";
/// Regions of an arena of terabytes fit, what a stranger claims to send does not.
const FRAME_BYTES_MAX: usize = 1 << 20;

/// What is said first, by both.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Hello {
    #[prost(fixed64, tag = "1")]
    pub(super) from: u64,
    #[prost(fixed64, tag = "2")]
    pub(super) to: u64,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) fingerprint: Vec<u8>,
    /// Layers, key and value heads, head dimension, tokens of a block, element type.
    #[prost(uint32, repeated, tag = "4")]
    pub(super) geometry: Vec<u32>,
    #[prost(message, repeated, tag = "5")]
    pub(super) ends: Vec<End>,
    /// Of the receiver only, as all that follows.
    #[prost(uint32, tag = "6")]
    pub(super) verdict: u32,
    /// Receives posted on each of its queue pairs.
    #[prost(uint32, tag = "7")]
    pub(super) receives: u32,
    /// Blocks of its arena, and of each region of it but the last.
    #[prost(uint64, tag = "8")]
    pub(super) blocks: u64,
    #[prost(uint64, tag = "9")]
    pub(super) region_blocks: u64,
    /// Its arena, once per device.
    #[prost(message, repeated, tag = "10")]
    pub(super) arenas: Vec<RegisteredArena>,
}

/// One end of a queue pair.
#[derive(Clone, PartialEq, Message)]
pub(super) struct End {
    #[prost(uint32, tag = "1")]
    pub(super) number: u32,
    #[prost(uint32, tag = "2")]
    pub(super) first_packet: u32,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) gid: Vec<u8>,
    #[prost(uint32, tag = "4")]
    pub(super) lid: u32,
    #[prost(uint32, tag = "5")]
    pub(super) mtu: u32,
    /// Which of `arenas` is written through it.
    #[prost(uint32, tag = "6")]
    pub(super) arena: u32,
}

/// An arena as one device knows it: address and key of each region.
#[derive(Clone, PartialEq, Message)]
pub(super) struct RegisteredArena {
    #[prost(fixed64, repeated, tag = "1")]
    pub(super) addresses: Vec<u64>,
    #[prost(fixed32, repeated, tag = "2")]
    pub(super) keys: Vec<u32>,
}

/// What the receiver says of the asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Accepted,
    /// Another model, geometry or process was meant.
    Refused,
    /// Too many connections.
    Full,
    /// No device of its own is usable now.
    NoDevice,
}

impl Verdict {
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Accepted => 1,
            Self::Refused => 2,
            Self::Full => 3,
            Self::NoDevice => 4,
        }
    }

    pub(super) fn of(number: u32) -> Option<Self> {
        [Self::Accepted, Self::Refused, Self::Full, Self::NoDevice]
            .into_iter()
            .find(|verdict| verdict.number() == number)
    }
}

/// What is wrong with what a peer said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoHello {
    #[error("it is none of Baton's")]
    Magic,
    #[error("it speaks wire version {theirs}")]
    Major { theirs: u32 },
    #[error("its message makes no sense")]
    Malformed,
}

impl Hello {
    /// Who speaks and what its KV looks like; the rest is empty.
    pub(super) fn new(ours: &Identity, to: Instance) -> Self {
        let KvGeometry {
            layers,
            kv_heads,
            head_dim,
            block_tokens,
            dtype,
        } = ours.geometry;
        let dtype = match dtype {
            KvDtype::F16 => 1,
            KvDtype::Bf16 => 2,
            KvDtype::F32 => 3,
            KvDtype::Q8 => 4,
        };
        Self {
            from: ours.instance.0,
            to: to.0,
            fingerprint: ours.fingerprint.0.to_vec(),
            geometry: vec![layers, kv_heads, head_dim, block_tokens, dtype],
            ..Self::default()
        }
    }

    /// # Errors
    /// Where it has another length than a fingerprint.
    pub(super) fn fingerprint(&self) -> Result<ModelFingerprint, NoHello> {
        let bytes = self.fingerprint.as_slice().try_into();
        bytes.map(ModelFingerprint).map_err(|_| NoHello::Malformed)
    }

    /// # Errors
    /// Where it is none.
    pub(super) fn geometry(&self) -> Result<KvGeometry, NoHello> {
        let [layers, kv_heads, head_dim, block_tokens, dtype] = self.geometry[..] else {
            return Err(NoHello::Malformed);
        };
        let dtype = match dtype {
            1 => KvDtype::F16,
            2 => KvDtype::Bf16,
            3 => KvDtype::F32,
            4 => KvDtype::Q8,
            _ => return Err(NoHello::Malformed),
        };
        Ok(KvGeometry {
            layers,
            kv_heads,
            head_dim,
            block_tokens,
            dtype,
        })
    }

    fn encode_frame(&self) -> Vec<u8> {
        let message = self.encode_to_vec();
        let mut frame = MAGIC.to_vec();
        frame.extend_from_slice(&WIRE_MAJOR.to_le_bytes());
        frame.extend_from_slice(&u32::try_from(message.len()).unwrap_or(u32::MAX).to_le_bytes());
        frame.extend_from_slice(&message);
        frame
    }

    /// # Errors
    /// What the system says.
    pub(super) async fn send(&self, stream: &mut TcpStream) -> io::Result<()> {
        stream.write_all(&self.encode_frame()).await
    }

    /// # Errors
    /// Outside: what the system says. Inside: what is wrong with what came.
    pub(super) async fn receive(stream: &mut TcpStream) -> io::Result<Result<Self, NoHello>> {
        let mut start = [0; MAGIC.len()];
        stream.read_exact(&mut start).await?;
        if start != MAGIC {
            return Ok(Err(NoHello::Magic));
        }
        // The rest of another version may look otherwise: it is not awaited.
        let theirs = stream.read_u32_le().await?;
        if theirs != WIRE_MAJOR {
            return Ok(Err(NoHello::Major { theirs }));
        }
        let len = stream.read_u32_le().await? as usize;
        if len > FRAME_BYTES_MAX {
            return Ok(Err(NoHello::Malformed));
        }
        let mut message = vec![0; len];
        stream.read_exact(&mut message).await?;
        Ok(Self::decode(message.as_slice()).map_err(|_| NoHello::Malformed))
    }
}

impl End {
    /// # Errors
    /// Where it is none that a queue pair can have.
    pub(super) fn remote(&self) -> Result<RemoteEnd, NoHello> {
        let gid = self.gid.as_slice().try_into().map_err(|_| NoHello::Malformed)?;
        let lid = u16::try_from(self.lid).map_err(|_| NoHello::Malformed)?;
        if !(1..=5).contains(&self.mtu) || self.number > 0xff_ffff {
            return Err(NoHello::Malformed);
        }
        Ok(RemoteEnd {
            number: self.number,
            first_packet: self.first_packet,
            gid,
            lid,
            mtu: self.mtu,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(hello) = Hello::decode(bytes.as_slice()) {
                let _ = (hello.fingerprint(), hello.geometry());
                for end in &hello.ends {
                    let _ = end.remote();
                }
            }
        }
    }

    #[test]
    fn ends_out_of_range_are_refused() {
        let good = End {
            number: 17,
            gid: vec![0; 16],
            mtu: 5,
            ..End::default()
        };
        assert!(good.remote().is_ok());
        let bad = [
            End {
                gid: vec![0; 15],
                ..good.clone()
            },
            End { mtu: 0, ..good.clone() },
            End { mtu: 6, ..good.clone() },
            End {
                lid: 1 << 16,
                ..good.clone()
            },
            End {
                number: 1 << 24,
                ..good.clone()
            },
        ];
        for end in bad {
            assert_eq!(end.remote(), Err(NoHello::Malformed), "{end:?}");
        }
    }
}
