//! Token ids to text, one at a time. A token may end in the middle of a character: its bytes wait here until the rest has
//! come. Invariant: all texts of `push`, then `finish`, are together what decoding all tokens at once gives.

use std::sync::Arc;

/// The bytes of every token, in one piece of memory, and what the decoder does besides joining them.
#[derive(Debug)]
pub(crate) struct TokenBytes {
    bytes: Vec<u8>,
    /// Token i is `bytes[starts[i]..starts[i + 1]]`.
    starts: Vec<u32>,
    special: Vec<bool>,
    /// Spaces to take from the start of a text.
    strip_left: usize,
}

impl TokenBytes {
    /// From (bytes, special) of each token id from 0 on.
    pub(crate) fn new<'a>(tokens: impl Iterator<Item = (&'a [u8], bool)>, strip_left: usize) -> Self {
        let mut table = Self {
            bytes: Vec::new(),
            starts: vec![0],
            special: Vec::new(),
            strip_left,
        };
        for (bytes, special) in tokens {
            table.bytes.extend_from_slice(bytes);
            table.starts.push(u32::try_from(table.bytes.len()).unwrap_or(u32::MAX));
            table.special.push(special);
        }
        table
    }

    /// Of any token, special or not; empty for an id that the tokenizer does not have.
    pub(crate) fn of(&self, token: u32) -> &[u8] {
        let range = |i: usize| Some(*self.starts.get(i)? as usize..*self.starts.get(i + 1)? as usize);
        range(token as usize)
            .and_then(|range| self.bytes.get(range))
            .unwrap_or_default()
    }

    pub(crate) fn is_special(&self, token: u32) -> bool {
        self.special.get(token as usize).copied().unwrap_or(false)
    }
}

/// Turns one generation's token ids into text. Special tokens and ids that the tokenizer does not have give no text.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    table: Arc<TokenBytes>,
    /// The start of a character that is not complete: at most 3 bytes.
    held: Vec<u8>,
    strip_left: usize,
}

impl Detokenizer {
    pub(crate) fn new(table: Arc<TokenBytes>) -> Self {
        let strip_left = table.strip_left;
        Self {
            table,
            held: Vec::new(),
            strip_left,
        }
    }

    /// Takes the next token; gives the characters that are whole now. Bytes that no character can begin or contain become
    /// U+FFFD.
    pub fn push(&mut self, token: u32) -> String {
        if self.table.is_special(token) {
            return String::new();
        }
        let mut bytes = self.table.of(token);
        while self.strip_left > 0 && !bytes.is_empty() {
            match bytes.strip_prefix(b" ") {
                Some(rest) => {
                    bytes = rest;
                    self.strip_left -= 1;
                }
                None => self.strip_left = 0,
            }
        }
        self.held.extend_from_slice(bytes);
        self.take_whole()
    }

    /// The end of the generation: an incomplete character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.held);
        String::from_utf8_lossy(&rest).into_owned()
    }

    fn take_whole(&mut self) -> String {
        let mut text = String::with_capacity(self.held.len());
        let mut rest = self.held.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(whole) => {
                    text.push_str(whole);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, tail) = rest.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).expect("the bytes before valid_up_to are valid"));
                    rest = tail;
                    let Some(wrong) = error.error_len() else { break };
                    text.push('\u{FFFD}');
                    rest = &rest[wrong..];
                }
            }
        }
        let keep = rest.len();
        self.held.drain(..self.held.len() - keep);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn detokenizer(tokens: &[Vec<u8>], strip_left: usize) -> Detokenizer {
        let table = TokenBytes::new(tokens.iter().map(|bytes| (bytes.as_slice(), false)), strip_left);
        Detokenizer::new(Arc::new(table))
    }

    fn all(detokenizer: &mut Detokenizer, count: u32) -> Vec<String> {
        let mut texts: Vec<String> = (0..count).map(|token| detokenizer.push(token)).collect();
        texts.push(detokenizer.finish());
        texts
    }

    #[test]
    fn a_character_in_four_tokens_comes_whole() {
        let tokens: Vec<Vec<u8>> = "😀".bytes().map(|byte| vec![byte]).collect();
        assert_eq!(all(&mut detokenizer(&tokens, 0), 4), ["", "", "", "😀", ""]);
    }

    #[test]
    fn an_incomplete_character_ends_as_replacement() {
        let tokens = vec![b"a\xE2\x82".to_vec()];
        assert_eq!(all(&mut detokenizer(&tokens, 0), 1), ["a", "\u{FFFD}"]);
    }

    #[test]
    fn leading_space_is_taken_once() {
        let tokens = vec![b"".to_vec(), b" a".to_vec(), b" b".to_vec()];
        assert_eq!(all(&mut detokenizer(&tokens, 1), 3).concat(), "a b");
    }

    #[test]
    fn unknown_and_special_tokens_give_nothing() {
        let table = TokenBytes::new([(b"<s>".as_slice(), true)].into_iter(), 0);
        let mut detokenizer = Detokenizer::new(Arc::new(table));
        assert_eq!(
            detokenizer.push(0) + &detokenizer.push(7) + &detokenizer.push(u32::MAX),
            ""
        );
        assert_eq!(detokenizer.table.of(0), b"<s>");
    }

    proptest! {
        #[test]
        fn pushes_and_finish_are_the_lossy_text_of_all_bytes(
            tokens in prop::collection::vec(prop::collection::vec(
                prop_oneof![any::<u8>(), Just(0xE2), Just(0x82), Just(0xAC), Just(0xF0), Just(0x9F)], 0..5), 0..40)
        ) {
            let expected = String::from_utf8_lossy(&tokens.concat()).into_owned();
            let count = u32::try_from(tokens.len()).expect("few");
            prop_assert_eq!(all(&mut detokenizer(&tokens, 0), count).concat(), expected);
        }
    }
}
