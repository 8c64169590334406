//! What a request works on: `messages` of a chat, `prompt` of a completion.

use super::error::HttpError;
use super::fields::{Fields, wrong};
use crate::PromptInput;
use baton_text::Message;
use serde_json::Value;

/// `messages`: a chat of texts.
pub(super) fn chat(value: Value) -> Result<PromptInput, HttpError> {
    let Value::Array(values) = value else {
        return Err(wrong("messages", "an array", &value));
    };
    if values.is_empty() {
        return Err(HttpError::field("messages", "must not be empty"));
    }
    let parsed = values
        .into_iter()
        .enumerate()
        .map(|(at, value)| message(&format!("messages[{at}]"), value));
    Ok(PromptInput::Chat(parsed.collect::<Result<_, _>>()?))
}

fn message(path: &str, value: Value) -> Result<Message, HttpError> {
    let mut fields = Fields::of_value(path, value)?;
    let role = fields.text("role")?;
    let role = match fields.required("role", role)?.as_str() {
        // OpenAI's newer word for it.
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" | "function" => {
            return Err(HttpError::field(
                fields.path("role"),
                "tool and function are not supported yet",
            ));
        }
        _ => {
            return Err(HttpError::field(
                fields.path("role"),
                "must be system, developer, user or assistant",
            ));
        }
    };
    let content = match fields.take("content") {
        Some(value) => content(&fields.path("content"), value)?,
        None if role == "assistant" => String::new(),
        None => return Err(HttpError::field(fields.path("content"), "is missing")),
    };
    // Clients send earlier answers back as they got them, with empty lists in them.
    for name in ["annotations", "tool_calls"] {
        if fields
            .take(name)
            .is_some_and(|value| value.as_array().is_none_or(|list| !list.is_empty()))
        {
            return Err(HttpError::unserved(fields.path(name)));
        }
    }
    fields.finish(&["name", "refusal", "audio", "function_call", "tool_call_id"])?;
    Ok(Message {
        role: role.to_owned(),
        content,
    })
}

/// Text, or parts that are all text.
fn content(path: &str, value: Value) -> Result<String, HttpError> {
    let parts = match value {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(wrong(path, "text or an array of parts", &other)),
    };
    let mut content = String::new();
    for (at, part) in parts.into_iter().enumerate() {
        let mut fields = Fields::of_value(&format!("{path}[{at}]"), part)?;
        let kind = fields.text("type")?;
        if fields.required("type", kind)? != "text" {
            return Err(HttpError::field(
                fields.path("type"),
                "must be text: other parts are not supported yet",
            ));
        }
        let text = fields.text("text")?;
        content.push_str(&fields.required("text", text)?);
        fields.finish(&[])?;
    }
    Ok(content)
}

/// `prompt`: a text, token ids, or an array of one of these.
pub(super) fn prompt(value: Value) -> Result<PromptInput, HttpError> {
    let expected = "text, an array of token ids, or an array of one of these";
    match value {
        Value::String(text) => Ok(PromptInput::Text(text)),
        Value::Array(mut values) => match values.first() {
            None => Err(HttpError::field("prompt", "must not be empty")),
            Some(Value::Number(_)) => tokens(&values),
            Some(Value::String(_) | Value::Array(_)) if values.len() > 1 => Err(HttpError::field(
                "prompt",
                "with several prompts is not supported yet: send a request for each",
            )),
            Some(Value::String(_) | Value::Array(_)) => match values.remove(0) {
                Value::Array(ids) => tokens(&ids),
                one => prompt(one),
            },
            Some(other) => Err(wrong("prompt", expected, other)),
        },
        other => Err(wrong("prompt", expected, &other)),
    }
}

fn tokens(values: &[Value]) -> Result<PromptInput, HttpError> {
    let id = |(at, value): (usize, &Value)| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| wrong(&format!("prompt[{at}]"), "a token id", value))
    };
    let ids: Vec<u32> = values.iter().enumerate().map(id).collect::<Result<_, _>>()?;
    if ids.is_empty() {
        Err(HttpError::field("prompt", "must not be empty"))
    } else {
        Ok(PromptInput::Tokens(ids))
    }
}
