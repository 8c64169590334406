//! Text to token ids.
use crate::{ChatTemplate, Detokenizer, Message, ModelCard, TemplateError};
/// A text that cannot be tokenized, or a tokenizer that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The card's tokenizer is broken or of an unsupported kind.
    #[error("the model's tokenizer is unusable: {field}: {reason}")]
    Unusable {
        /// Part of tokenizer.json.
        field: &'static str,
        /// Why.
        reason: String,
    },
    /// The tokenizer refused the text.
    #[error("the text cannot be tokenized: {reason}")]
    Encode {
        /// Why.
        reason: String,
    },
    /// The chat cannot be rendered.
    #[error(transparent)]
    Template(#[from] TemplateError),
}
/// A model's tokenizer. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer;
impl Tokenizer {
    /// From a card.
    pub fn new(_card: &ModelCard) -> Result<Self, TextError> { todo!() }
    /// Token ids of a text. Special tokens' texts become special ids. `add_special`: begin with BOS where the model wants it.
    pub fn encode(&self, _text: &str, _add_special: bool) -> Result<Vec<u32>, TextError> { todo!() }
    /// Token ids of a chat, ready for generation. Only the template makes special tokens: their texts inside messages stay plain text.
    pub fn encode_chat(&self, _template: &ChatTemplate, _messages: &[Message], _add_generation_prompt: bool) -> Result<Vec<u32>, TextError> { todo!() }
    /// The text of token ids, without special tokens.
    pub fn decode(&self, _tokens: &[u32]) -> String { todo!() }
    /// The bytes of one token (maybe not whole characters); special tokens give their text's.
    pub fn token_bytes(&self, _token: u32) -> &[u8] { todo!() }
    /// For one generation.
    pub fn detokenizer(&self) -> Detokenizer { todo!() }
}
