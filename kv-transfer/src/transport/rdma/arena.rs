//! Arenas as devices know them: this process's own, registered in regions of whole blocks, and a peer's, by keys.

use super::hello::{Hello, NoHello, RegisteredArena};
use super::verbs::{DmaBuf, HostMemory, Memory, Part, ProtectionDomain, Region, Registration, Remote, VerbsError};
use baton_types::{ArenaView, BlockId, KvGeometry, OutOfArena};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// How an arena is registered.
#[derive(Clone)]
pub(super) struct ArenaOptions {
    /// Most bytes of one region, beside what the device allows.
    pub(super) region_bytes_max: u64,
    /// The dma-buf that it lies in, where it is a device's memory.
    pub(super) dma_buf: Option<Arc<OwnedFd>>,
}

/// Why an arena cannot be registered.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotRegistered {
    #[error("a block of {block_bytes} bytes is more than the {limit} that one registration can have")]
    BlockTooLarge { block_bytes: usize, limit: u64 },
    #[error("{0} (is the limit of locked memory, `ulimit -l`, large enough for --kv-bytes?)")]
    Refused(#[from] VerbsError),
    #[error(transparent)]
    OutOfArena(#[from] OutOfArena),
}

/// This process's arena, registered with one device.
pub(super) struct LocalArena {
    regions: Vec<Region>,
    base: u64,
    region_bytes: u64,
    region_blocks: usize,
    blocks: usize,
}

impl LocalArena {
    /// Registers all of it, in as few regions as the limits allow: a block is never in two. Takes a while for a large one.
    ///
    /// # Errors
    /// Blocks larger than a region can be, and what the device says.
    pub(super) fn register(
        domain: &Arc<ProtectionDomain>,
        arena: &ArenaView,
        options: &ArenaOptions,
    ) -> Result<Self, NotRegistered> {
        let block_bytes = arena.geometry().block_bytes();
        let limit = domain.context().limits().region_bytes.min(options.region_bytes_max);
        let region_blocks = usize::try_from(limit / block_bytes as u64).unwrap_or(usize::MAX);
        let region_blocks = region_blocks.min(arena.blocks());
        if region_blocks == 0 {
            return Err(NotRegistered::BlockTooLarge { block_bytes, limit });
        }
        let mut regions = Vec::new();
        for first in (0..arena.blocks()).step_by(region_blocks) {
            let mapped = HostMemory::blocks(arena, first, region_blocks.min(arena.blocks() - first))?;
            let memory = match &options.dma_buf {
                None => Memory::Host(mapped),
                Some(descriptor) => Memory::DmaBuf(DmaBuf {
                    descriptor: Arc::clone(descriptor),
                    offset: (first * block_bytes) as u64,
                    mapped,
                }),
            };
            regions.push(Region::register(domain, memory, true)?);
        }
        Ok(Self {
            base: regions.first().map_or(0, Region::address),
            regions,
            region_bytes: (region_blocks * block_bytes) as u64,
            region_blocks,
            blocks: arena.blocks(),
        })
    }

    /// How it is registered; all regions alike.
    pub(super) fn registration(&self) -> &Registration {
        self.regions.first().map_or(&Registration::Host, Region::registration)
    }

    /// Bytes of one block, for a work request.
    ///
    /// # Panics
    /// Where they lie outside the arena: extents were checked against it.
    pub(super) fn part(&self, address: u64, len: u32) -> Part {
        let region = address
            .checked_sub(self.base)
            .and_then(|offset| usize::try_from(offset / self.region_bytes).ok())
            .and_then(|index| self.regions.get(index));
        let part = region.and_then(|region| region.part(address, len));
        part.expect("an extent lies within one block of the arena")
    }

    /// What a writer must know of it.
    pub(super) fn describe(&self) -> RegisteredArena {
        RegisteredArena {
            addresses: self.regions.iter().map(Region::address).collect(),
            keys: self.regions.iter().map(Region::remote_key).collect(),
        }
    }

    /// Blocks of it, and of each region but the last.
    pub(super) fn shape(&self) -> (u64, u64) {
        (self.blocks as u64, self.region_blocks as u64)
    }
}

/// A receiver's arena, as its device takes writes to it.
#[derive(Debug)]
pub(super) struct RemoteArena {
    regions: Vec<Remote>,
    blocks: u64,
    region_blocks: u64,
    block_bytes: u64,
    layers: u32,
}

impl RemoteArena {
    /// # Errors
    /// Where the receiver's numbers do not fit together.
    pub(super) fn new(hello: &Hello, arena: u32, geometry: &KvGeometry) -> Result<Self, NoHello> {
        let block_bytes = geometry.block_bytes() as u64;
        let described = hello.arenas.get(arena as usize).ok_or(NoHello::Malformed)?;
        let (blocks, region_blocks) = (hello.blocks, hello.region_blocks);
        let sound = region_blocks > 0
            && blocks.div_ceil(region_blocks) == described.addresses.len() as u64
            && described.addresses.len() == described.keys.len()
            && blocks.checked_mul(block_bytes).is_some();
        if !sound {
            return Err(NoHello::Malformed);
        }
        let regions = described.addresses.iter().zip(&described.keys);
        Ok(Self {
            regions: regions
                .map(|(address, key)| Remote {
                    address: *address,
                    key: *key,
                })
                .collect(),
            blocks,
            region_blocks,
            block_bytes,
            layers: geometry.layers,
        })
    }

    /// Layers of a block, and bytes of each.
    pub(super) fn layers(&self) -> (u32, u64) {
        (self.layers, self.block_bytes / u64::from(self.layers.max(1)))
    }

    /// Where a block's bytes from `offset` on are written to.
    ///
    /// # Errors
    /// Where the receiver has no such block.
    pub(super) fn place(&self, block: BlockId, offset: u64) -> Result<Remote, OutOfArena> {
        let index = u64::from(block.0);
        let region = usize::try_from(index / self.region_blocks).ok();
        match region.and_then(|region| self.regions.get(region)) {
            Some(region) if index < self.blocks => Ok(Remote {
                address: region
                    .address
                    .wrapping_add((index % self.region_blocks) * self.block_bytes + offset),
                key: region.key,
            }),
            Some(_) | None => Err(OutOfArena {
                block,
                offset: offset as usize,
                end: self.block_bytes as usize,
                blocks: self.blocks as usize,
                block_bytes: self.block_bytes as usize,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_types::KvDtype;

    /// Blocks of 96 bytes.
    const GEOMETRY: KvGeometry = KvGeometry {
        layers: 3,
        kv_heads: 1,
        head_dim: 1,
        block_tokens: 8,
        dtype: KvDtype::F16,
    };

    fn hello(blocks: u64, region_blocks: u64, regions: u64) -> Hello {
        Hello {
            blocks,
            region_blocks,
            arenas: vec![RegisteredArena {
                addresses: (0..regions).map(|i| 1_000_000 * (i + 1)).collect(),
                keys: (0..regions as u32).collect(),
            }],
            ..Hello::default()
        }
    }

    #[test]
    fn blocks_are_found_in_their_regions() {
        let arena = RemoteArena::new(&hello(10, 4, 3), 0, &GEOMETRY).unwrap();
        assert_eq!(arena.layers(), (3, 32));
        let place = |block, offset| {
            arena
                .place(BlockId(block), offset)
                .map(|place| (place.address, place.key))
        };
        assert_eq!(place(0, 0), Ok((1_000_000, 0)));
        assert_eq!(place(3, 30), Ok((1_000_318, 0)));
        assert_eq!(place(4, 0), Ok((2_000_000, 1)));
        assert_eq!(place(9, 1), Ok((3_000_097, 2)));
        assert!(place(10, 0).is_err());
        assert!(place(u32::MAX, 0).is_err());
    }

    #[test]
    fn numbers_that_do_not_fit_together_are_refused() {
        for (blocks, region_blocks, regions) in [(10, 4, 2), (10, 0, 3), (10, 4, 4), (u64::MAX, u64::MAX, 1)] {
            assert!(RemoteArena::new(&hello(blocks, region_blocks, regions), 0, &GEOMETRY).is_err());
        }
        assert!(RemoteArena::new(&hello(10, 4, 3), 1, &GEOMETRY).is_err());
    }
}
