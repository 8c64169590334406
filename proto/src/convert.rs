//! Conversion between the wire forms and `baton-types`. What comes off the wire is checked here, once, and every error
//! names the field; nothing behind the service edge sees a generated type.

use crate::v1;
use baton_types::{
    Attempt, BlockCounts, BlockHash, Budget, FinishReason, Grammar, NodeRole, NodeState, SamplingParams, Ticket,
    TokenLogprobs, Work,
};
use bytes::Bytes;
use std::str::FromStr;

/// A message that does not hold what its type promises.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// A field that must be set is not.
    #[error("{field} is missing")]
    Missing {
        /// Which.
        field: &'static str,
    },
    /// A field's value is outside what it may be.
    #[error("{field}: {problem}")]
    Invalid {
        /// Which.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl ConvertError {
    /// The field at fault.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Missing { field } | Self::Invalid { field, .. } => field,
        }
    }

    /// The same message would fail again.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Missing { .. } | Self::Invalid { .. } => false,
        }
    }

    fn invalid(field: &'static str, problem: impl ToString) -> Self {
        Self::Invalid {
            field,
            problem: problem.to_string(),
        }
    }
}

impl From<ConvertError> for tonic::Status {
    fn from(error: ConvertError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

/// Parses an identity that travels as text.
///
/// # Errors
/// Where it is none, naming `field`.
pub fn parse_id<T>(field: &'static str, text: &str) -> Result<T, ConvertError>
where
    T: FromStr,
    T::Err: ToString,
{
    text.parse()
        .map_err(|error: T::Err| ConvertError::invalid(field, error.to_string()))
}

/// The wire form of a ticket: 16 bytes.
pub fn ticket_bytes(ticket: Ticket) -> Bytes {
    Bytes::copy_from_slice(&ticket.0.to_be_bytes())
}

/// Reads a ticket.
///
/// # Errors
/// Where it is not 16 bytes.
pub fn parse_ticket(bytes: &[u8]) -> Result<Ticket, ConvertError> {
    let found = bytes.len();
    <[u8; 16]>::try_from(bytes)
        .map(|bytes| Ticket(u128::from_be_bytes(bytes)))
        .map_err(|_| ConvertError::invalid("ticket", format!("{found} bytes; it must be 16")))
}

impl From<Work> for v1::Work {
    fn from(work: Work) -> Self {
        Self {
            request_id: work.request_id.to_string(),
            ticket: ticket_bytes(work.ticket),
            attempt: work.attempt.0,
            prompt: work.prompt,
            generated: work.generated,
            sampling: Some(work.sampling.into()),
            block_hashes: work
                .block_hashes
                .iter()
                .map(|hash| Bytes::copy_from_slice(&hash.0))
                .collect(),
            cache_salt: work.cache_salt,
            budget_us: work.budget.as_us(),
            coordinator_instance: work.coordinator.to_string(),
            model_fingerprint: work.fingerprint.to_string(),
        }
    }
}

impl TryFrom<v1::Work> for Work {
    type Error = ConvertError;

    fn try_from(work: v1::Work) -> Result<Self, ConvertError> {
        if work.prompt.is_empty() {
            return Err(ConvertError::invalid("prompt", "it is empty"));
        }
        if work.attempt == 0 {
            return Err(ConvertError::invalid("attempt", "attempts count from 1"));
        }
        let wire = work.sampling.ok_or(ConvertError::Missing { field: "sampling" })?;
        if wire.max_tokens.is_none() {
            return Err(ConvertError::Missing {
                field: "sampling.max_tokens",
            });
        }
        if wire.seed.is_none() {
            return Err(ConvertError::Missing { field: "sampling.seed" });
        }
        let block_hashes = work
            .block_hashes
            .iter()
            .map(|hash| parse_hash(hash))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            request_id: parse_id("request_id", &work.request_id)?,
            ticket: parse_ticket(&work.ticket)?,
            attempt: Attempt(work.attempt),
            prompt: work.prompt,
            generated: work.generated,
            sampling: SamplingParams::try_from(wire)?,
            block_hashes,
            cache_salt: work.cache_salt,
            budget: Budget::from_us(work.budget_us),
            coordinator: parse_id("coordinator_instance", &work.coordinator_instance)?,
            fingerprint: parse_id("model_fingerprint", &work.model_fingerprint)?,
        })
    }
}

fn parse_hash(bytes: &[u8]) -> Result<BlockHash, ConvertError> {
    <[u8; 16]>::try_from(bytes).map(BlockHash).map_err(|_| {
        ConvertError::invalid(
            "block_hashes",
            format!("an entry of {} bytes; each has 16", bytes.len()),
        )
    })
}

impl From<SamplingParams> for v1::SamplingParams {
    fn from(params: SamplingParams) -> Self {
        Self {
            temperature: Some(params.temperature),
            top_k: Some(params.top_k),
            top_p: Some(params.top_p),
            min_p: Some(params.min_p),
            repetition_penalty: Some(params.repetition_penalty),
            presence_penalty: Some(params.presence_penalty),
            frequency_penalty: Some(params.frequency_penalty),
            seed: Some(params.seed),
            logit_bias: params.logit_bias.into_iter().collect(),
            logprobs: params.logprobs,
            max_tokens: Some(params.max_tokens),
            ignore_eos: params.ignore_eos,
            grammar: params.grammar.map(Into::into),
        }
    }
}

impl From<Grammar> for v1::sampling_params::Grammar {
    fn from(grammar: Grammar) -> Self {
        match grammar {
            Grammar::JsonSchema(schema) => Self::JsonSchema(schema),
            Grammar::Regex(regex) => Self::Regex(regex),
        }
    }
}

impl From<v1::sampling_params::Grammar> for Grammar {
    fn from(wire: v1::sampling_params::Grammar) -> Self {
        match wire {
            v1::sampling_params::Grammar::JsonSchema(schema) => Self::JsonSchema(schema),
            v1::sampling_params::Grammar::Regex(regex) => Self::Regex(regex),
        }
    }
}

/// Absent fields take the defaults that the `.proto` file states; an absent seed reads as 0 and an absent `max_tokens` as
/// no bound, so who gives those another meaning looks at the wire form first. Biases come ordered by token id.
impl TryFrom<v1::SamplingParams> for SamplingParams {
    type Error = ConvertError;

