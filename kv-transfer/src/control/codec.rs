//! Framing: a length of 4 bytes, little-endian, then so many bytes of one prost message.

use prost::Message;
use std::io::{Error, ErrorKind};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bound on one frame's message. The largest is a grant, which names each destination block in at most 5 bytes.
pub(crate) const FRAME_BYTES_MAX: usize = 1 << 20;
/// Bound on what a sender can hand over beside its blocks.
pub(crate) const PAYLOAD_BYTES_MAX: usize = FRAME_BYTES_MAX / 2;

/// Appends one frame.
pub(super) fn encode(message: &impl Message, out: &mut Vec<u8>) {
    let len = message.encoded_len();
    debug_assert!(len <= FRAME_BYTES_MAX, "a frame of {len} bytes");
    out.reserve(4 + len);
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&message.encode_to_vec());
}

/// Reads one frame of at most `limit` bytes.
pub(super) async fn read<M: Message + Default>(from: &mut (impl AsyncRead + Unpin), limit: usize) -> Result<M, Error> {
    let len = from.read_u32_le().await? as usize;
    if len > limit {
        return Err(Error::new(
            ErrorKind::InvalidData,
            format!("a frame of {len} bytes, where {limit} are allowed"),
        ));
    }
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).await?;
    M::decode(bytes.as_slice()).map_err(|error| Error::new(ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::super::wire::Failure;
    use super::*;

    #[tokio::test]
    async fn frames_follow_each_other() {
        let frames: Vec<Failure> = (0..5)
            .map(|i| Failure {
                code: i,
                reason: "x".repeat(i as usize * 100),
            })
            .collect();
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| encode(frame, &mut bytes));
        let mut from = bytes.as_slice();
        for frame in frames {
            assert_eq!(read::<Failure>(&mut from, 1000).await.unwrap(), frame);
        }
        let end = read::<Failure>(&mut from, 1000).await.unwrap_err();
        assert_eq!(end.kind(), ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn bad_frames_are_errors() {
        let cases: [(&[u8], ErrorKind); 4] = [
            (&[1, 0, 0], ErrorKind::UnexpectedEof),
            (&[9, 0, 0, 0, 1], ErrorKind::UnexpectedEof),
            (&[255, 255, 255, 255, 1], ErrorKind::InvalidData),
            (&[3, 0, 0, 0, 255, 255, 255], ErrorKind::InvalidData),
        ];
        for (bytes, kind) in cases {
            let mut from = bytes;
            assert_eq!(
                read::<Failure>(&mut from, 1000).await.unwrap_err().kind(),
                kind,
                "{bytes:?}"
            );
        }
    }
}
