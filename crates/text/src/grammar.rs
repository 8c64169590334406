//! Output grammars: which tokens may come next, by `llguidance`, from the grammar's text and the generated tokens alone.
//!
//! A matcher is therefore made anew wherever a request runs, and allows the same tokens there. Compiling takes up to some
//! tens of milliseconds (the first time also reads the whole vocabulary), a step usually some tens of microseconds: neither
//! is for a thread that others' streams wait for. Every bound below is one of work or size, never of time, so that what
//! is refused on one machine is refused on all.

use crate::{ModelCard, TextError, Tokenizer};
use baton_types::{Grammar, TokenSet};
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory, panic_utils};
use serde_json::Value;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};

/// Work units of building a grammar's lexer: about 20 ms.
const LEXER_WORK_MAX: u64 = 1_000_000;
/// Work units of the lexer within one step: about 15 ms.
const STEP_LEXER_WORK_MAX: u64 = 200_000;
/// Parser items of one step: about 3 ms.
const STEP_ITEMS_MAX: usize = 50_000;
/// States of a request's lexer, 1 to 2 kB each.
const LEXER_STATES_MAX: usize = 50_000;
/// Symbols of all productions together.
const SYMBOLS_MAX: usize = 200_000;
/// Messages of the grammar library are cut to this.
const REASON_BYTES_MAX: usize = 400;

/// A grammar that cannot be served, or an output that left it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The schema is no JSON text, or no object or boolean.
    #[error("it is no JSON schema: {reason}")]
    NoSchema {
        /// Why.
        reason: String,
    },
    /// The grammar is malformed, too large, or says something that cannot be promised.
    #[error("it is not supported: {reason}")]
    Unsupported {
        /// Why.
        reason: String,
    },
    /// The model's vocabulary cannot be used with grammars.
    #[error("the model cannot be held to a grammar: {reason}")]
    Vocabulary {
        /// Why.
        reason: String,
    },
    /// Tokens that the grammar does not allow, or a state that it cannot leave.
    #[error("the output cannot go on by its grammar: {reason}")]
    Stuck {
        /// Why.
        reason: String,
    },
}

impl GrammarError {
    /// The same grammar and tokens will fail again.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NoSchema { .. } | Self::Unsupported { .. } | Self::Vocabulary { .. } | Self::Stuck { .. } => false,
        }
    }
}

/// What compiles grammars for one model. Cheap to make and to clone; the vocabulary is read when the first one comes.
#[derive(Clone)]
pub struct Grammars(Arc<Inner>);

struct Inner {
    source: Source,
    vocab: u32,
    eos_tokens: Vec<u32>,
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
}

enum Source {
    Tokenizer(Tokenizer),
    /// tokenizer.json
    Json(String),
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars")
            .field("vocab", &self.0.vocab)
            .finish_non_exhaustive()
    }
}

impl Grammars {
    /// For who has the model's tokenizer.
    pub fn new(card: &ModelCard, tokenizer: &Tokenizer) -> Self {
        Self::from_source(card, Source::Tokenizer(tokenizer.clone()))
    }

    /// For who needs the tokenizer for nothing else.
    pub fn of_card(card: &ModelCard) -> Self {
        Self::from_source(card, Source::Json(card.tokenizer_json.clone()))
    }

    fn from_source(card: &ModelCard, source: Source) -> Self {
        Self(Arc::new(Inner {
            source,
            vocab: card.vocab,
            eos_tokens: card.eos_tokens.clone(),
            factory: OnceLock::new(),
        }))
    }

    /// Makes the matcher of an output that begins with `generated`.
    ///
    /// # Errors
    /// A grammar that cannot be served, or that does not allow `generated`.
    pub fn matcher(&self, grammar: &Grammar, generated: &[u32]) -> Result<GrammarMatcher, GrammarError> {
        let compiled = top_level(grammar)?;
        let factory = self.0.factory.get_or_init(|| self.0.read_vocabulary());
        let factory = factory.as_ref().map_err(Clone::clone)?;
        let unsupported = |reason: String| GrammarError::Unsupported { reason: cut(reason) };
        let parser = panic_utils::catch_unwind(AssertUnwindSafe(|| factory.create_parser(compiled)));
        let mut matcher = Matcher::new(parser);
        if let Some(reason) = matcher.get_error() {
            return Err(unsupported(reason));
        }
        // What the library warns of is what it would not hold the output to.
        if let Some(warning) = matcher.grammar_warnings().into_iter().next() {
            return Err(unsupported(warning));
        }
        let mut matcher = GrammarMatcher(matcher);
        matcher.accept(generated)?;
        Ok(matcher)
    }
}

