//! A model as the coordinator serves it: the card that a node gave, and the tokenizer and template made from it.

use super::CardWanted;
use baton_proto::v1;
use baton_proto::v1::node_client::NodeClient;
use baton_text::{ChatTemplate, Grammars, ModelCard, Tokenizer};
use std::sync::Arc;

/// A card larger than this is no card: the largest tokenizers take about 20 MiB.
const CARD_BYTES_MAX: usize = 128 * 1024 * 1024;

/// Text and limits of one model.
pub(crate) struct Model {
    pub(crate) card: ModelCard,
    pub(crate) tokenizer: Tokenizer,
    /// `None`: the model serves no chats.
    pub(crate) template: Option<ChatTemplate>,
    /// Compiles the grammars of outputs, to refuse what no node could serve.
    pub(crate) grammars: Grammars,
    /// Where it is not to be ignored, what ends a generation.
    pub(crate) eos_tokens: Arc<[u32]>,
    /// Seconds since 1970 at which it was first seen.
    pub(crate) created: u64,
}

/// A card that could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CardError {
    #[error("the node does not send its model card: {0}")]
    Status(#[from] Box<tonic::Status>),
    #[error("the model card is larger than {CARD_BYTES_MAX} bytes")]
    TooLarge,
    #[error("the model card's digest is {found}, but the node's record says {expected}")]
    Digest { found: String, expected: String },
    #[error(transparent)]
    Format(#[from] baton_text::CardFormatError),
    #[error("the model card names the {field} {found}, but the node's record says {expected}")]
    Differs {
        field: &'static str,
        found: String,
        expected: String,
    },
    #[error(transparent)]
    Tokenizer(#[from] baton_text::TextError),
    #[error(transparent)]
    Template(#[from] baton_text::TemplateError),
}

impl Model {
    /// Reads a card and checks it against the node's record. Large vocabularies take their time: not for a thread
    /// that others' streams run on.
    pub(super) fn read(bytes: &[u8], wanted: &CardWanted, created: u64) -> Result<Self, CardError> {
        let card = ModelCard::from_bytes(bytes)?;
        let found = card.digest();
        if found != wanted.digest {
            return Err(CardError::Digest {
                found,
                expected: wanted.digest.clone(),
            });
        }
        if card.fingerprint != wanted.fingerprint {
            let (found, expected) = (card.fingerprint.to_string(), wanted.fingerprint.to_string());
            return Err(CardError::Differs {
                field: "fingerprint",
                found,
                expected,
            });
        }
        Self::new(card, created)
    }

    pub(crate) fn new(card: ModelCard, created: u64) -> Result<Self, CardError> {
        let tokenizer = Tokenizer::new(&card)?;
        let template = match &card.chat_template {
            Some(source) => Some(ChatTemplate::new(source, &card.bos_text, &card.eos_text)?),
            None => None,
        };
        let grammars = Grammars::new(&card, &tokenizer);
        let eos_tokens = card.eos_tokens.clone().into();
        Ok(Self {
            card,
            tokenizer,
            template,
            grammars,
            eos_tokens,
            created,
        })
    }
}

/// Asks a node for its card, as bytes.
pub(super) async fn fetch(wanted: &CardWanted) -> Result<Vec<u8>, CardError> {
    let mut client = NodeClient::new(wanted.channel.clone());
    let answer = client.model_card(v1::ModelCardRequest {}).await.map_err(Box::new)?;
    let mut pieces = answer.into_inner();
    let mut bytes = Vec::new();
    while let Some(piece) = pieces.message().await.map_err(Box::new)? {
        bytes.extend_from_slice(&piece.data);
        if bytes.len() > CARD_BYTES_MAX {
            return Err(CardError::TooLarge);
        }
    }
    Ok(bytes)
}