    fn try_from(wire: v1::SamplingParams) -> Result<Self, ConvertError> {
        let default = Self::default();
        let mut logit_bias: Vec<(u32, f32)> = wire.logit_bias.into_iter().collect();
        logit_bias.sort_unstable_by_key(|(token, _)| *token);
        let params = Self {
            temperature: wire.temperature.unwrap_or(default.temperature),
            top_k: wire.top_k.unwrap_or(default.top_k),
            top_p: wire.top_p.unwrap_or(default.top_p),
            min_p: wire.min_p.unwrap_or(default.min_p),
            repetition_penalty: wire.repetition_penalty.unwrap_or(default.repetition_penalty),
            presence_penalty: wire.presence_penalty.unwrap_or(default.presence_penalty),
            frequency_penalty: wire.frequency_penalty.unwrap_or(default.frequency_penalty),
            seed: wire.seed.unwrap_or(default.seed),
            logit_bias,
            logprobs: wire.logprobs,
            max_tokens: wire.max_tokens.unwrap_or(default.max_tokens),
            ignore_eos: wire.ignore_eos,
            grammar: wire.grammar.map(Into::into),
        };
        match params.validate() {
            Ok(()) => Ok(params),
            Err(error) => {
                let problem = format!("{} was given; it must be {}", error.value, error.range);
                Err(ConvertError::Invalid {
                    field: error.field,
                    problem,
                })
            }
        }
    }
}

impl From<TokenLogprobs> for v1::TokenLogprobs {
    fn from(logprobs: TokenLogprobs) -> Self {
        let top = logprobs.top.into_iter();
        Self {
            logprob: logprobs.logprob,
            top: top
                .map(|(token, logprob)| v1::TokenAlternative { token, logprob })
                .collect(),
        }
    }
}

impl From<v1::TokenLogprobs> for TokenLogprobs {
    fn from(wire: v1::TokenLogprobs) -> Self {
        Self {
            logprob: wire.logprob,
            top: wire.top.into_iter().map(|rival| (rival.token, rival.logprob)).collect(),
        }
    }
}

impl From<BlockCounts> for v1::BlockCounts {
    fn from(counts: BlockCounts) -> Self {
        let BlockCounts {
            total,
            free,
            cached,
            referenced,
            reserved,
            quarantined,
        } = counts;
        Self {
            total,
            free,
            cached,
            referenced,
            reserved,
            quarantined,
        }
    }
}

impl From<v1::BlockCounts> for BlockCounts {
    fn from(wire: v1::BlockCounts) -> Self {
        let v1::BlockCounts {
            total,
            free,
            cached,
            referenced,
            reserved,
            quarantined,
        } = wire;
        Self {
            total,
            free,
            cached,
            referenced,
            reserved,
            quarantined,
        }
    }
}

impl From<FinishReason> for v1::FinishReason {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
            FinishReason::Cancelled => Self::Cancelled,
        }
    }
}