impl Inner {
    fn read_vocabulary(&self) -> Result<ParserFactory, GrammarError> {
        let unusable = |reason: String| GrammarError::Vocabulary { reason };
        let from_json;
        let tokenizer = match &self.source {
            Source::Tokenizer(tokenizer) => tokenizer,
            Source::Json(json) => {
                from_json = Tokenizer::from_json(json, None).map_err(|error: TextError| unusable(error.to_string()))?;
                &from_json
            }
        };
        let eos_tokens: Vec<u32> = self.eos_tokens.iter().copied().filter(|id| *id < self.vocab).collect();
        let Some(first) = eos_tokens.first() else {
            return Err(unusable("it has no end-of-sequence token".into()));
        };
        let words: Vec<Vec<u8>> = (0..self.vocab).map(|id| word(tokenizer, id)).collect();
        let trie = TokTrie::from(&TokRxInfo::new(self.vocab, *first), &words).with_eos_tokens(&eos_tokens);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::json_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
            .map_err(|error| unusable(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            initial_lexer_fuel: LEXER_WORK_MAX,
            step_lexer_fuel: STEP_LEXER_WORK_MAX,
            step_max_items: STEP_ITEMS_MAX,
            max_lexer_states: LEXER_STATES_MAX,
            max_grammar_size: SYMBOLS_MAX,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(factory)
    }
}

/// A token's bytes; those of special ones are marked, so that no text matches them.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    if tokenizer.is_special(id) {
        [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
    } else {
        bytes.to_vec()
    }
}

fn top_level(grammar: &Grammar) -> Result<TopLevelGrammar, GrammarError> {
    let no_schema = |reason: String| GrammarError::NoSchema { reason };
    match grammar {
        Grammar::Regex(regex) => {
            let slashes = regex.len() - regex.trim_end_matches('\\').len();
            if slashes % 2 == 1 {
                let reason = "it ends with a backslash that escapes nothing".into();
                return Err(GrammarError::Unsupported { reason });
            }
            Ok(TopLevelGrammar::from_regex(regex))
        }
        Grammar::JsonSchema(text) => {
            let mut schema: Value = serde_json::from_str(text).map_err(|error| no_schema(error.to_string()))?;
            // `true` and `{}` say the same; `false` and everything else say nothing that an output could be.
            if schema == Value::Bool(true) {
                schema = Value::Object(serde_json::Map::new());
            }
            if !schema.is_object() {
                return Err(no_schema("it must be an object".into()));
            }
            json_form().apply_to(&mut schema);
            Ok(TopLevelGrammar::from_json_schema(schema))
        }
    }
}

/// On one line, with one space behind `,` and `:`: what the white space is does not change what is said, and a model that
/// may put any number of spaces anywhere may never come to an end.
fn json_form() -> JsonCompileOptions {
    JsonCompileOptions {
        item_separator: ", ".into(),
        key_separator: ": ".into(),
        whitespace_flexible: false,
        ..JsonCompileOptions::default()
    }
}

fn cut(mut reason: String) -> String {
    if reason.len() > REASON_BYTES_MAX {
        let end = (0..=REASON_BYTES_MAX).rev().find(|at| reason.is_char_boundary(*at));
        reason.truncate(end.unwrap_or(0));
        reason.push('…');
    }
    reason
}

/// Where one output is in its grammar.
pub struct GrammarMatcher(Matcher);

impl std::fmt::Debug for GrammarMatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarMatcher")
            .field("error", &self.0.get_error())
            .finish()
    }
}

impl GrammarMatcher {
    /// The output goes on with `tokens`.
    ///
    /// # Errors
    /// Where the grammar does not allow them; the matcher is of no use then.
    pub fn accept(&mut self, tokens: &[u32]) -> Result<(), GrammarError> {
        self.0.consume_tokens(tokens).map_err(|error| stuck(&error))
    }

    /// The tokens that may come next. Where nothing may, the end-of-sequence tokens; they are among the others wherever
    /// the output may end. At least one.
    ///
    /// # Errors
    /// Where the step takes more work than it may, or the vocabulary has no token that goes on.
    pub fn allowed(&mut self) -> Result<TokenSet, GrammarError> {
        let mask = self.0.compute_mask_or_eos().map_err(|error| stuck(&error))?;
        Ok(TokenSet::from_words(mask.into()))
    }
}

fn stuck(error: &impl std::fmt::Display) -> GrammarError {
    GrammarError::Stuck {
        reason: cut(error.to_string()),
    }
}
