//! Between text and token ids: model cards, tokenizer, chat template, incremental detokenizer, stop strings, output
//! grammars.
//!
//! Nothing here knows tensors or the network. A *model card* carries everything that a coordinator needs to serve a model
//! whose file it does not have. See ARCHITECTURE.md.

#![warn(missing_docs)]

mod card;
mod date;
mod detokenizer;
mod grammar;
mod source;
mod stop;
mod template;
mod tokenizer;

pub use card::{CardFormatError, EngineFacts, ModelCard, TextCard};
pub use detokenizer::Detokenizer;
pub use grammar::{GrammarError, GrammarMatcher, Grammars};
pub use source::CardError;
pub use stop::{StopFinder, StopOutcome};
pub use template::{ChatTemplate, Message, TemplateError};
pub use tokenizer::{TextError, Tokenizer};
