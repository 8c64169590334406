//! A profile made ready to be asked often.

use super::{Contended, DecodeRow, Grid, HandoverTail, OutOfRange, Profile, Steps, grid};

const PREFILL: [&str; 2] = ["prefill.new_tokens", "prefill.context_tokens"];
const DECODE_CONTEXT: &str = "decode.total_context_tokens";
const DECODE_BATCH: &str = "decode.batch";

/// What the other nodes of a machine do meanwhile; of several, what slows down the most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Neighbour {
    /// Nothing, or there is none.
    #[default]
    Idle,
    /// It only decodes.
    Decoding,
    /// It computes prompts.
    Prefilling,
}

/// How long one kind of node takes for what.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeModel {
    /// The profile's name.
    pub name: String,
    /// Tokens of one KV block.
    pub block_tokens: u32,
    /// Prompt tokens of one step.
    pub chunk_tokens: u32,
    /// KV blocks.
    pub blocks: u32,
    /// Requests that may wait.
    pub queue_max: u32,
    /// Prompts that a prefill node may have in hand.
    pub prefill_running_max: u32,
    /// Bytes of one KV block.
    pub block_bytes: u64,
    /// Layers.
    pub layers: u32,
    /// Added to a first token, seconds.
    pub request_overhead_s: f64,
    /// From its start until it takes work, seconds.
    pub startup_s: f64,
    /// From being empty in one role until it takes work in the other, seconds.
    pub role_change_s: f64,
    /// From being empty until it is paid no more, seconds.
    pub drain_s: f64,
    alone: Steps,
    /// Where it may have neighbours.
    contended: Option<Contended>,
    mixed_saves_s: f64,
    handover: Grid,
    handover_tail: HandoverTail,
}

impl NodeModel {
    /// Of a checked profile, over its first path.
    pub fn new(profile: &Profile) -> Self {
        let path = &profile.handover[0];
        let blocks = profile.kv_capacity_tokens / u64::from(profile.block_tokens);
        Self {
            name: profile.name.clone(),
            block_tokens: profile.block_tokens,
            chunk_tokens: profile.chunk_tokens,
            blocks: u32::try_from(blocks).unwrap_or(u32::MAX),
            queue_max: profile.queue_max,
            prefill_running_max: profile.prefill_running_max,
            block_bytes: u64::from(profile.block_tokens) * profile.model.kv_bytes_per_token,
            layers: profile.model.layers,
            handover_tail: profile.handover_tail.clone(),
            request_overhead_s: profile.request_overhead_s,
            startup_s: profile.startup_s,
            role_change_s: profile.role_change_s,
            drain_s: profile.drain_s,
            alone: Steps {
                prefill: profile.prefill.clone(),
                decode: profile.decode.clone(),
            },
            contended: profile.contended.clone(),
            mixed_saves_s: profile.mixed_saves_s,
            handover: Grid {
                x: path.bytes.clone(),
                y: vec![0.0],
                seconds: path.seconds.iter().map(|s| vec![*s]).collect(),
            },
        }
    }

    /// Its steps beside such a neighbour: the same as alone where the profile knows none.
    fn steps(&self, beside: Neighbour) -> &Steps {
        match (&self.contended, beside) {
            (Some(contended), Neighbour::Prefilling) => &contended.prefilling,
            (Some(contended), Neighbour::Decoding) => &contended.decoding,
            (_, _) => &self.alone,
        }
    }

    /// Seconds of a step that computes parts of prompts, each `(new tokens, tokens before them)`. Several parts take as long as
    /// one of all their tokens with as many pairs of tokens to attend to.
    ///
    /// # Errors
    /// Outside the profile.
    pub fn prefill_step(&self, parts: &[(u32, u32)], beside: Neighbour) -> Result<f64, OutOfRange> {
        let prefill = &self.steps(beside).prefill;
        if let [(new, context)] = parts {
            return prefill.at(f64::from(*new), f64::from(*context), PREFILL);
        }
        let new: f64 = parts.iter().map(|(new, _)| f64::from(*new)).sum();
        let pairs: f64 = parts
            .iter()
            .map(|(new, context)| f64::from(*new) * (f64::from(*context) + f64::from(*new) / 2.0))
            .sum();
        prefill.at(new, (pairs / new - new / 2.0).max(0.0), PREFILL)
    }

    /// The decode step of so many sequences, over their tokens in all.
    ///
    /// # Errors
    /// Outside the profile.
    pub fn decode_row(&self, batch: u32, beside: Neighbour) -> Result<DecodeRow, OutOfRange> {
        let decode = &self.steps(beside).decode;
        let (i, across) = grid::place(&decode.x, f64::from(batch), DECODE_BATCH)?;
        let (low, high) = (&decode.seconds[i], decode.seconds.get(i + 1));
        let seconds = match high {
            Some(high) if across > 0.0 => low.iter().zip(high).map(|(l, h)| l + (h - l) * across).collect(),
            _ => low.clone(),
        };
        Ok(DecodeRow::new(batch, decode.y.clone(), seconds, DECODE_CONTEXT))
    }

    /// Seconds of a step that does both.
    pub fn mixed(&self, prefill_s: f64, decode_s: f64) -> f64 {
        (prefill_s + decode_s - self.mixed_saves_s).max(prefill_s.max(decode_s))
    }

    /// Seconds to push so many bytes.
    ///
    /// # Errors
    /// Outside the profile.
    pub fn handover(&self, bytes: u64) -> Result<f64, OutOfRange> {
        self.handover.at(bytes as f64, 0.0, ["handover.bytes", "handover"])
    }

    /// Seconds that the hand-over of a request with so many tokens adds to its first gap, whose prefill node goes on with other
    /// prompts or not. Which of the profile's times it is depends on the request alone.
    pub fn handover_tail(&self, request: u32, tokens: u32, busy: bool) -> f64 {
        let parts = match busy {
            true => &self.handover_tail.busy,
            false => &self.handover_tail.idle,
        };
        // Fibonacci hashing: neighbours are far apart.
        let hash = request.wrapping_mul(0x9E37_79B1);
        let part = parts[((u64::from(hash) * parts.len() as u64) >> 32) as usize];
        let bytes = f64::from(tokens) * self.block_bytes as f64 / f64::from(self.block_tokens);
        part + self.handover_tail.seconds_per_byte * bytes
    }

    /// Tokens of a prompt and its answer that the profile covers in any case.
    pub fn context_max(&self) -> f64 {
        let last = |axis: &[f64]| axis.last().copied().unwrap_or(0.0);
        last(&self.alone.prefill.y).min(last(&self.alone.decode.y))
    }

    /// KV blocks of so many tokens.
    pub fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }
}
