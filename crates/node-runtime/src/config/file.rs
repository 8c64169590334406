//! The TOML file: a flat table whose keys are the long flag names with `-` as `_`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    /// Not to be read.
    #[error("cannot read the configuration file {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML.
    #[error("{path} is not valid TOML: {source}")]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        source: toml::de::Error,
    },
    /// A key that is no flag.
    #[error("{path}: unknown key `{key}`{hint}", hint = nearest.as_ref().map(|n| format!("; did you mean `{n}`?")).unwrap_or_default())]
    UnknownKey {
        /// Which file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The nearest valid one, where one is near.
        nearest: Option<String>,
    },
    /// A table or a date where a value belongs.
    #[error("{path}: `{key}` must be a string, number, boolean or a list of them")]
    Shape {
        /// Which file.
        path: PathBuf,
        /// The key.
        key: String,
    },
}

impl ConfigFileError {
    /// A file does not mend itself.
    pub fn is_retryable(&self) -> bool {
        false
    }
}

/// Reads the file: key to its values as a flag would take them.
pub(super) fn read(path: &Path, valid: &[String]) -> Result<BTreeMap<String, Vec<String>>, ConfigFileError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigFileError::Read {
        path: path.to_owned(),
        source,
    })?;
    let table: toml::Table = toml::from_str(&text).map_err(|source| ConfigFileError::Syntax {
        path: path.to_owned(),
        source,
    })?;
    let mut values = BTreeMap::new();
    for (key, value) in table {
        if !valid.contains(&key) {
            let nearest = nearest(&key, valid);
            return Err(ConfigFileError::UnknownKey {
                path: path.to_owned(),
                key,
                nearest,
            });
        }
        let Some(texts) = texts(&value) else {
            return Err(ConfigFileError::Shape {
                path: path.to_owned(),
                key,
            });
        };
        values.insert(key, texts);
    }
    Ok(values)
}

fn nearest(key: &str, valid: &[String]) -> Option<String> {
    let wanted = key.replace('-', "_").to_lowercase();
    valid
        .iter()
        .map(|name| (strsim::jaro_winkler(&wanted, name), name))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness > 0.7)
        .map(|(_, name)| name.clone())
}

fn texts(value: &toml::Value) -> Option<Vec<String>> {
    match value {
        toml::Value::Array(items) => items
            .iter()
            .map(|item| texts(item).filter(|t| t.len() == 1)?.pop())
            .collect(),
        toml::Value::String(text) => Some(vec![text.clone()]),
        toml::Value::Integer(number) => Some(vec![number.to_string()]),
        toml::Value::Float(number) => Some(vec![number.to_string()]),
        toml::Value::Boolean(yes) => Some(vec![yes.to_string()]),
        toml::Value::Datetime(_) | toml::Value::Table(_) => None,
    }
}
