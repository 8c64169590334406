//! The metadata of a GGUF file, and no more of it: the tensors behind are the engine's.
//!
//! Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The file is not
//! trusted: every length is checked against what is left of it before anything is allocated. (The `ggus` crate, which the
//! engine reads tensors with, allocates by unchecked counts and makes enums of unchecked numbers.)

use super::CardError;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

/// One value. Arrays of other things than text and integers are read over.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i128>),
    Other,
}

/// All keys and values of one file.
#[derive(Debug)]
pub(super) struct Metadata {
    path: PathBuf,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    /// Reads them from the file's beginning.
    pub(super) fn open(path: &Path) -> Result<Self, CardError> {
        let io = |source| CardError::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(io)?;
        let left = file.metadata().map_err(io)?.len();
        Self::read(path, BufReader::with_capacity(1 << 20, file), left)
    }

    fn read(path: &Path, input: impl Read, left: u64) -> Result<Self, CardError> {
        let mut reader = Reader {
            path,
            input,
            left,
            field: "its header".into(),
        };
        if reader.bytes::<4>()? != *b"GGUF" {
            return Err(reader.invalid("is not a GGUF file"));
        }
        let version = reader.u32()?;
        if version != 2 && version != 3 {
            return Err(reader.unsupported("version", version.to_string(), "2 and 3, little-endian"));
        }
        let _tensors = reader.u64()?;
        let count = reader.u64()?;
        let mut values = BTreeMap::new();
        for ordinal in 0..count {
            reader.field = format!("metadata key {ordinal} of {count}");
            let key = reader.text()?;
            reader.field.clone_from(&key);
            let kind = reader.u32()?;
            let value = reader.value(kind, 0)?;
            if values.insert(key, value).is_some() {
                return Err(reader.invalid("appears twice"));
            }
        }
        Ok(Self {
            path: path.to_owned(),
            values,
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

    fn get<T>(&self, key: &str, wanted: &str, take: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>, CardError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(value) => take(value)
                .map(Some)
                .ok_or_else(|| self.invalid(key, format!("is not {wanted}"))),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, CardError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.invalid(key, "is not text")),
        }
    }

    pub(super) fn u32(&self, key: &str) -> Result<Option<u32>, CardError> {
        self.get(key, "an integer from 0 to 4294967295", |value| match value {
            Value::Integer(number) => u32::try_from(*number).ok(),
            _ => None,
        })
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, CardError> {
        self.get(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    pub(super) fn texts(&self, key: &str) -> Result<Option<&[String]>, CardError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Texts(texts)) => Ok(Some(texts)),
            Some(_) => Err(self.invalid(key, "is not an array of text")),
        }
    }

    pub(super) fn integers(&self, key: &str) -> Result<Option<&[i128]>, CardError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Integers(numbers)) => Ok(Some(numbers)),
            Some(_) => Err(self.invalid(key, "is not an array of integers")),
        }
    }
}

struct Reader<'a, R> {
    path: &'a Path,
    input: R,
    /// Bytes until the file's end.
    left: u64,
    /// What is being read, for errors.
    field: String,
}

