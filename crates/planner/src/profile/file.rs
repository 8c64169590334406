//! The profile as it is kept in a file.

use super::{Grid, ProfileError};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The only format that is read and written.
pub const FORMAT_VERSION: u32 = 4;

/// Where a profile's figures come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Computed from data sheets; nobody ran it.
    Estimated,
    /// Measured on a node.
    Measured,
}

/// The model that a profile is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelShape {
    /// Its name.
    pub name: String,
    /// Transformer layers: a last chunk's hand-over overlaps its compute layer by layer.
    pub layers: u32,
    /// Bytes of KV per token, all layers.
    pub kv_bytes_per_token: u64,
}

/// One way by which KV is handed over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoverPath {
    /// Its name, such as tcp.
    pub path: String,
    /// Rising sizes, bytes.
    pub bytes: Vec<f64>,
    /// Time of a push of each size, seconds.
    pub seconds: Vec<f64>,
}

/// The same steps while another node computes on the same machine: they share memory bandwidth and caches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contended {
    /// Beside a node that computes prompts.
    pub prefilling: Steps,
    /// Beside a node that decodes.
    pub decoding: Steps,
}

/// Steps of both sorts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Steps {
    /// As [`Profile::prefill`], at the same points.
    pub prefill: Grid,
    /// As [`Profile::decode`], at the same points.
    pub decode: Grid,
}

/// What hand-overs add to the gap between the first token and the second one. It goes by while what is left is sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoverTail {
    /// Whatever the size, where the prefill node has nothing else to do: seconds, rising, each for as many hand-overs as the others.
    pub idle: Vec<f64>,
    /// The same where it goes on with other prompts.
    pub busy: Vec<f64>,
    /// And for each byte of the prompt's KV, seconds: the decode node's first step reads what it never touched before.
    pub seconds_per_byte: f64,
}

impl HandoverTail {
    /// The same for all.
    pub fn always(seconds: f64) -> Self {
        Self {
            idle: vec![seconds],
            busy: vec![seconds],
            seconds_per_byte: 0.0,
        }
    }
}

/// How far measurements were from what the profile says, relative.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Residual {
    /// Of which table.
    pub table: String,
    /// Half of the measurements were nearer.
    pub p50: f64,
    /// Nine of ten were nearer.
    pub p90: f64,
    /// How many measurements.
    pub count: u32,
}

/// How far a plan's prediction was from what a cluster then did, relative.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorBar {
    /// Which figure, such as `ttft_p90`.
    pub metric: String,
    /// (predicted - measured) / measured.
    pub error: f64,
    /// What was run.
    pub run: String,
}

/// A profile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// [`FORMAT_VERSION`].
    pub version: u32,
    /// What it is called.
    pub name: String,
    /// Estimated or measured.
    pub kind: Kind,
    /// Where the figures come from.
    pub sources: Vec<String>,
    /// What the node is, such as h100.
    pub hardware: String,
    /// The model that it serves.
    pub model: ModelShape,
    /// Tokens of one KV block.
    pub block_tokens: u32,
    /// Prompt tokens of one step.
    pub chunk_tokens: u32,
    /// Tokens whose KV fits.
    pub kv_capacity_tokens: u64,
    /// Requests that may wait at a node.
    pub queue_max: u32,
    /// Prompts that a prefill node may have in hand at once.
    pub prefill_running_max: u32,
    /// Seconds of one step that computes x new prompt tokens behind y that are there: `x` new, `y` context.
    pub prefill: Grid,
    /// Seconds of one step that decodes x sequences of y tokens in all: `x` batch, `y` total context.
    pub decode: Grid,
    /// What a step that does both saves over the two steps apart, seconds: weights are read once.
    pub mixed_saves_s: f64,
    /// Ways to hand KV over, the preferred first.
    pub handover: Vec<HandoverPath>,
    /// What hand-overs add to the first gap.
    pub handover_tail: HandoverTail,
    /// Where nodes share a machine: the steps beside a neighbour that computes all the time. What is in `prefill` and `decode` was
    /// measured alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contended: Option<Contended>,
    /// What the coordinator and the network add to a first token, seconds.
    pub request_overhead_s: f64,
    /// From the start of a process until it takes work, seconds.
    pub startup_s: f64,
    /// From the order to change the role until it takes work again, without draining, seconds.
    pub role_change_s: f64,
    /// From the order to leave until an empty node is no member any more, seconds.
    pub drain_s: f64,
    /// How far measurements were from the tables.
    pub residuals: Vec<Residual>,
    /// How far plans were from clusters.
    pub error_bars: Vec<ErrorBar>,
}

