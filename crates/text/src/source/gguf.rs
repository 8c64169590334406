//! The metadata of a GGUF file, and no more of it: the tensors behind are the engine's. Read, not mapped.

use super::CardError;
use baton_gguf::{Field, ReadError, Value};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// Far above every known vocabulary.
const ARRAY_KEPT_MAX: u64 = 1 << 24;

/// All keys and values of one file.
#[derive(Debug)]
pub(super) struct Metadata {
    path: PathBuf,
    values: baton_gguf::Metadata,
}

impl Metadata {
    /// Reads them from the file's beginning.
    pub(super) fn open(path: &Path) -> Result<Self, CardError> {
        let io = |source| CardError::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let input = BufReader::with_capacity(1 << 20, file);
        let values = baton_gguf::read_metadata(input, len, ARRAY_KEPT_MAX);
        Ok(Self {
            path: path.to_owned(),
            values: values.map_err(|error| card_error(path, error))?,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn invalid(&self, field: &str, reason: impl Into<String>) -> CardError {
        CardError::Invalid {
            path: self.path.clone(),
            field: field.into(),
            reason: reason.into(),
        }
    }

    fn get<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        take: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CardError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(value) => take(value)
                .map(Some)
                .ok_or_else(|| self.invalid(key, format!("is not {wanted}"))),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, CardError> {
        self.get(key, "text", Value::as_text)
    }

    pub(super) fn u32(&self, key: &str) -> Result<Option<u32>, CardError> {
        self.get(key, "an integer from 0 to 4294967295", Value::as_u32)
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, CardError> {
        self.get(key, "true or false", Value::as_bool)
    }

    /// An empty array is refused: no vocabulary is empty.
    pub(super) fn texts(&self, key: &str) -> Result<Option<&[String]>, CardError> {
        self.get(key, "an array of text", |value| {
            value.as_texts().filter(|texts| !texts.is_empty())
        })
    }

    pub(super) fn integers(&self, key: &str) -> Result<Option<&[i128]>, CardError> {
        self.get(key, "an array of integers", Value::as_integers)
    }
}

/// In the words of the text part's errors, where a key stands for itself.
fn card_error(path: &Path, error: ReadError) -> CardError {
    let path = path.to_owned();
    let words = |field: Field| match field {
        Field::Magic | Field::Version | Field::Counts => "its header".to_owned(),
        Field::Entry { index, count } => format!("metadata key {index} of {count}"),
        Field::Metadata { key } => key,
        Field::TensorEntry { .. } | Field::Tensor { .. } => field.to_string(),
    };
    let unsupported = |path, found| CardError::Unsupported {
        path,
        field: "version".into(),
        found,
        supported: "2 and 3, little-endian",
    };
    match error {
        ReadError::Io { source } => CardError::Io { path, source },
        ReadError::Truncated { field, .. } => CardError::Truncated {
            path,
            field: words(field),
        },
        ReadError::NotGguf => CardError::Invalid {
            path,
            field: words(Field::Magic),
            reason: error.to_string(),
        },
        ReadError::BigEndian => unsupported(path, "big-endian".into()),
        ReadError::UnsupportedVersion { version } => unsupported(path, version.to_string()),
        ReadError::Corrupt { field, flaw } => CardError::Invalid {
            path,
            field: words(field),
            reason: flaw.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn sample() -> Vec<u8> {
        let texts = |texts: &[&str]| {
            let mut out = [8u32.to_le_bytes(), (texts.len() as u32).to_le_bytes(), [0; 4]].concat();
            out.extend(texts.iter().flat_map(|entry| text(entry)));
            out
        };
        let entries = [
            ("general.architecture", 8u32, text("llama")),
            ("llama.context_length", 4, 8192u32.to_le_bytes().to_vec()),
            ("nothing", 9, texts(&[])),
            ("tokenizer.ggml.tokens", 9, texts(&["a", "b"])),
        ];
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend([0, entries.len() as u64].map(u64::to_le_bytes).concat());
        for (key, kind, value) in entries {
            file.extend([text(key), kind.to_le_bytes().to_vec(), value].concat());
        }
        file
    }

    fn open(bytes: &[u8]) -> Result<Metadata, CardError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        Metadata::open(&path)
    }

    #[test]
    fn values_are_found_by_key() {
        let metadata = open(&sample()).unwrap();
        assert_eq!(metadata.text("general.architecture").unwrap(), Some("llama"));
        assert_eq!(metadata.u32("llama.context_length").unwrap(), Some(8192));
        assert_eq!(
            metadata.texts("tokenizer.ggml.tokens").unwrap(),
            Some(&["a".to_owned(), "b".to_owned()][..])
        );
        assert_eq!(metadata.bool("absent").unwrap(), None);
        assert!(metadata.texts("nothing").is_err());
        let error = metadata.u32("general.architecture").unwrap_err().to_string();
        assert!(
            error.ends_with("model.gguf: general.architecture: is not an integer from 0 to 4294967295"),
            "{error}"
        );
    }

    #[test]
    fn errors_name_the_part_in_their_own_words() {
        let message = |bytes: &[u8]| open(bytes).unwrap_err().to_string();
        let ends = |error: String, end: &str| assert!(error.ends_with(end), "{error}");
        let whole = sample();
        ends(message(&[]), "is truncated: it ends within its header; fetch it again");
        ends(
            message(&whole[..30]),
            "it ends within metadata key 0 of 4; fetch it again",
        );
        ends(
            message(&whole[..whole.len() - 1]),
            "it ends within tokenizer.ggml.tokens; fetch it again",
        );
        ends(message(b"PK\x03\x04"), "model.gguf: its header: is not a GGUF file");
        ends(
            message(b"GGUF\x01\0\0\0"),
            "version is `1`, which is not supported; supported: 2 and 3, little-endian",
        );
    }
}
