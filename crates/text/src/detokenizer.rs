//! Token ids to text, one at a time.
/// Turns a stream of token ids into text.
#[derive(Debug, Clone)]
pub struct Detokenizer;
impl Detokenizer {
    /// Takes the next token; gives the characters that are whole now.
    pub fn push(&mut self, _token: u32) -> String { todo!() }
    /// The end: an incomplete character becomes U+FFFD.
    pub fn finish(&mut self) -> String { todo!() }
}
