//! The model card: what a node tells the coordinator about its model, so that the coordinator can tokenize, render chats
//! and check limits without the model's file. Serialised as JSON; its digest stands in the node's record.

use crate::source::{self, CardError};
use baton_types::{CacheScope, KvDtype, ModelFingerprint, NumericsId};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What the model's file says about text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextCard {
    /// The file's or folder's name, without `.gguf`.
    pub name: String,
    /// Longest context, in tokens.
    pub context_tokens: u32,
    /// Number of logits; at least the number of token ids.
    pub vocab: u32,
    /// Tokens that end a generation.
    pub eos_tokens: Vec<u32>,
    /// Token that begins a text.
    pub bos_token: Option<u32>,
    /// Whether plain prompts begin with it.
    pub add_bos: bool,
    /// Hugging Face `tokenizer.json`; made from GGUF metadata where the source is GGUF.
    pub tokenizer_json: String,
    /// Jinja source.
    pub chat_template: Option<String>,
    /// Text of `bos_token` as the chat template names it; empty where there is none.
    pub bos_text: String,
    /// Text of the end-of-sequence token as the chat template names it; empty where there is none.
    pub eos_text: String,
}

/// What only the engine knows.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineFacts {
    /// Which weights.
    pub fingerprint: ModelFingerprint,
    /// Which arithmetic.
    pub numerics: NumericsId,
    /// Tokens per KV block.
    pub block_tokens: u32,
    /// Element type of KV.
    pub kv_dtype: KvDtype,
}

/// Everything that a coordinator needs to serve a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    /// As clients name the model.
    pub name: String,
    /// Longest context, in tokens.
    pub context_tokens: u32,
    /// Number of logits; at least the number of token ids.
    pub vocab: u32,
    /// Tokens that end a generation.
    pub eos_tokens: Vec<u32>,
    /// Token that begins a text.
    pub bos_token: Option<u32>,
    /// Whether plain prompts begin with it.
    pub add_bos: bool,
    /// Hugging Face `tokenizer.json`.
    pub tokenizer_json: String,
    /// Jinja source; `None`: the model serves no chats.
    pub chat_template: Option<String>,
    /// Text of `bos_token` as the chat template names it.
    pub bos_text: String,
    /// Text of the end-of-sequence token as the chat template names it.
    pub eos_text: String,
    /// A stub engine with scripted tokens.
    pub stub: bool,
    /// Which weights.
    pub fingerprint: ModelFingerprint,
    /// Which arithmetic.
    pub numerics: NumericsId,
    /// Tokens per KV block.
    pub block_tokens: u32,
    /// Element type of KV.
    pub kv_dtype: KvDtype,
}

/// Bytes that are no model card.
#[derive(Debug, thiserror::Error)]
#[error("not a model card: {reason}")]
pub struct CardFormatError {
    /// Why, with the field's name.
    pub reason: String,
}

impl CardFormatError {
    /// The same bytes will not become a card.
    pub fn is_retryable(&self) -> bool {
        false
    }
}

impl ModelCard {
    /// Token ids of a stub model: one per byte, then `<|im_start|>`, `<|im_end|>` and `<|endoftext|>`.
    pub const STUB_VOCAB: u32 = 259;

    /// Reads the tokenizer, the template and the limits from a `.gguf` file or a Hugging Face folder.
    ///
    /// # Errors
    /// Where the file is missing, broken or of an unsupported kind; the error names file and field.
    pub fn text_of(path: &Path) -> Result<TextCard, CardError> {
        source::read(path)
    }

    /// Joins what the file says with what the engine says.
    pub fn new(text: TextCard, engine: EngineFacts) -> Self {
        Self {
            name: text.name,
            context_tokens: text.context_tokens,
            vocab: text.vocab,
            eos_tokens: text.eos_tokens,
            bos_token: text.bos_token,
            add_bos: text.add_bos,
            tokenizer_json: text.tokenizer_json,
            chat_template: text.chat_template,
            bos_text: text.bos_text,
            eos_text: text.eos_text,
            stub: false,
            fingerprint: engine.fingerprint,
            numerics: engine.numerics,
            block_tokens: engine.block_tokens,
            kv_dtype: engine.kv_dtype,
        }
    }

    /// The card of a stub engine: a token per byte (id = byte), ChatML, end of sequence 257.
    pub fn stub(name: &str, context_tokens: u32, engine: EngineFacts) -> Self {
        Self {
            stub: true,
            ..Self::new(source::stub_text(name, context_tokens), engine)
        }
    }

    /// JSON.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a card has string keys only and no failing Serialize")
    }

    /// From [`Self::to_bytes`].
    ///
    /// # Errors
    /// Where the bytes are no card.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CardFormatError> {
        serde_json::from_slice(bytes).map_err(|e| CardFormatError { reason: e.to_string() })
    }

    /// Hexadecimal BLAKE3 of [`Self::to_bytes`].
    pub fn digest(&self) -> String {
        blake3::hash(&self.to_bytes()).to_hex().to_string()
    }

    /// Where the block hashes of this model's prompts begin. `salt` keeps tenants apart; empty where they share.
    pub fn cache_scope(&self, salt: &str) -> CacheScope {
        CacheScope {
            fingerprint: self.fingerprint,
            numerics: self.numerics.clone(),
            dtype: self.kv_dtype,
            adapter: String::new(),
            salt: salt.to_owned(),
        }
    }
}