impl<R: Read> Reader<'_, R> {
    fn invalid(&self, reason: &str) -> CardError {
        CardError::Invalid {
            path: self.path.to_owned(),
            field: self.field.clone(),
            reason: reason.into(),
        }
    }

    fn unsupported(&self, field: &str, found: String, supported: &'static str) -> CardError {
        CardError::Unsupported {
            path: self.path.to_owned(),
            field: field.into(),
            found,
            supported,
        }
    }

    /// Refuses what is longer than the rest of the file.
    fn claim(&mut self, count: u64, size: u64) -> Result<usize, CardError> {
        let bytes = count.checked_mul(size).filter(|bytes| *bytes <= self.left);
        let bytes = bytes.ok_or_else(|| CardError::Truncated {
            path: self.path.to_owned(),
            field: self.field.clone(),
        })?;
        usize::try_from(bytes).map_err(|_| self.invalid("is longer than memory"))
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<(), CardError> {
        self.input.read_exact(out).map_err(|source| match source.kind() {
            std::io::ErrorKind::UnexpectedEof => CardError::Truncated {
                path: self.path.to_owned(),
                field: self.field.clone(),
            },
            _ => CardError::Io {
                path: self.path.to_owned(),
                source,
            },
        })?;
        self.left -= out.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], CardError> {
        self.claim(N as u64, 1)?;
        let mut out = [0; N];
        self.fill(&mut out)?;
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, CardError> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, CardError> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, CardError> {
        let length = self.u64()?;
        let mut bytes = vec![0; self.claim(length, 1)?];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.invalid("is not UTF-8"))
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value, CardError> {
        Ok(match kind {
            0 => Value::Integer(i128::from(self.bytes::<1>()?[0])),
            1 => Value::Integer(i128::from(i8::from_le_bytes(self.bytes()?))),
            2 => Value::Integer(i128::from(u16::from_le_bytes(self.bytes()?))),
            3 => Value::Integer(i128::from(i16::from_le_bytes(self.bytes()?))),
            4 => Value::Integer(i128::from(self.u32()?)),
            5 => Value::Integer(i128::from(i32::from_le_bytes(self.bytes()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.bytes()?))),
            7 => match self.bytes::<1>()?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                _ => return Err(self.invalid("is neither true nor false")),
            },
            8 => Value::Text(self.text()?),
            9 => self.array(depth)?,
            10 => Value::Integer(i128::from(self.u64()?)),
            11 => Value::Integer(i128::from(i64::from_le_bytes(self.bytes()?))),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            other => return Err(self.invalid(&format!("has the unknown value type {other}"))),
        })
    }

    fn array(&mut self, depth: u32) -> Result<Value, CardError> {
        if depth > 4 {
            return Err(self.invalid("is nested too deeply"));
        }
        let kind = self.u32()?;
        let count = self.u64()?;
        let smallest = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            9 => 12,
            _ => 8,
        };
        self.claim(count, smallest)?;
        let (mut texts, mut integers, mut other) = (Vec::new(), Vec::new(), count == 0);
        for _ in 0..count {
            match self.value(kind, depth + 1)? {
                Value::Text(text) => texts.push(text),
                Value::Integer(number) => integers.push(number),
                Value::Float(_) | Value::Bool(_) | Value::Texts(_) | Value::Integers(_) | Value::Other => other = true,
            }
        }
        Ok(match (other, texts.is_empty()) {
            (true, _) => Value::Other,
            (false, false) => Value::Texts(texts),
            (false, true) => Value::Integers(integers),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        let text = |out: &mut Vec<u8>, text: &str| {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend(text.as_bytes());
        };
        file.extend(0u64.to_le_bytes());
        file.extend(3u64.to_le_bytes());
        text(&mut file, "general.architecture");
        file.extend(8u32.to_le_bytes());
        text(&mut file, "llama");
        text(&mut file, "llama.context_length");
        file.extend(4u32.to_le_bytes());
        file.extend(8192u32.to_le_bytes());
        text(&mut file, "tokenizer.ggml.tokens");
        file.extend(9u32.to_le_bytes());
        file.extend(8u32.to_le_bytes());
        file.extend(2u64.to_le_bytes());
        text(&mut file, "a");
        text(&mut file, "b");
        file
    }

    fn read(bytes: &[u8]) -> Result<Metadata, CardError> {
        Metadata::read(Path::new("model.gguf"), bytes, bytes.len() as u64)
    }

    #[test]
    fn values_are_found_by_key() {
        let metadata = read(&sample()).unwrap();
        assert_eq!(metadata.text("general.architecture").unwrap(), Some("llama"));
        assert_eq!(metadata.u32("llama.context_length").unwrap(), Some(8192));
        assert_eq!(
            metadata.texts("tokenizer.ggml.tokens").unwrap(),
            Some(&["a".to_owned(), "b".to_owned()][..])
        );
        assert_eq!(metadata.bool("absent").unwrap(), None);
        assert!(metadata.u32("general.architecture").is_err());
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = sample();
        for length in 0..whole.len() {
            assert!(
                matches!(read(&whole[..length]), Err(CardError::Truncated { .. })),
                "cut at {length}"
            );
        }
    }

    #[test]
    fn huge_counts_allocate_nothing() {
        let mut file = sample();
        let at = file.len() - 9 - 9 - 8;
        file[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(read(&file), Err(CardError::Truncated { field, .. }) if field == "tokenizer.ggml.tokens"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
            let mut file = sample();
            for (index, byte) in changes {
                let at = index.index(file.len());
                file[at] = byte;
            }
            let _ = read(&file);
        }
    }
}
