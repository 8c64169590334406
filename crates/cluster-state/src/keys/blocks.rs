//! `/baton/v1/{cluster}/blocks/{node_id}/{instance}/{seq}`: which KV blocks one life of a node holds.
//!
//! - Key: `instance` as 16 hexadecimal digits, `seq` as 16 hexadecimal digits that grow by one with each write, so that
//!   keys are in the order in which they were written.
//! - Value: a [`BlockSegment`]: blocks that came and blocks that left, at most 64 KiB. What the node holds is what all of
//!   its segments add up to, in order; in each, what left comes before what came. Little-endian: version 1 (u8), since
//!   when the oldest change waited (u64, microseconds since 1970), how many left (u32), their hashes (16 bytes each),
//!   then the hashes of those that came, to the end.
//! - Writer: the node. It never changes a segment, but replaces several by one, in one txn.
//! - Lifetime: the node's lease, the same as its record's.

use super::{UnreadableValue, cluster_prefix};
use baton_types::{BlockChanges, BlockHash, Instance, NodeId};

/// The largest value.
pub const VALUE_BYTES_MAX: usize = 64 * 1024;
/// Hashes of one segment, those that left and those that came together.
pub const HASHES_MAX: usize = (VALUE_BYTES_MAX - HEADER_BYTES) / HASH_BYTES;

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 1 + 8 + 4;
const HASH_BYTES: usize = 16;

/// Some of a node's changes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlockSegment {
    /// Microseconds since 1970 on the node's wall clock: the oldest change here is no older than that.
    pub since_unix_us: u64,
    /// What left, and then what came.
    pub changes: BlockChanges,
}

/// What a key names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SegmentName {
    /// Whose.
    pub node_id: NodeId,
    /// In which life.
    pub instance: Instance,
    /// Place in the order of writes.
    pub seq: u64,
}

/// Where the segments of a cluster begin.
pub fn prefix(cluster: &str) -> String {
    format!("{}blocks/", cluster_prefix(cluster))
}

/// A segment's key.
pub fn key(cluster: &str, name: &SegmentName) -> String {
    format!(
        "{}{}/{}/{:016x}",
        prefix(cluster),
        name.node_id,
        name.instance,
        name.seq
    )
}

/// What a key names; `None` where it is no key of this kind.
pub fn name_of(cluster: &str, key: &[u8]) -> Option<SegmentName> {
    let rest = key.strip_prefix(prefix(cluster).as_bytes())?;
    let mut parts = std::str::from_utf8(rest).ok()?.split('/');
    let (node, instance, seq) = (parts.next()?, parts.next()?, parts.next()?);
    let name = SegmentName {
        node_id: NodeId::new(node),
        instance: instance.parse().ok()?,
        seq: u64::from_str_radix(seq, 16).ok()?,
    };
    (!node.is_empty() && self::key(cluster, &name).as_bytes() == key).then_some(name)
}

/// The value.
pub fn encode(segment: &BlockSegment) -> Vec<u8> {
    let BlockChanges { stored, evicted } = &segment.changes;
    let mut value = Vec::with_capacity(HEADER_BYTES + HASH_BYTES * (stored.len() + evicted.len()));
    value.push(VERSION);
    value.extend_from_slice(&segment.since_unix_us.to_le_bytes());
    let count = u32::try_from(evicted.len()).expect("a segment has at most HASHES_MAX hashes");
    value.extend_from_slice(&count.to_le_bytes());
    for hash in evicted.iter().chain(stored) {
        value.extend_from_slice(&hash.0);
    }
    value
}