/// Reads a finish reason; `None` where it is unset.
///
/// # Errors
/// Where it is a number that this build does not know.
pub fn finish_reason(wire: i32) -> Result<Option<FinishReason>, ConvertError> {
    match v1::FinishReason::try_from(wire) {
        Ok(v1::FinishReason::Unspecified) => Ok(None),
        Ok(v1::FinishReason::Stop) => Ok(Some(FinishReason::Stop)),
        Ok(v1::FinishReason::Length) => Ok(Some(FinishReason::Length)),
        Ok(v1::FinishReason::Cancelled) => Ok(Some(FinishReason::Cancelled)),
        Err(unknown) => Err(ConvertError::invalid("finish_reason", unknown)),
    }
}

impl From<NodeRole> for v1::NodeRole {
    fn from(role: NodeRole) -> Self {
        match role {
            NodeRole::Prefill => Self::Prefill,
            NodeRole::Decode => Self::Decode,
        }
    }
}

/// Reads a role, which is always set.
///
/// # Errors
/// Where it is unset, or a number that this build does not know.
pub fn node_role(wire: i32) -> Result<NodeRole, ConvertError> {
    match v1::NodeRole::try_from(wire) {
        Ok(v1::NodeRole::Prefill) => Ok(NodeRole::Prefill),
        Ok(v1::NodeRole::Decode) => Ok(NodeRole::Decode),
        Ok(v1::NodeRole::Unspecified) => Err(ConvertError::Missing { field: "role" }),
        Err(unknown) => Err(ConvertError::invalid("role", unknown)),
    }
}

