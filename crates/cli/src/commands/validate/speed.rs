//! How fast the machine is now, against when it was profiled: a plan cannot be nearer than that.

use super::super::profile::{ask, median, prompt_seconds};
use anyhow::{Context, Result};
use baton_load::{Observed, Target};
use baton_planner::profile::Profile;
use serde::{Deserialize, Serialize};

/// Requests one by one, on an idle cluster.
const PROBES: u64 = 9;
/// Tokens of each prompt, where the profile covers them.
const PROMPT: u32 = 256;
/// Tokens of each answer.
const OUTPUT: u32 = 34;
/// Beyond this the machine is another one than the profile's.
pub const CHANGED: f64 = 0.1;

/// How many times as long as by the profile things take, at the median.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    pub prompts: f64,
    pub steps: f64,
}

impl Speed {
    /// Measures it. `salt` makes the prompts other ones than those of other times.
    pub async fn measure(target: &Target, profile: &Profile, salt: u64) -> Result<Self> {
        let length = PROMPT.min(profile.coverage().new_tokens.1 as u32);
        let (mut prompts, mut steps) = (Vec::new(), Vec::new());
        for probe in 0..PROBES {
            let observed = ask(target, (salt << 16) + (1 << 33) + probe, length, OUTPUT).await?;
            let computing = observed.timeline.as_ref().map_or(0, |timeline| timeline.prefill_us);
            prompts.push(computing as f64 / 1e6 / prompt_seconds(&profile.prefill, profile.chunk_tokens, length)?);
            let by_profile = profile
                .decode
                .at(1.0, f64::from(length + OUTPUT / 2), ["batch", "context"])?;
            let step = step(&observed).context("a probe had too short an answer to time its steps")?;
            steps.push(step / by_profile);
        }
        Ok(Self {
            prompts: median(prompts),
            steps: median(steps),
        })
    }

    /// What is farthest from the profile of several.
    pub fn worst(of: &[Self]) -> Self {
        let far = |what: fn(&Self) -> f64| {
            of.iter()
                .map(what)
                .max_by(|a, b| (a - 1.0).abs().total_cmp(&(b - 1.0).abs()))
                .unwrap_or(1.0)
        };
        Self {
            prompts: far(|speed| speed.prompts),
            steps: far(|speed| speed.steps),
        }
    }

    /// It differs from the profile's by more than it may.
    pub fn is_changed(self) -> bool {
        [self.prompts, self.steps]
            .iter()
            .any(|times| (times - 1.0).abs() > CHANGED)
    }
}

/// Mean seconds of a step behind the second frame, which may come with a hand-over.
fn step(observed: &Observed) -> Option<f64> {
    let [_, second, later @ ..] = &observed.frames[..] else {
        return None;
    };
    let count: u32 = later.iter().map(|frame| frame.tokens).sum();
    let took = later.last()?.at.saturating_sub(second.at).as_secs_f64();
    Some(took / f64::from(count))
}
