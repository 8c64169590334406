//! `/baton/v1/{cluster}/nodes/{node_id}`: one node that lives.
//!
//! - Value: a [`NodeRecord`] as JSON, about 700 bytes. Unknown fields are ignored, so that a newer node can be read.
//! - Writer: the node itself, by a txn "absent or own instance". Drain and role changes are RPCs to the node, which then
//!   writes its own key.
//! - Lifetime: the node's lease (10 s by default, renewed each third of it). Load does not stand here.

use super::{UnreadableValue, cluster_prefix};
use baton_types::{Instance, KvGeometry, ModelFingerprint, NodeId, NodeRole, NodeState, NumericsId};
use serde::{Deserialize, Serialize};

/// What everyone knows about a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its name.
    pub node_id: NodeId,
    /// Which life of its process.
    pub instance: Instance,
    /// What it does.
    pub role: NodeRole,
    /// Whether it takes work.
    pub state: NodeState,
    /// Where its gRPC services listen, `host:port`.
    pub grpc_address: String,
    /// Where its hand-over endpoint listens, `tcp://host:port` each, best first.
    pub transfer: Vec<String>,
    /// The model's name, as clients ask for it.
    pub model: String,
    /// BLAKE3 of its model card, hexadecimal.
    pub card_digest: String,
    /// Which weights.
    pub fingerprint: ModelFingerprint,
    /// Which arithmetic.
    pub numerics: NumericsId,
    /// Shape of its KV blocks.
    pub geometry: KvGeometry,
    /// Which machine (boot id): nodes of equal host id can share memory.
    pub host_id: String,
    /// Version of its binary.
    pub build: String,
    /// Its engine is the stub: its answers mean nothing.
    pub stub: bool,
    /// Blocks of its arena.
    pub blocks: u32,
    /// Requests that may wait in its queue.
    pub queue_capacity: u32,
    /// Longest context that it serves, in tokens.
    pub context_tokens: u32,
}

/// Where the records of a cluster begin.
pub fn prefix(cluster: &str) -> String {
    format!("{}nodes/", cluster_prefix(cluster))
}

/// A node's key.
pub fn key(cluster: &str, node_id: &NodeId) -> String {
    format!("{}{node_id}", prefix(cluster))
}

/// The node that a key names; `None` where it is no key of this kind.
pub fn node_of(cluster: &str, key: &[u8]) -> Option<NodeId> {
    let rest = key.strip_prefix(prefix(cluster).as_bytes())?;
    let name = std::str::from_utf8(rest)
        .ok()
        .filter(|name| !name.is_empty() && !name.contains('/'))?;
    Some(NodeId::new(name))
}

/// The value.
pub fn encode(record: &NodeRecord) -> Vec<u8> {
    serde_json::to_vec(record).expect("a record holds only strings, numbers and unit variants")
}

/// Reads a value.
///
/// # Errors
/// Where it is no record, or names another node than its key.
pub fn decode(cluster: &str, key: &[u8], value: &[u8]) -> Result<NodeRecord, UnreadableValue> {
    let fail = |problem: String| UnreadableValue {
        key: String::from_utf8_lossy(key).into_owned(),
        problem,
    };
    let record: NodeRecord = serde_json::from_slice(value).map_err(|error| fail(error.to_string()))?;
    if node_of(cluster, key).as_ref() == Some(&record.node_id) {
        Ok(record)
    } else {
        Err(fail(format!("the record names {}", record.node_id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_types::KvDtype;
    use proptest::prelude::*;

    prop_compose! {
        fn records()(
            node_id in "[a-z0-9._-]{1,20}",
            numbers in any::<(u64, u32, u32, u32)>(),
            texts in any::<(String, String, String, String)>(),
            transfer in prop::collection::vec(any::<String>(), 0..3),
            fingerprint in any::<[u8; 32]>(),
            shape in any::<(u32, u32, u32, u32)>(),
            choice in (0usize..3, 0usize..4, any::<bool>(), any::<bool>()),
        ) -> NodeRecord {
            NodeRecord {
                node_id: NodeId::new(node_id),
                instance: Instance(numbers.0),
                role: if choice.2 { NodeRole::Prefill } else { NodeRole::Decode },
                state: [NodeState::Starting, NodeState::Ready, NodeState::Draining][choice.0],
                grpc_address: texts.0.clone(),
                transfer,
                model: texts.1.clone(),
                card_digest: texts.2.clone(),
                fingerprint: ModelFingerprint(fingerprint),
                numerics: NumericsId(texts.3.clone()),
                geometry: KvGeometry {
                    layers: shape.0,
                    kv_heads: shape.1,
                    head_dim: shape.2,
                    block_tokens: shape.3,
                    dtype: [KvDtype::F16, KvDtype::Bf16, KvDtype::F32, KvDtype::Q8][choice.1],
                },
                host_id: texts.0,
                build: texts.1,
                stub: choice.3,
                blocks: numbers.1,
                queue_capacity: numbers.2,
                context_tokens: numbers.3,
            }
        }
    }

    proptest! {
        #[test]
        fn survives_its_codec(record in records()) {
            let key = key("c", &record.node_id);
            prop_assert_eq!(node_of("c", key.as_bytes()), Some(record.node_id.clone()));
            prop_assert_eq!(decode("c", key.as_bytes(), &encode(&record)).unwrap(), record);
        }

        #[test]
        fn noise_is_refused_without_a_panic(key: Vec<u8>, value: Vec<u8>) {
            prop_assert!(decode("c", &key, &value).is_err());
        }

        #[test]
        fn a_record_under_another_name_is_refused(record in records()) {
            let key = key("c", &NodeId::new("Somebody-else"));
            prop_assert!(decode("c", key.as_bytes(), &encode(&record)).is_err());
        }
    }

    #[test]
    fn keys_of_other_kinds_name_no_node() {
        assert_eq!(key("default", &NodeId::new("p0")), "/baton/v1/default/nodes/p0");
        for key in [
            "/baton/v1/c/nodes/",
            "/baton/v1/c/nodes/a/b",
            "/baton/v1/d/nodes/a",
            "/baton/v1/c/store_id",
        ] {
            assert_eq!(node_of("c", key.as_bytes()), None, "{key}");
        }
    }
}
