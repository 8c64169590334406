//! What an answer must look like, as clients ask for it: OpenAI's `response_format`, and vLLM's `structured_outputs` for
//! what OpenAI has no word for. Both endpoints take both.

use super::error::HttpError;
use super::fields::Fields;
use baton_types::Grammar;
use serde_json::{Value, json};

/// A grammar, and the field that errors about it name.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct AskedGrammar {
    pub(super) grammar: Grammar,
    pub(super) field: &'static str,
}

/// vLLM's other forms.
const UNSERVED: [&str; 5] = [
    "choice",
    "grammar",
    "structural_tag",
    "whitespace_pattern",
    "disable_any_whitespace",
];

/// Takes both fields.
pub(super) fn take(fields: &mut Fields) -> Result<Option<AskedGrammar>, HttpError> {
    let format = match fields.take("response_format") {
        Some(value) => response_format(value)?,
        None => None,
    };
    let structured = match fields.take("structured_outputs") {
        Some(value) => structured_outputs(value)?,
        None => None,
    };
    match (format, structured) {
        (Some(_), Some(_)) => Err(HttpError::field(
            "structured_outputs",
            "is not allowed together with `response_format`",
        )),
        (format, structured) => Ok(format.or(structured)),
    }
}

fn response_format(value: Value) -> Result<Option<AskedGrammar>, HttpError> {
    let mut format = Fields::of_value("response_format", value)?;
    let kind = format.text("type")?;
    let kind = format.required("type", kind)?;
    let asked = match kind.as_str() {
        "text" => None,
        "json_object" => Some(any_object("response_format")),
        "json_schema" => {
            let value = format.take("json_schema");
            let mut named = Fields::of_value("response_format.json_schema", format.required("json_schema", value)?)?;
            let name = named.text("name")?;
            named.required("name", name)?;
            // Every schema is held to as if it were strict.
            named.boolean("strict")?;
            named.text("description")?;
            let schema = named.take("schema");
            let schema = named.required("schema", schema)?;
            named.finish(&[])?;
            Some(AskedGrammar {
                grammar: Grammar::JsonSchema(schema.to_string()),
                field: "response_format.json_schema.schema",
            })
        }
        other => {
            let problem = format!("is `{other}`; it must be text, json_object or json_schema");
            return Err(HttpError::field("response_format.type", problem));
        }
    };
    format.finish(&[])?;
    Ok(asked)
}

fn structured_outputs(value: Value) -> Result<Option<AskedGrammar>, HttpError> {
    let mut fields = Fields::of_value("structured_outputs", value)?;
    let mut asked = Vec::new();
    if let Some(schema) = fields.take("json") {
        let text = match schema {
            Value::String(text) => text,
            other => other.to_string(),
        };
        asked.push(AskedGrammar {
            grammar: Grammar::JsonSchema(text),
            field: "structured_outputs.json",
        });
    }
    if let Some(regex) = fields.text("regex")? {
        asked.push(AskedGrammar {
            grammar: Grammar::Regex(regex),
            field: "structured_outputs.regex",
        });
    }
    if fields.boolean("json_object")?.unwrap_or(false) {
        asked.push(any_object("structured_outputs.json_object"));
    }
    fields.finish(&UNSERVED)?;
    if asked.len() > 1 {
        return Err(HttpError::field(
            "structured_outputs",
            "must have one of `json`, `regex` and `json_object` only",
        ));
    }
    Ok(asked.pop())
}

fn any_object(field: &'static str) -> AskedGrammar {
    AskedGrammar {
        grammar: Grammar::JsonSchema(json!({"type": "object"}).to_string()),
        field,
    }
}
