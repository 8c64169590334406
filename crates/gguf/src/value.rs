//! Metadata: values by key.

use std::collections::BTreeMap;
use std::fmt;

/// Characters of a text that a message shows.
const SHOWN_CHARS: usize = 60;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Of any width, signed or not.
    Integer(i128),
    /// Of either width.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// A string.
    Text(String),
    /// An array of strings.
    Texts(Vec<String>),
    /// An array of integers of any width.
    Integers(Vec<i128>),
    /// An array that was read over: of other things, nested, or longer than asked for.
    Skipped,
}

impl Value {
    /// An integer from 0 to 4294967295.
    pub fn as_u32(&self) -> Option<u32> {
        let Self::Integer(number) = self else { return None };
        u32::try_from(*number).ok()
    }

    /// An integer from 0 to 18446744073709551615.
    pub fn as_u64(&self) -> Option<u64> {
        let Self::Integer(number) = self else { return None };
        u64::try_from(*number).ok()
    }

    /// True or false.
    pub fn as_bool(&self) -> Option<bool> {
        let Self::Bool(flag) = self else { return None };
        Some(*flag)
    }

    /// A string.
    pub fn as_text(&self) -> Option<&str> {
        let Self::Text(text) = self else { return None };
        Some(text)
    }

    /// An array of strings.
    pub fn as_texts(&self) -> Option<&[String]> {
        let Self::Texts(texts) = self else { return None };
        Some(texts)
    }

    /// An array of integers.
    pub fn as_integers(&self) -> Option<&[i128]> {
        let Self::Integers(numbers) = self else { return None };
        Some(numbers)
    }
}

/// For messages: short, whatever the file holds.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(number) => write!(f, "{number}"),
            Self::Float(number) => write!(f, "{number}"),
            Self::Bool(flag) => write!(f, "{flag}"),
            Self::Text(text) => match text.char_indices().nth(SHOWN_CHARS) {
                Some((end, _)) => write!(f, "{:?} and more", &text[..end]),
                None => write!(f, "{text:?}"),
            },
            Self::Texts(texts) => write!(f, "an array of {} texts", texts.len()),
            Self::Integers(numbers) => write!(f, "an array of {} integers", numbers.len()),
            Self::Skipped => f.write_str("an array"),
        }
    }
}

/// All keys of a file, each once.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata(BTreeMap<String, Value>);

impl Metadata {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// Adds an entry; says whether its key is new.
    pub(crate) fn insert(&mut self, key: String, value: Value) -> bool {
        self.0.insert(key, value).is_none()
    }
}
