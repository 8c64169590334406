//! Tokens to text as they come, with stop strings. Tokens beyond a stop string are neither shown nor counted.

use crate::Chunk;
use crate::core::TokenBatch;
use baton_text::{Detokenizer, StopFinder};

/// The text of one answer.
pub(super) struct TextStage {
    detokenizer: Detokenizer,
    stops: Option<StopFinder>,
    shown_tokens: usize,
    stopped: bool,
}

impl TextStage {
    pub(super) fn new(detokenizer: Detokenizer, stops: Vec<String>) -> Self {
        let stops = (!stops.is_empty()).then(|| StopFinder::new(stops));
        Self {
            detokenizer,
            stops,
            shown_tokens: 0,
            stopped: false,
        }
    }

    /// Where a stop string was found: how many tokens count.
    pub(super) fn stopped(&self) -> Option<usize> {
        self.stopped.then_some(self.shown_tokens)
    }

    /// What to show of these tokens: `None` where a stop string came before them.
    pub(super) fn push(&mut self, mut batch: TokenBatch) -> Option<Chunk> {
        if self.stopped {
            return None;
        }
        let mut text = String::new();
        for at in 0..batch.tokens.len() {
            let new = self.detokenizer.push(batch.tokens[at]);
            if self.show(&new, &mut text) {
                batch.tokens.truncate(at + 1);
                batch.logprobs.truncate(at + 1);
                break;
            }
        }
        self.shown_tokens += batch.tokens.len();
        let first_index = u32::try_from(batch.first_index).unwrap_or(u32::MAX);
        Some(Chunk {
            text,
            tokens: batch.tokens,
            logprobs: batch.logprobs,
            first_index,
        })
    }

    /// The end: what was held back, where there is any.
    pub(super) fn finish(&mut self) -> Option<Chunk> {
        let mut text = String::new();
        if !self.stopped {
            let rest = self.detokenizer.finish();
            if !self.show(&rest, &mut text)
                && let Some(stops) = &mut self.stops
            {
                text.push_str(&stops.finish());
            }
        }
        let first_index = u32::try_from(self.shown_tokens).unwrap_or(u32::MAX);
        (!text.is_empty()).then(|| Chunk {
            text,
            first_index,
            ..Chunk::default()
        })
    }

    /// Appends what may be shown of `new`; true where a stop string ends it.
    fn show(&mut self, new: &str, text: &mut String) -> bool {
        match &mut self.stops {
            None => text.push_str(new),
            Some(stops) => {
                let outcome = stops.push(new);
                text.push_str(&outcome.text);
                self.stopped = outcome.stopped;
            }
        }
        self.stopped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_text::{EngineFacts, ModelCard, Tokenizer};
    use baton_types::{KvDtype, ModelFingerprint, NumericsId};

    fn stage(stops: &[&str]) -> TextStage {
        let engine = EngineFacts {
            fingerprint: ModelFingerprint([1; 32]),
            numerics: NumericsId("stub".into()),
            block_tokens: 16,
            kv_dtype: KvDtype::F16,
        };
        let tokenizer = Tokenizer::new(&ModelCard::stub("stub", 64, engine)).unwrap();
        TextStage::new(
            tokenizer.detokenizer(),
            stops.iter().map(|stop| (*stop).to_owned()).collect(),
        )
    }

    fn batch(first_index: usize, text: &str) -> TokenBatch {
        TokenBatch {
            first_index,
            tokens: text.bytes().map(u32::from).collect(),
            logprobs: Vec::new(),
        }
    }

    #[test]
    fn shows_whole_characters_and_the_rest_at_the_end() {
        let mut stage = stage(&[]);
        let euro = "a\u{20ac}".as_bytes();
        let part = |range: std::ops::Range<usize>| TokenBatch {
            first_index: range.start,
            tokens: euro[range].iter().map(|byte| u32::from(*byte)).collect(),
            logprobs: Vec::new(),
        };
        assert_eq!(stage.push(part(0..2)).map(|c| c.text).as_deref(), Some("a"));
        assert_eq!(stage.push(part(2..4)).map(|c| c.text).as_deref(), Some("\u{20ac}"));
        assert_eq!(stage.finish(), None);
        assert_eq!(stage.stopped(), None);
    }

    #[test]
    fn tokens_behind_a_stop_string_do_not_count() {
        let mut stage = stage(&["END"]);
        assert_eq!(stage.push(batch(0, "one E")).map(|c| c.text).as_deref(), Some("one "));
        let chunk = stage.push(batch(5, "ND two")).unwrap();
        assert_eq!((chunk.text.as_str(), chunk.tokens.len(), chunk.first_index), ("", 2, 5));
        assert_eq!(stage.stopped(), Some(7));
        assert_eq!(stage.push(batch(11, "more")), None);
        assert_eq!(stage.finish(), None);
    }

    #[test]
    fn what_was_held_back_in_vain_is_shown_at_the_end() {
        let mut stage = stage(&["END"]);
        assert_eq!(stage.push(batch(0, "EN")).map(|c| c.text).as_deref(), Some(""));
        let rest = stage.finish().unwrap();
        assert_eq!((rest.text.as_str(), rest.tokens.len(), rest.first_index), ("EN", 0, 2));
    }
}