/// Reads a value.
///
/// # Errors
/// Where it is no segment, or is too large to be one.
pub fn decode(key: &[u8], value: &[u8]) -> Result<BlockSegment, UnreadableValue> {
    let fail = |problem: &str| UnreadableValue {
        key: String::from_utf8_lossy(key).into_owned(),
        problem: problem.to_owned(),
    };
    if value.len() > VALUE_BYTES_MAX {
        return Err(fail("it is larger than 64 KiB"));
    }
    let (version, rest) = value.split_first().ok_or_else(|| fail("it is empty"))?;
    if *version != VERSION {
        return Err(fail("its version is not 1"));
    }
    let (since, rest) = rest.split_first_chunk().ok_or_else(|| fail("its header is cut"))?;
    let (evicted, rest) = rest.split_first_chunk().ok_or_else(|| fail("its header is cut"))?;
    let (hashes, cut) = rest.as_chunks::<HASH_BYTES>();
    if !cut.is_empty() {
        return Err(fail("its last hash is cut"));
    }
    let (evicted, stored) = hashes
        .split_at_checked(u32::from_le_bytes(*evicted) as usize)
        .ok_or_else(|| fail("it names more hashes than it has"))?;
    let hashes = |of: &[[u8; HASH_BYTES]]| of.iter().copied().map(BlockHash).collect();
    Ok(BlockSegment {
        since_unix_us: u64::from_le_bytes(*since),
        changes: BlockChanges {
            stored: hashes(stored),
            evicted: hashes(evicted),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hashes(max: usize) -> impl Strategy<Value = Vec<BlockHash>> {
        prop::collection::vec(any::<[u8; 16]>().prop_map(BlockHash), 0..max)
    }

    proptest! {
        #[test]
        fn survives_its_codec(
            node in "[a-z0-9._-]{1,20}", instance: u64, seq: u64, since_unix_us: u64,
            stored in hashes(40), evicted in hashes(40),
        ) {
            let name = SegmentName { node_id: NodeId::new(node), instance: Instance(instance), seq };
            let key = key("c", &name);
            prop_assert_eq!(name_of("c", key.as_bytes()), Some(name));
            let segment = BlockSegment { since_unix_us, changes: BlockChanges { stored, evicted } };
            prop_assert_eq!(decode(key.as_bytes(), &encode(&segment)).unwrap(), segment);
        }

        #[test]
        fn noise_is_refused_or_read_without_a_panic(mut value: Vec<u8>, version in 0u8..3) {
            if let Some(first) = value.first_mut() {
                *first = version;
            }
            if let Ok(segment) = decode(b"k", &value) {
                prop_assert_eq!(encode(&segment), value);
            }
        }
    }

    #[test]
    fn the_largest_segment_is_64_kib_and_a_larger_one_is_refused() {
        let mut segment = BlockSegment {
            changes: BlockChanges {
                stored: vec![BlockHash([7; 16]); HASHES_MAX],
                evicted: Vec::new(),
            },
            ..BlockSegment::default()
        };
        let value = encode(&segment);
        assert!((VALUE_BYTES_MAX - HASH_BYTES..=VALUE_BYTES_MAX).contains(&value.len()));
        assert!(decode(b"k", &value).is_ok());
        segment.changes.evicted.push(BlockHash([8; 16]));
        assert!(decode(b"k", &encode(&segment)).is_err());
    }

    #[test]
    fn keys_are_in_the_order_of_their_writes_and_others_name_nothing() {
        let at = |seq| SegmentName {
            node_id: NodeId::new("p0"),
            instance: Instance(0xab),
            seq,
        };
        assert_eq!(
            key("default", &at(31)),
            "/baton/v1/default/blocks/p0/00000000000000ab/000000000000001f"
        );
        assert!(key("c", &at(9)) < key("c", &at(10)) && key("c", &at(u64::MAX - 1)) < key("c", &at(u64::MAX)));
        for key in [
            "/baton/v1/c/blocks/p0/ab/1",
            "/baton/v1/c/blocks//00000000000000ab/000000000000001f",
            "/baton/v1/c/blocks/p0/00000000000000ab/000000000000001f/x",
            "/baton/v1/d/blocks/p0/00000000000000ab/000000000000001f",
            "/baton/v1/c/nodes/p0",
        ] {
            assert_eq!(name_of("c", key.as_bytes()), None, "{key}");
        }
    }
}
