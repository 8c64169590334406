//! A text card from GGUF metadata.

use super::bpe::{PreTokenizer, SUPPORTED, TokenKind, Vocabulary, tokenizer_json};
use super::gguf::Metadata;
use super::{CardError, name_of};
use crate::{TextCard, Tokenizer};
use std::collections::HashSet;
use std::path::Path;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// Control tokens that end a turn in the templates of the families that Baton serves, whatever the file names as EOS.
/// llama.cpp recognises them by the same texts.
const ENDS: [&str; 5] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
];

pub(super) fn read(path: &Path) -> Result<TextCard, CardError> {
    let metadata = Metadata::open(path)?;
    let missing = |field: &str| metadata.invalid(field, "is missing");
    let architecture = metadata
        .text("general.architecture")?
        .ok_or_else(|| missing("general.architecture"))?;
    let context_key = format!("{architecture}.context_length");
    let context_tokens = metadata.u32(&context_key)?.ok_or_else(|| {
        let reason = format!("is `{architecture}`, but {context_key} is missing");
        metadata.invalid("general.architecture", reason)
    })?;
    let pre = pre_tokenizer(&metadata)?;
    let tokens = metadata.texts(TOKENS)?.ok_or_else(|| missing(TOKENS))?;
    let kinds = kinds(&metadata, tokens)?;
    let merges = merges(&metadata)?;
    let vocabulary = Vocabulary {
        tokens,
        kinds: &kinds,
        merges,
    };
    let (bos_token, eos_token) = (id(&metadata, "bos", tokens)?, id(&metadata, "eos", tokens)?);
    let text_of = |token: Option<u32>| token.map(|token| tokens[token as usize].clone()).unwrap_or_default();
    let card = TextCard {
        name: name_of(path),
        context_tokens,
        vocab: u32::try_from(tokens.len()).map_err(|_| metadata.invalid(TOKENS, "has too many entries"))?,
        eos_tokens: ends(&metadata, eos_token, tokens, &kinds)?,
        bos_token,
        add_bos: bos_token.is_some() && metadata.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(pre.adds_bos()),
        tokenizer_json: tokenizer_json(&vocabulary, pre),
        chat_template: metadata.text("tokenizer.chat_template")?.map(str::to_owned),
        bos_text: text_of(bos_token),
        eos_text: text_of(eos_token),
    };
    // A tokenizer that cannot be built should stop the node that has the file, not the coordinator that gets the card.
    Tokenizer::from_json(&card.tokenizer_json, None).map_err(|source| CardError::Tokenizer {
        path: path.to_owned(),
        source,
    })?;
    Ok(card)
}

fn pre_tokenizer(metadata: &Metadata) -> Result<PreTokenizer, CardError> {
    let unsupported = |field: &str, found: &str, supported| CardError::Unsupported {
        path: metadata.path().to_owned(),
        field: field.into(),
        found: found.into(),
        supported,
    };
    let model = metadata
        .text(MODEL)?
        .ok_or_else(|| metadata.invalid(MODEL, "is missing"))?;
    if model != "gpt2" {
        return Err(unsupported(MODEL, model, "gpt2 (byte-level BPE)"));
    }
    let pre = metadata.text(PRE)?.unwrap_or("default");
    PreTokenizer::named(pre).ok_or_else(|| unsupported(PRE, pre, SUPPORTED))
}

fn kinds(metadata: &Metadata, tokens: &[String]) -> Result<Vec<TokenKind>, CardError> {
    let mut seen = HashSet::with_capacity(tokens.len());
    if let Some(twice) = tokens.iter().find(|token| !seen.insert(token.as_str())) {
        return Err(metadata.invalid(TOKENS, format!("contains {twice:?} twice")));
    }
    let Some(types) = metadata.integers(TYPES)? else {
        return Ok(vec![TokenKind::Normal; tokens.len()]);
    };
    if types.len() != tokens.len() {
        return Err(metadata.invalid(
            TYPES,
            format!("has {} entries for {} tokens", types.len(), tokens.len()),
        ));
    }
    // 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
    let kind = |number: &i128| match number {
        2 | 3 => Ok(TokenKind::Control),
        4 => Ok(TokenKind::UserDefined),
        1 | 5 | 6 => Ok(TokenKind::Normal),
        other => Err(metadata.invalid(TYPES, format!("contains the unknown type {other}"))),
    };
    types.iter().map(kind).collect()
}

fn merges(metadata: &Metadata) -> Result<Vec<(&str, &str)>, CardError> {
    let merges = metadata
        .texts(MERGES)?
        .ok_or_else(|| metadata.invalid(MERGES, "is missing"))?;
    let pair =
        |merge| cut(merge).ok_or_else(|| metadata.invalid(MERGES, format!("contains {merge:?}, which is no pair")));
    merges.iter().map(String::as_str).map(pair).collect()
}

/// At the first space that is not the first character.
fn cut(merge: &str) -> Option<(&str, &str)> {
    let first = merge.chars().next()?.len_utf8();
    let at = first + merge[first..].find(' ')?;
    Some((&merge[..at], &merge[at + 1..]))
}

/// A token id by its role, checked against the vocabulary.
fn id(metadata: &Metadata, role: &str, tokens: &[String]) -> Result<Option<u32>, CardError> {
    let key = format!("tokenizer.ggml.{role}_token_id");
    let token = metadata.u32(&key)?;
    match token {
        Some(token) if token as usize >= tokens.len() => {
            Err(metadata.invalid(&key, format!("is {token}, but there are {} tokens", tokens.len())))
        }
        _ => Ok(token),
    }
}

fn ends(metadata: &Metadata, eos: Option<u32>, tokens: &[String], kinds: &[TokenKind]) -> Result<Vec<u32>, CardError> {
    let mut ends: Vec<u32> = eos.into_iter().collect();
    ends.extend(id(metadata, "eot", tokens)?);
    ends.extend(id(metadata, "eom", tokens)?);
    let named = tokens
        .iter()
        .zip(kinds)
        .zip(0..)
        .filter(|((text, kind), _)| **kind == TokenKind::Control && ENDS.contains(&text.as_str()));
    ends.extend(named.map(|(_, id)| id));
    let mut seen = HashSet::new();
    ends.retain(|token| seen.insert(*token));
    Ok(ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_are_cut_at_the_first_inner_space() {
        assert_eq!(cut("Ġ t"), Some(("Ġ", "t")));
        assert_eq!(cut("  a"), Some((" ", "a")));
        assert_eq!(cut("ab"), None);
        assert_eq!(cut(""), None);
    }
}
