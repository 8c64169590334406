//! A text card from a Hugging Face folder: tokenizer.json and config.json are needed; tokenizer_config.json,
//! generation_config.json and chat_template.jinja are used where they are there.

use super::{CardError, name_of};
use crate::{TextCard, Tokenizer};
use serde_json::Value;
use std::path::{Path, PathBuf};

pub(super) fn read(folder: &Path) -> Result<TextCard, CardError> {
    let tokenizer_path = folder.join("tokenizer.json");
    let tokenizer_json = read_text(&tokenizer_path)?;
    let config_path = folder.join("config.json");
    let config = parse(&config_path, &read_text(&config_path)?)?;
    let generation = optional(folder.join("generation_config.json"))?;
    let tokenizer_config = optional(folder.join("tokenizer_config.json"))?;

    let broken = |source| CardError::Tokenizer {
        path: tokenizer_path.clone(),
        source,
    };
    let tokenizer = Tokenizer::from_json(&tokenizer_json, None).map_err(broken)?;
    let number = |field: &str| {
        config[field]
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
            .ok_or_else(|| CardError::Invalid {
                path: config_path.clone(),
                field: field.into(),
                reason: "is missing or no whole number".into(),
            })
    };
    let (bos_text, eos_text) = (
        token_text(&tokenizer_config["bos_token"]),
        token_text(&tokenizer_config["eos_token"]),
    );
    let mut eos_tokens = [&generation, &config]
        .iter()
        .map(|file| ids(&file["eos_token_id"]))
        .find(|ids| !ids.is_empty())
        .unwrap_or_default();
    eos_tokens.extend(tokenizer.id_of(&eos_text).filter(|id| !eos_tokens.contains(id)));
    let bos_token = tokenizer
        .id_of(&bos_text)
        .or_else(|| ids(&config["bos_token_id"]).first().copied());
    let add_bos = match tokenizer_config["add_bos_token"].as_bool() {
        Some(adds) => adds,
        None => bos_token.is_some() && tokenizer.own_prefix().map_err(broken)?.first().copied() == bos_token,
    };
    Ok(TextCard {
        name: name_of(folder),
        context_tokens: number("max_position_embeddings")?,
        vocab: number("vocab_size")?,
        eos_tokens,
        bos_token,
        add_bos,
        tokenizer_json,
        chat_template: template(folder, &tokenizer_config)?,
        bos_text,
        eos_text,
    })
}

fn read_text(path: &Path) -> Result<String, CardError> {
    std::fs::read_to_string(path).map_err(|source| CardError::Io {
        path: path.to_owned(),
        source,
    })
}

fn parse(path: &Path, text: &str) -> Result<Value, CardError> {
    serde_json::from_str(text).map_err(|error| CardError::Invalid {
        path: path.to_owned(),
        field: "JSON".into(),
        reason: error.to_string(),
    })
}

/// `null` where the file is not there.
fn optional(path: PathBuf) -> Result<Value, CardError> {
    if path.exists() {
        parse(&path, &read_text(&path)?)
    } else {
        Ok(Value::Null)
    }
}

/// `"<s>"` or `{"content": "<s>", ..}`.
fn token_text(value: &Value) -> String {
    value
        .as_str()
        .or_else(|| value["content"].as_str())
        .unwrap_or_default()
        .to_owned()
}

/// One id or several.
fn ids(value: &Value) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value.as_array() {
        Some(values) => values.iter().filter_map(one).collect(),
        None => one(value).into_iter().collect(),
    }
}

/// The file of its own wins; else the configuration's, which may be a list of named ones.
fn template(folder: &Path, tokenizer_config: &Value) -> Result<Option<String>, CardError> {
    let own = folder.join("chat_template.jinja");
    if own.exists() {
        return read_text(&own).map(Some);
    }
    let templates = &tokenizer_config["chat_template"];
    let default = templates
        .as_array()
        .and_then(|named| named.iter().find(|one| one["name"] == "default"));
    Ok(templates
        .as_str()
        .or_else(|| default.and_then(|one| one["template"].as_str()))
        .map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelCard;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn everything_is_taken_from_its_file() {
        let stub = super::super::stub_text("x", 1);
        let files = folder(&[
            ("tokenizer.json", &stub.tokenizer_json),
            (
                "config.json",
                r#"{"max_position_embeddings": 128, "vocab_size": 300, "eos_token_id": 258}"#,
            ),
            ("generation_config.json", r#"{"eos_token_id": [257, 258]}"#),
            (
                "tokenizer_config.json",
                r#"{"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}"#,
            ),
        ]);
        let card = ModelCard::text_of(files.path()).unwrap();
        assert_eq!((card.context_tokens, card.vocab), (128, 300));
        assert_eq!(card.eos_tokens, [257, 258]);
        assert_eq!((card.bos_token, card.add_bos), (Some(256), false));
        assert_eq!(
            (card.bos_text.as_str(), card.eos_text.as_str()),
            ("<|im_start|>", "<|im_end|>")
        );
        assert_eq!(card.chat_template.as_deref(), Some("d"));
        std::fs::write(files.path().join("chat_template.jinja"), "own").unwrap();
        assert_eq!(
            ModelCard::text_of(files.path()).unwrap().chat_template.as_deref(),
            Some("own")
        );
    }

    #[test]
    fn errors_name_file_and_field() {
        let stub = super::super::stub_text("x", 1);
        let error = ModelCard::text_of(folder(&[]).path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        let files = folder(&[
            ("tokenizer.json", &stub.tokenizer_json),
            ("config.json", r#"{"vocab_size": 300}"#),
        ]);
        let error = ModelCard::text_of(files.path()).unwrap_err().to_string();
        assert!(
            error.contains("config.json") && error.contains("max_position_embeddings"),
            "{error}"
        );
        let files = folder(&[("tokenizer.json", "{"), ("config.json", "{}")]);
        assert!(matches!(
            ModelCard::text_of(files.path()),
            Err(CardError::Tokenizer { .. })
        ));
    }
}
