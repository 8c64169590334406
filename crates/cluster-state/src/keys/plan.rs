//! `/baton/v1/{cluster}/plan/leader` and `.../plan/advice`: which coordinator's controller decides, and what it came to.
//!
//! - `leader`: 16 hexadecimal digits, the instance of the coordinator that leads. Writer: that coordinator, by a txn "absent".
//!   Lifetime: its lease. The revision that created the key is the *term*: no two leads have the same.
//! - `advice`: an [`AdviceRecord`] as JSON, about 1 KB. Writer: the leader, by a txn "the leader's key is still of my term".
//!   Lifetime: the data's; the next leader goes on from it. Unknown fields are ignored, so that a newer leader can be read.

use super::{UnreadableValue, cluster_prefix};
use baton_types::Instance;
use serde::{Deserialize, Serialize};

/// Nodes by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeCounts {
    /// Prefill nodes.
    pub prefill: u32,
    /// Decode nodes.
    pub decode: u32,
}

/// A change of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ChangeRecord {
    /// `to_prefill`, `to_decode`, `add_prefill`, `add_decode`, `remove_prefill` or `remove_decode`.
    pub kind: String,
    /// In words.
    pub text: String,
    /// The nodes that it is best done to, by name.
    pub nodes: Vec<String>,
}

/// A change as it was tried in the simulator.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RehearsedRecord {
    /// As [`ChangeRecord::kind`].
    pub kind: String,
    /// In words.
    pub text: String,
    /// Share of the requests within the SLO without it.
    pub without: f64,
    /// With it, its cost included.
    pub with: f64,
    /// The difference is more than chance: `yes`, `no` or `cannot tell`.
    pub better: String,
}

/// A change that was decided.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct DecidedRecord {
    /// What.
    pub change: ChangeRecord,
    /// What became of it: `advised`, `applied`, or why it failed.
    pub outcome: String,
    /// Seconds since 1970, by the leader's wall clock.
    pub unix_s: u64,
    /// What the rehearsal had promised.
    pub rehearsed: Option<RehearsedRecord>,
}

/// What a controller saw, and what it came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdviceRecord {
    /// The coordinator whose controller it is.
    pub leader: Instance,
    /// `advise` or `apply`.
    pub mode: String,
    /// Seconds since 1970 at which it looked, by the leader's wall clock.
    pub unix_s: u64,
    /// The model whose nodes it looks at; empty while it is not known.
    pub model: String,
    /// What was promised to clients.
    pub slo: String,
    /// Nodes that take work.
    pub ready: NodeCounts,
    /// Nodes that there should be.
    pub target: NodeCounts,
    /// Requests that came in the window.
    pub requests: u32,
    /// Of these, those that could be judged.
    pub judged: u32,
    /// Share of those that were within the SLO; none where nothing could be judged.
    pub attainment: Option<f64>,
    /// What is wrong, in words; empty where nothing is.
    pub reasons: Vec<String>,
    /// What should be changed.
    pub change: Option<ChangeRecord>,
    /// Why nothing is done now; none where `change` is done.
    pub hold: Option<String>,
    /// What was tried in the simulator.
    pub rehearsed: Vec<RehearsedRecord>,
    /// The last change that was decided.
    pub last: Option<DecidedRecord>,
}

/// Who leads.
pub fn leader_key(cluster: &str) -> String {
    format!("{}plan/leader", cluster_prefix(cluster))
}

/// What it came to.
pub fn advice_key(cluster: &str) -> String {
    format!("{}plan/advice", cluster_prefix(cluster))
}

/// The leader's value.
pub fn encode_leader(leader: Instance) -> Vec<u8> {
    leader.to_string().into_bytes()
}

/// Reads a leader's value.
///
/// # Errors
/// Where it is no instance.
pub fn decode_leader(cluster: &str, value: &[u8]) -> Result<Instance, UnreadableValue> {
    let text = std::str::from_utf8(value).ok();
    text.and_then(|text| text.parse().ok()).ok_or_else(|| UnreadableValue {
        key: leader_key(cluster),
        problem: "expected 16 hexadecimal digits".to_owned(),
    })
}

/// The advice's value.
pub fn encode_advice(advice: &AdviceRecord) -> Vec<u8> {
    serde_json::to_vec(advice).expect("a record holds only strings, numbers and lists of them")
}

/// Reads an advice's value.
///
/// # Errors
/// Where it is no such record.
pub fn decode_advice(cluster: &str, value: &[u8]) -> Result<AdviceRecord, UnreadableValue> {
    serde_json::from_slice(value).map_err(|error| UnreadableValue {
        key: advice_key(cluster),
        problem: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn both_survive_their_codecs(leader: u64, texts: [String; 4], counts: [u32; 4], thousandths in 0u32..1000) {
            // The last bit of a longer fraction may be another one when it was read.
            let (leader, share) = (Instance(leader), f64::from(thousandths) / 1000.0);
            prop_assert_eq!(decode_leader("c", &encode_leader(leader)).unwrap(), leader);
            let [kind, text, node, reason] = texts;
            let rehearsed = RehearsedRecord { kind: kind.clone(), text: text.clone(), without: share, with: 1.0, ..Default::default() };
            let change = ChangeRecord { kind, text, nodes: vec![node] };
            let last = DecidedRecord { change: change.clone(), rehearsed: Some(rehearsed.clone()), ..Default::default() };
            let advice = AdviceRecord {
                leader,
                mode: String::new(),
                unix_s: 7,
                model: String::new(),
                slo: String::new(),
                requests: 9,
                judged: 8,
                hold: None,
                ready: NodeCounts { prefill: counts[0], decode: counts[1] },
                target: NodeCounts { prefill: counts[2], decode: counts[3] },
                attainment: Some(share).filter(|share| *share > 0.5),
                reasons: vec![reason],
                change: Some(change),
                rehearsed: vec![rehearsed],
                last: Some(last),
            };
            prop_assert_eq!(decode_advice("c", &encode_advice(&advice)).unwrap(), advice);
        }

        #[test]
        fn noise_is_refused_without_a_panic(bytes: Vec<u8>) {
            prop_assert!(decode_advice("c", &bytes).is_err());
            prop_assume!(bytes.len() != 16);
            prop_assert!(decode_leader("c", &bytes).is_err());
        }
    }

    #[test]
    fn both_stand_under_their_cluster() {
        assert_eq!(leader_key("a"), "/baton/v1/a/plan/leader");
        assert_eq!(advice_key("a"), "/baton/v1/a/plan/advice");
    }
}
