//! What can be wrong with a header, and where.

use std::fmt;

/// A header that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The input said no.
    #[error("cannot be read: {source}")]
    Io {
        /// Why.
        source: std::io::Error,
    },
    /// It does not begin with `GGUF`.
    #[error("is not a GGUF file")]
    NotGguf,
    /// Its numbers have their most significant byte first.
    #[error("is big-endian")]
    BigEndian,
    /// A version other than 2 and 3.
    #[error("has version {version}")]
    UnsupportedVersion {
        /// Which one.
        version: u32,
    },
    /// The file ends before what the header promises.
    #[error("{field} needs {needed} bytes, the file has {present}")]
    Truncated {
        /// Which part does not fit.
        field: Field,
        /// End of that part, in bytes from the file's start.
        needed: u64,
        /// Bytes in the file.
        present: u64,
    },
    /// The header contradicts its own format.
    #[error("{field} {flaw}")]
    Corrupt {
        /// Which part.
        field: Field,
        /// What is wrong with it.
        flaw: Flaw,
    },
}

impl ReadError {
    /// Whether the same file may be read later without anybody changing it.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Io { source } => matches!(
                source.kind(),
                std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock
            ),
            Self::NotGguf
            | Self::BigEndian
            | Self::UnsupportedVersion { .. }
            | Self::Truncated { .. }
            | Self::Corrupt { .. } => false,
        }
    }
}

/// A part of the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Field {
    /// The first four bytes.
    Magic,
    /// The format's version.
    Version,
    /// How many tensors and metadata entries there are.
    Counts,
    /// A metadata entry whose key was not read.
    Entry {
        /// Which, from 0.
        index: u64,
        /// Of how many.
        count: u64,
    },
    /// A metadata value.
    Metadata {
        /// Its key.
        key: String,
    },
    /// A tensor whose name was not read.
    TensorEntry {
        /// Which, from 0.
        index: u64,
    },
    /// A tensor.
    Tensor {
        /// Its name.
        name: String,
    },
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => f.write_str("magic number"),
            Self::Version => f.write_str("version"),
            Self::Counts => f.write_str("header"),
            Self::Entry { index, .. } => write!(f, "metadata entry {index}"),
            Self::Metadata { key } => write!(f, "metadata {key}"),
            Self::TensorEntry { index } => write!(f, "tensor entry {index}"),
            Self::Tensor { name } => write!(f, "tensor {name}"),
        }
    }
}

/// What is wrong with a part of the header. Each continues a sentence that begins with the part.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// Text in another encoding.
    #[error("is not UTF-8")]
    NotUtf8,
    /// A boolean that is neither 0 nor 1.
    #[error("is neither true nor false")]
    NotBool,
    /// A metadata value of a type that the format does not have.
    #[error("has the unknown value type {kind}")]
    UnknownValueType {
        /// Its number.
        kind: u32,
    },
    /// An array of a type that the format does not have.
    #[error("is an array of the unknown value type {kind}")]
    UnknownElementType {
        /// Its number.
        kind: u32,
    },
    /// Arrays in arrays in arrays.
    #[error("nests arrays too deeply")]
    NestedTooDeeply,
    /// A key or name that was there before.
    #[error("appears twice")]
    Twice,
    /// An alignment that is none.
    #[error("is {found}, expected a power of two up to {max}")]
    Alignment {
        /// The value, for people.
        found: String,
        /// The largest that is believed.
        max: u64,
    },
    /// A scalar, or more dimensions than the format has.
    #[error("has {found} dimensions, expected 1 to {max}")]
    Dimensions {
        /// How many.
        found: u32,
        /// How many there may be.
        max: u32,
    },
    /// Dimensions whose product overflows.
    #[error("has more elements than any file")]
    TooManyElements,
    /// A size that overflows.
    #[error("has more bytes than any file")]
    TooManyBytes,
    /// Rows that are no whole number of blocks.
    #[error("has rows of {row}, no multiple of {block}")]
    PartialBlock {
        /// Elements of a row.
        row: u64,
        /// Elements of a block.
        block: u64,
    },
    /// A tensor that does not start where the alignment wants it.
    #[error("starts at {offset}, no multiple of {alignment}")]
    Unaligned {
        /// Its offset, in bytes from the start of the data.
        offset: u64,
        /// In bytes.
        alignment: u64,
    },
}
