//! Typed access to a JSON object's fields. Each mistake is reported with the field's name and what was expected. `null`
//! means absent, as OpenAI has it. What was not taken at the end is refused.

use super::error::HttpError;
use serde_json::{Map, Value};

/// The fields of one object that were not taken yet.
pub(super) struct Fields {
    values: Map<String, Value>,
    /// Stands before the names in errors: `messages[0].`.
    prefix: String,
}

impl Fields {
    /// Of a request's body.
    pub(super) fn of_body(body: &[u8]) -> Result<Self, HttpError> {
        let text = std::str::from_utf8(body).map_err(|error| {
            HttpError::malformed(format!("the body is not valid UTF-8 at byte {}", error.valid_up_to()))
        })?;
        let value = serde_json::from_str(text)
            .map_err(|error| HttpError::malformed(format!("the body is not valid JSON: {error}")))?;
        match value {
            Value::Object(values) => Ok(Self {
                values,
                prefix: String::new(),
            }),
            other => Err(HttpError::malformed(format!(
                "the body must be an object, not {}",
                kind(&other)
            ))),
        }
    }

    /// Of an object inside another.
    pub(super) fn of_value(path: &str, value: Value) -> Result<Self, HttpError> {
        match value {
            Value::Object(values) => Ok(Self {
                values,
                prefix: format!("{path}."),
            }),
            other => Err(wrong(path, "an object", &other)),
        }
    }

    /// A field's name as errors show it.
    pub(super) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.values.remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, HttpError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.path(name), "text", &other)),
        }
    }

    pub(super) fn required<T>(&self, name: &str, value: Option<T>) -> Result<T, HttpError> {
        value.ok_or_else(|| HttpError::field(self.path(name), "is missing"))
    }

    pub(super) fn boolean(&mut self, name: &str) -> Result<Option<bool>, HttpError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong(&self.path(name), "true or false", &other)),
        }
    }

    pub(super) fn number(&mut self, name: &str) -> Result<Option<f32>, HttpError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) => Ok(Some(number as f32)),
            None => Err(wrong(&self.path(name), "a number", &value)),
        }
    }

    /// A whole number from `least` up.
    pub(super) fn count(&mut self, name: &str, least: u32) -> Result<Option<u32>, HttpError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
            .filter(|number| *number >= least)
        {
            Some(number) => Ok(Some(number)),
            None => Err(wrong(
                &self.path(name),
                &format!("a whole number from {least} to {}", u32::MAX),
                &value,
            )),
        }
    }

    /// Any whole number of 64 bits; negative ones by their two's complement.
    pub(super) fn seed(&mut self, name: &str) -> Result<Option<u64>, HttpError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned)) {
            Some(number) => Ok(Some(number)),
            None => Err(wrong(&self.path(name), "a whole number of 64 bits", &value)),
        }
    }

    /// Takes a field that is served with one value only.
    pub(super) fn only(&mut self, name: &str, served: &Value) -> Result<(), HttpError> {
        match self.take(name) {
            Some(value) if value != *served => Err(HttpError {
                code: Some("unsupported_parameter"),
                ..HttpError::field(self.path(name), format!("is served with the value {served} only"))
            }),
            _ => Ok(()),
        }
    }

    /// Takes fields that change nothing about the answer.
    pub(super) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.values.remove(*name);
        }
    }

    /// Refuses what is left. `unserved` are OpenAI's fields that Baton does not serve yet.
    pub(super) fn finish(self, unserved: &[&str]) -> Result<(), HttpError> {
        match self.values.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((name, _)) if unserved.contains(&name.as_str()) => Err(HttpError::unserved(self.path(name))),
            Some((name, _)) => Err(HttpError {
                code: Some("unknown_parameter"),
                ..HttpError::field(self.path(name), "is not a known field")
            }),
        }
    }
}

/// The error of a value of the wrong type.
pub(super) fn wrong(path: &str, expected: &str, found: &Value) -> HttpError {
    HttpError::field(path, format!("must be {expected}, not {}", kind(found)))
}

/// Says what a value is without repeating texts, which may be prompts.
fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(_) => "text".into(),
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
    }
}