/// Reads a node's state as heartbeats carry it.
///
/// # Errors
/// Where it is a word that this build does not know.
pub fn node_state(wire: &str) -> Result<NodeState, ConvertError> {
    match wire {
        "starting" => Ok(NodeState::Starting),
        "ready" => Ok(NodeState::Ready),
        "draining" => Ok(NodeState::Draining),
        other => Err(ConvertError::invalid(
            "state",
            format!("`{other}` is neither starting, ready nor draining"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_types::{Instance, ModelFingerprint, RequestId};
    use proptest::prelude::*;

    fn sampling() -> impl Strategy<Value = SamplingParams> {
        let floats = (
            0.0f32..=2.0,
            0.01f32..=1.0,
            0.0f32..=1.0,
            0.1f32..=2.0,
            -2.0f32..=2.0,
            -2.0f32..=2.0,
        );
        let bias = proptest::collection::btree_map(any::<u32>(), -100.0f32..=100.0, 0..4);
        let rest = (
            any::<u32>(),
            any::<u64>(),
            proptest::option::of(0u32..=20),
            1u32..,
            // A grammar, or none and whether to go on after the end.
            prop_oneof![
                any::<bool>().prop_map(Err),
                ".{0,8}".prop_map(|text| Ok(Grammar::JsonSchema(text))),
                ".{0,8}".prop_map(|text| Ok(Grammar::Regex(text))),
            ],
        );
        (floats, bias, rest).prop_map(
            |(f, bias, (top_k, seed, logprobs, max_tokens, ending))| SamplingParams {
                temperature: f.0,
                top_k,
                top_p: f.1,
                min_p: f.2,
                repetition_penalty: f.3,
                presence_penalty: f.4,
                frequency_penalty: f.5,
                seed,
                logit_bias: bias.into_iter().collect(),
                logprobs,
                max_tokens,
                ignore_eos: ending == Err(true),
                grammar: ending.ok(),
            },
        )
    }

    fn work() -> impl Strategy<Value = Work> {
        let ids = (
            any::<u128>(),
            any::<u128>(),
            1u32..,
            any::<u64>(),
            any::<[u8; 32]>(),
            any::<u64>(),
        );
        let tokens = (
            proptest::collection::vec(any::<u32>(), 1..8),
            proptest::collection::vec(any::<u32>(), 0..8),
        );
        let hashes = (proptest::collection::vec(any::<[u8; 16]>(), 0..3), any::<String>());
        (ids, tokens, hashes, sampling()).prop_map(|(ids, (prompt, generated), (hashes, salt), sampling)| Work {
            request_id: RequestId(ids.0),
            ticket: Ticket(ids.1),
            attempt: Attempt(ids.2),
            prompt,
            generated,
            sampling,
            block_hashes: hashes.into_iter().map(BlockHash).collect(),
            cache_salt: salt,
            budget: Budget::from_us(ids.3),
            coordinator: Instance(ids.5),
            fingerprint: ModelFingerprint(ids.4),
        })
    }

    proptest! {
        #[test]
        fn work_survives_the_wire(work in work()) {
            prop_assert_eq!(Work::try_from(v1::Work::from(work.clone())), Ok(work));
        }
    }

    fn good() -> v1::Work {
        v1::Work::from(Work {
            request_id: RequestId(1),
            ticket: Ticket(2),
            attempt: Attempt::FIRST,
            prompt: vec![1],
            generated: Vec::new(),
            sampling: SamplingParams::default(),
            block_hashes: Vec::new(),
            cache_salt: String::new(),
            budget: Budget::from_us(9),
            coordinator: Instance(3),
            fingerprint: ModelFingerprint([4; 32]),
        })
    }

    #[test]
    fn every_bad_field_is_named() {
        let bad = |change: fn(&mut v1::Work)| {
            let mut wire = good();
            change(&mut wire);
            Work::try_from(wire).map_err(|error| error.field()).map(|_| ())
        };
        assert_eq!(bad(|_| ()), Ok(()));
        assert_eq!(bad(|w| w.request_id = "x".into()), Err("request_id"));
        assert_eq!(bad(|w| w.ticket = Bytes::from_static(b"short")), Err("ticket"));
        assert_eq!(bad(|w| w.attempt = 0), Err("attempt"));
        assert_eq!(bad(|w| w.prompt.clear()), Err("prompt"));
        assert_eq!(bad(|w| w.sampling = None), Err("sampling"));
        assert_eq!(bad(|w| w.block_hashes.push(Bytes::new())), Err("block_hashes"));
        assert_eq!(bad(|w| w.coordinator_instance.clear()), Err("coordinator_instance"));
        assert_eq!(bad(|w| w.model_fingerprint.clear()), Err("model_fingerprint"));
        assert_eq!(bad(|w| w.sampling.as_mut().unwrap().seed = None), Err("sampling.seed"));
        assert_eq!(
            bad(|w| w.sampling.as_mut().unwrap().max_tokens = None),
            Err("sampling.max_tokens")
        );
        assert_eq!(
            bad(|w| w.sampling.as_mut().unwrap().temperature = Some(-1.0)),
            Err("temperature")
        );
    }

    #[test]
    fn enumerations_are_read_strictly() {
        assert_eq!(finish_reason(0), Ok(None));
        assert_eq!(
            finish_reason(v1::FinishReason::from(FinishReason::Length) as i32),
            Ok(Some(FinishReason::Length))
        );
        assert!(finish_reason(77).is_err());
        assert_eq!(
            node_role(v1::NodeRole::from(NodeRole::Decode) as i32),
            Ok(NodeRole::Decode)
        );
        assert_eq!(node_role(0).map_err(|e| e.field()), Err("role"));
        assert_eq!(node_state(&NodeState::Draining.to_string()), Ok(NodeState::Draining));
        assert!(node_state("lost").is_err());
    }
}