/// What every version has.
#[derive(Deserialize)]
struct Head {
    version: u32,
}

/// What a profile covers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Coverage {
    /// New prompt tokens of one step.
    pub new_tokens: (f64, f64),
    /// Tokens before them.
    pub context_tokens: (f64, f64),
    /// Sequences of one decode step.
    pub batch: (f64, f64),
    /// Tokens of all of them.
    pub total_context_tokens: (f64, f64),
}

impl Profile {
    /// Reads and checks one.
    ///
    /// # Errors
    /// The first field that makes no sense, by name.
    pub fn read(path: &Path) -> Result<Self, ProfileError> {
        let text = std::fs::read_to_string(path).map_err(|source| ProfileError::Read {
            path: path.to_owned(),
            source,
        })?;
        // Of another version, other fields are there: the version is what is wrong with it.
        let wrong = |source| ProfileError::Syntax {
            path: path.to_owned(),
            source,
        };
        let Head { version } = serde_json::from_str(&text).map_err(wrong)?;
        if version != FORMAT_VERSION {
            return Err(ProfileError::Version {
                name: path.display().to_string(),
                version,
                expected: FORMAT_VERSION,
            });
        }
        let profile: Self = serde_json::from_str(&text).map_err(wrong)?;
        profile.check()?;
        Ok(profile)
    }

