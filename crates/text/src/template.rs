//! Chat templates.
use serde::{Deserialize, Serialize};
/// One turn of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// system, user, assistant or what else the template knows.
    pub role: String,
    /// Its text.
    pub content: String,
}
/// A chat that a template cannot render.
#[derive(Debug, thiserror::Error)]
#[error("the chat template failed: {reason}")]
pub struct TemplateError {
    /// Why.
    pub reason: String,
}
/// A model's chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate;
impl ChatTemplate {
    /// Compiles Jinja source.
    pub fn new(_template: &str, _bos: &str, _eos: &str) -> Result<Self, TemplateError> { todo!() }
    /// The chat as one text, for people to read. To get token ids use `Tokenizer::encode_chat`, which lets no message forge special tokens.
    pub fn render(&self, _messages: &[Message], _add_generation_prompt: bool) -> Result<String, TemplateError> { todo!() }
}
