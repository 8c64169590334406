//! How tokens are drawn.

use crate::{GRAMMAR_BYTES_MAX, Grammar};
use serde::{Deserialize, Serialize};

/// Resolved sampling parameters: every default is filled in. State (penalties, counts) derives from prompt and
/// generated tokens alone, so none of it travels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 is greedy. 0..=2.
    pub temperature: f32,
    /// Keep the k most likely; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set that reaches this probability. (0, 1].
    pub top_p: f32,
    /// Drop tokens below this times the most likely one's probability. 0..=1.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output. (0, 2].
    pub repetition_penalty: f32,
    /// Subtracted once from tokens that were generated. -2..=2.
    pub presence_penalty: f32,
    /// Subtracted per occurrence among generated tokens. -2..=2.
    pub frequency_penalty: f32,
    /// Token i is drawn by a generator keyed by (seed, i).
    pub seed: u64,
    /// Added to logits, by token id. -100..=100 each.
    pub logit_bias: Vec<(u32, f32)>,
    /// Alternatives to report beside the chosen token's log probability; `None` reports nothing. At most 20.
    pub logprobs: Option<u32>,
    /// At most this many tokens.
    pub max_tokens: u32,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// What the output must be. Its end is an end-of-sequence token.
    pub grammar: Option<Grammar>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logit_bias: Vec::new(),
            logprobs: None,
            max_tokens: u32::MAX,
            ignore_eos: false,
            grammar: None,
        }
    }
}

/// A parameter out of its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field} is {value}; it must be {range}")]
pub struct InvalidSampling {
    /// The parameter's name.
    pub field: &'static str,
    /// What was given.
    pub value: String,
    /// What is allowed.
    pub range: &'static str,
}

impl SamplingParams {
    /// Checks every range.
    ///
    /// # Errors
    /// The first parameter that is out of its range, by name.
    pub fn validate(&self) -> Result<(), InvalidSampling> {
        let within = |field, value: f32, ok: bool, range| {
            if ok {
                Ok(())
            } else {
                Err(InvalidSampling {
                    field,
                    value: value.to_string(),
                    range,
                })
            }
        };
        let t = self.temperature;
        within("temperature", t, (0.0..=2.0).contains(&t), "between 0 and 2")?;
        let p = self.top_p;
        within("top_p", p, p > 0.0 && p <= 1.0, "above 0 and at most 1")?;
        within(
            "min_p",
            self.min_p,
            (0.0..=1.0).contains(&self.min_p),
            "between 0 and 1",
        )?;
        let r = self.repetition_penalty;
        within("repetition_penalty", r, r > 0.0 && r <= 2.0, "above 0 and at most 2")?;
        let p = self.presence_penalty;
        within("presence_penalty", p, (-2.0..=2.0).contains(&p), "between -2 and 2")?;
        let f = self.frequency_penalty;
        within("frequency_penalty", f, (-2.0..=2.0).contains(&f), "between -2 and 2")?;
        for (_, bias) in &self.logit_bias {
            within(
                "logit_bias",
                *bias,
                (-100.0..=100.0).contains(bias),
                "between -100 and 100",
            )?;
        }
        let n = self.logprobs.unwrap_or(0);
        within("logprobs", n as f32, n <= 20, "at most 20")?;
        within("max_tokens", self.max_tokens as f32, self.max_tokens > 0, "at least 1")?;
        self.validate_grammar()
    }

    /// What can be said of a grammar without reading it.
    fn validate_grammar(&self) -> Result<(), InvalidSampling> {
        let Some(grammar) = &self.grammar else { return Ok(()) };
        let invalid = |field, value: String, range| Err(InvalidSampling { field, value, range });
        if self.ignore_eos {
            let range = "false where a grammar says when the output ends";
            return invalid("ignore_eos", "true".into(), range);
        }
        let bytes = grammar.text().len();
        if bytes > GRAMMAR_BYTES_MAX {
            return invalid(
                grammar.field(),
                format!("{bytes} bytes long"),
                "at most 65536 bytes long",
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_range_is_checked() {
        assert_eq!(SamplingParams::default().validate(), Ok(()));
        let bad = |change: fn(&mut SamplingParams)| {
            let mut params = SamplingParams::default();
            change(&mut params);
            params.validate().map_err(|e| e.field)
        };
        assert_eq!(bad(|p| p.temperature = -1.0), Err("temperature"));
        assert_eq!(bad(|p| p.temperature = f32::NAN), Err("temperature"));
        assert_eq!(bad(|p| p.top_p = 0.0), Err("top_p"));
        assert_eq!(bad(|p| p.logit_bias = vec![(1, 101.0)]), Err("logit_bias"));
        assert_eq!(bad(|p| p.max_tokens = 0), Err("max_tokens"));
        assert_eq!(bad(|p| p.logprobs = Some(21)), Err("logprobs"));
        let regex = |bytes: usize| Some(Grammar::Regex("x".repeat(bytes)));
        let mut params = SamplingParams {
            grammar: regex(GRAMMAR_BYTES_MAX),
            ..SamplingParams::default()
        };
        assert_eq!(params.validate(), Ok(()));
        params.ignore_eos = true;
        assert_eq!(params.validate().map_err(|e| e.field), Err("ignore_eos"));
        params = SamplingParams {
            grammar: regex(GRAMMAR_BYTES_MAX + 1),
            ..SamplingParams::default()
        };
        let error = params.validate().unwrap_err().to_string();
        assert_eq!(error, "regex is 65537 bytes long; it must be at most 65536 bytes long");
    }
}