    /// Keeps it in a file.
    ///
    /// # Errors
    /// Where that cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), ProfileError> {
        std::fs::write(path, self.to_json() + "\n").map_err(|source| ProfileError::Write {
            path: path.to_owned(),
            source,
        })
    }

    /// As text to be kept in a file.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("all keys are strings, and no value refuses")
    }

    /// Checks each field.
    ///
    /// # Errors
    /// The first that makes no sense, by name.
    pub fn check(&self) -> Result<(), ProfileError> {
        if self.version != FORMAT_VERSION {
            return Err(ProfileError::Version {
                name: self.name.clone(),
                version: self.version,
                expected: FORMAT_VERSION,
            });
        }
        let wrong = |field: &str, reason: &str| ProfileError::Field {
            name: self.name.clone(),
            field: field.to_owned(),
            reason: reason.to_owned(),
        };
        for (field, grid) in [("prefill", &self.prefill), ("decode", &self.decode)] {
            if let Some(fault) = grid.fault() {
                return Err(wrong(&format!("{field}{fault}"), ""));
            }
        }
        if let Some(contended) = &self.contended {
            let same = |a: &Grid, b: &Grid| a.x == b.x && a.y == b.y;
            let (prefilling, decoding) = (&contended.prefilling, &contended.decoding);
            for (field, grid, alone) in [
                ("contended.prefilling.prefill", &prefilling.prefill, &self.prefill),
                ("contended.prefilling.decode", &prefilling.decode, &self.decode),
                ("contended.decoding.prefill", &decoding.prefill, &self.prefill),
                ("contended.decoding.decode", &decoding.decode, &self.decode),
            ] {
                if let Some(fault) = grid.fault() {
                    return Err(wrong(&format!("{field}{fault}"), ""));
                }
                if !same(grid, alone) {
                    return Err(wrong(
                        field,
                        "must have the points of the table that was measured alone",
                    ));
                }
            }
        }
        let counts = [
            ("block_tokens", u64::from(self.block_tokens)),
            ("chunk_tokens", u64::from(self.chunk_tokens)),
            ("kv_capacity_tokens", self.kv_capacity_tokens),
            ("queue_max", u64::from(self.queue_max)),
            ("prefill_running_max", u64::from(self.prefill_running_max)),
            ("model.layers", u64::from(self.model.layers)),
            ("model.kv_bytes_per_token", self.model.kv_bytes_per_token),
        ];
        if let Some((field, _)) = counts.iter().find(|(_, count)| *count == 0) {
            return Err(wrong(field, "must be at least 1"));
        }
        if !self.chunk_tokens.is_multiple_of(self.block_tokens) {
            return Err(wrong("chunk_tokens", "must be a multiple of block_tokens"));
        }
        let times = [
            ("mixed_saves_s", self.mixed_saves_s),
            ("request_overhead_s", self.request_overhead_s),
            ("startup_s", self.startup_s),
            ("role_change_s", self.role_change_s),
            ("drain_s", self.drain_s),
            ("handover_tail.seconds_per_byte", self.handover_tail.seconds_per_byte),
        ];
        if let Some((field, _)) = times.iter().find(|(_, s)| !s.is_finite() || *s < 0.0) {
            return Err(wrong(field, "must be seconds of at least 0"));
        }
        for (field, parts) in [
            ("handover_tail.idle", &self.handover_tail.idle),
            ("handover_tail.busy", &self.handover_tail.busy),
        ] {
            let times = parts.iter().all(|s| s.is_finite() && *s >= 0.0);
            if parts.is_empty() || !times || !parts.is_sorted() {
                return Err(wrong(field, "must be one or more seconds of at least 0, rising"));
            }
        }
        if self.handover.is_empty() {
            return Err(wrong("handover", "names no path"));
        }
        for path in &self.handover {
            let sizes = path.bytes.len() >= 2 && path.bytes.is_sorted_by(|a, b| a < b);
            let times =
                path.seconds.len() == path.bytes.len() && path.seconds.iter().all(|s| s.is_finite() && *s >= 0.0);
            if !sizes || !times {
                let field = format!("handover.{}", path.path);
                return Err(wrong(
                    &field,
                    "must have two or more rising sizes, and seconds for each",
                ));
            }
        }
        Ok(())
    }

    /// Makes all steps take so many times as long.
    pub fn scale_steps(&mut self, times: f64) {
        let contended = self.contended.iter_mut();
        let beside = contended.flat_map(|c| [&mut c.prefilling, &mut c.decoding]);
        let beside = beside.flat_map(|steps| [&mut steps.prefill, &mut steps.decode]);
        let all = [&mut self.prefill, &mut self.decode].into_iter().chain(beside);
        all.for_each(|grid| grid.scale(times));
        self.mixed_saves_s *= times;
    }

    /// Refuses to speak for another model.
    ///
    /// # Errors
    /// Where it is of another one.
    pub fn check_model(&self, wanted: &str) -> Result<(), ProfileError> {
        if self.model.name.eq_ignore_ascii_case(wanted) {
            return Ok(());
        }
        Err(ProfileError::OtherModel {
            name: self.name.clone(),
            found: self.model.name.clone(),
            wanted: wanted.to_owned(),
        })
    }

    /// What it covers.
    pub fn coverage(&self) -> Coverage {
        let ends = |axis: &[f64]| (axis[0], axis[axis.len() - 1]);
        Coverage {
            new_tokens: ends(&self.prefill.x),
            context_tokens: ends(&self.prefill.y),
            batch: ends(&self.decode.x),
            total_context_tokens: ends(&self.decode.y),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{estimate, gpu, model};
    use super::*;

    #[test]
    fn a_profile_survives_its_file_and_bad_fields_are_named() {
        let profile = estimate(gpu("h100").unwrap(), model("llama-3.1-8b").unwrap()).unwrap();
        profile.check().unwrap();
        let again: Profile = serde_json::from_str(&profile.to_json()).unwrap();
        assert_eq!(again, profile);
        let wrong = |change: fn(&mut Profile)| {
            let mut profile = profile.clone();
            change(&mut profile);
            profile.check().unwrap_err().to_string()
        };
        assert!(wrong(|p| p.version = 9).contains("format version 9"));
        assert!(wrong(|p| p.kv_capacity_tokens = 0).contains("kv_capacity_tokens must be at least 1"));
        assert!(wrong(|p| p.decode.x.reverse()).contains("decode.x must be rising"));
        assert!(wrong(|p| p.handover.clear()).contains("handover names no path"));
        assert!(wrong(|p| p.startup_s = -1.0).contains("startup_s"));
        assert!(wrong(|p| p.chunk_tokens = 17).contains("chunk_tokens"));
        let other = profile.check_model("qwen3-8b").unwrap_err().to_string();
        assert!(
            other.contains("is of the model llama-3.1-8b, but the plan is for qwen3-8b"),
            "{other}"
        );
        let unknown = serde_json::from_str::<Profile>("{\"kv\": 3}").unwrap_err().to_string();
        assert!(unknown.contains("unknown field `kv`"), "{unknown}");
    }
}
