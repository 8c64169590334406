//! The format of frames, for `bench/benches`. No part of the library's interface.

use super::wire::{self, Frame, PREFIX_BYTES};
use crate::transport::ExtentHeader;
use baton_types::{Epoch, KvGeometry};

/// The head of a frame of whole blocks.
pub fn encode_head(headers: &[ExtentHeader], out: &mut Vec<u8>) {
    let epoch = headers.first().map_or(Epoch(0), |header| header.epoch);
    wire::encode_extents(epoch, headers.iter(), out);
}

/// How many extents a head announces; none where it is none.
pub fn decode_head(head: &[u8], geometry: &KvGeometry) -> Option<usize> {
    let frame = wire::decode_prefix(head.first_chunk::<PREFIX_BYTES>()?).ok()?;
    match frame {
        Frame::Extents { .. } => Some(wire::decode_head(head, frame, geometry).ok()?.len()),
        Frame::Fence { .. } => None,
    }
}
