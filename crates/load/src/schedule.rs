//! What is sent, and when.

use std::time::Duration;

/// What a request begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Token ids: the count is exact.
    Tokens(Vec<u32>),
    /// Text: the server's tokenizer decides on the count.
    Text(String),
}

/// One request of a schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// When it is due, from the start of the run.
    pub at: Duration,
    /// Its prompt.
    pub prompt: Prompt,
    /// Tokens of its answer: forced, the end of the text is ignored.
    pub output: u32,
}
