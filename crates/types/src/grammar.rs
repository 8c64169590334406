//! What an output must look like, and the sets of tokens that follow from it.

use serde::{Deserialize, Serialize};

/// Longest text of a grammar, bytes. It travels with every message that carries the request.
pub const GRAMMAR_BYTES_MAX: usize = 64 * 1024;

/// What an output must be as a whole. A matcher's state derives from this and the generated tokens, so none of it travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grammar {
    /// A JSON text that validates against this JSON schema, itself a JSON text.
    JsonSchema(String),
    /// A text that this regular expression, in the syntax of Rust's `regex` crate, matches from its start to its end.
    Regex(String),
}

impl Grammar {
    /// The schema or the expression.
    pub fn text(&self) -> &str {
        match self {
            Self::JsonSchema(text) | Self::Regex(text) => text,
        }
    }

    /// Its name among the sampling parameters.
    pub fn field(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "json_schema",
            Self::Regex(_) => "regex",
        }
    }
}

/// A set of token ids, as bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSet {
    words: Vec<u32>,
}

impl TokenSet {
    /// From bits: token `t` is in the set where bit `t % 32` of word `t / 32` is set.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// Whether `token` is in it. Ids beyond the last word are not.
    pub fn contains(&self, token: u32) -> bool {
        let word = self.words.get(token as usize / 32).copied().unwrap_or(0);
        word >> (token % 32) & 1 == 1
    }

    /// How many tokens are in it.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The words, for loops over all ids.
    pub fn words(&self) -> &[u32] {
        &self.words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_its_bits() {
        let set = TokenSet::from_words(vec![1 << 31 | 1, 0b100]);
        let members: Vec<u32> = (0..100).filter(|token| set.contains(*token)).collect();
        assert_eq!((members, set.count()), (vec![0, 31, 34], 3));
    }
}
