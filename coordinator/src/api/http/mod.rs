//! The HTTP door: OpenAI's API for models, completions and chats. It only converts; what is decided, is decided behind
//! [`crate::Frontend`]. A field that is unknown or not served is refused by name, never ignored. A failure before the
//! first token is an HTTP status; one after it is an SSE `error` event, and then `[DONE]` is never sent.

mod body;
mod error;
mod fields;
mod grammar;
mod messages;
mod models;
mod reply;
mod request;
mod router;
mod serve;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod grammar_tests;
#[cfg(test)]
mod tests;

pub use router::{HttpOptions, router};
