//! Reads forward through the input; every read is checked against the file's length.

use crate::error::{Field, Flaw, ReadError};
use crate::value::Value;
use std::io::{self, ErrorKind, Read};

const NESTING_MAX: u32 = 4;
/// Bytes that a text's length reserves at once; a longer one grows by what is really there.
const RESERVED_MAX: u64 = 1 << 16;

pub(crate) struct Cursor<R> {
    input: R,
    /// Bytes of the file.
    pub len: u64,
    /// Bytes that were read.
    pub at: u64,
    /// What is being read, for errors.
    pub field: Field,
    /// Longer arrays are read over.
    array_kept_max: u64,
}

impl<R: Read> Cursor<R> {
    pub(crate) fn new(input: R, len: u64, array_kept_max: u64) -> Self {
        Self {
            input,
            len,
            at: 0,
            field: Field::Magic,
            array_kept_max,
        }
    }

    pub(crate) fn corrupt(&self, flaw: Flaw) -> ReadError {
        ReadError::Corrupt {
            field: self.field.clone(),
            flaw,
        }
    }

    pub(crate) fn truncated(&self, needed: u64, present: u64) -> ReadError {
        ReadError::Truncated {
            field: self.field.clone(),
            needed,
            present,
        }
    }

    /// Refuses what is longer than the rest of the file.
    fn claim(&self, count: u64, size: u64) -> Result<u64, ReadError> {
        let bytes = count.saturating_mul(size);
        let end = self.at.saturating_add(bytes);
        if end > self.len {
            return Err(self.truncated(end, self.len));
        }
        Ok(bytes)
    }

    /// Counts what was read. Less than was claimed: the file is shorter than was said.
    fn advance(&mut self, claimed: u64, read: u64) -> Result<(), ReadError> {
        let start = self.at;
        self.at = start.saturating_add(read);
        if read < claimed {
            return Err(self.truncated(start.saturating_add(claimed), self.at));
        }
        Ok(())
    }

    pub(crate) fn bytes<const N: usize>(&mut self) -> Result<[u8; N], ReadError> {
        let claimed = self.claim(N as u64, 1)?;
        let mut out = [0; N];
        match self.input.read_exact(&mut out) {
            Ok(()) => self.advance(claimed, claimed)?,
            Err(source) if source.kind() == ErrorKind::UnexpectedEof => self.advance(claimed, 0)?,
            Err(source) => return Err(ReadError::Io { source }),
        }
        Ok(out)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, ReadError> {
        self.bytes().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, ReadError> {
        self.bytes().map(u64::from_le_bytes)
    }

    pub(crate) fn text(&mut self) -> Result<String, ReadError> {
        let length = self.u64()?;
        let length = self.claim(length, 1)?;
        let mut bytes = Vec::with_capacity(length.min(RESERVED_MAX) as usize);
        let read = self.input.by_ref().take(length).read_to_end(&mut bytes);
        read.map_err(|source| ReadError::Io { source })?;
        self.advance(length, bytes.len() as u64)?;
        String::from_utf8(bytes).map_err(|_| self.corrupt(Flaw::NotUtf8))
    }

    fn skip(&mut self, count: u64, size: u64) -> Result<(), ReadError> {
        let bytes = self.claim(count, size)?;
        let skipped = io::copy(&mut self.input.by_ref().take(bytes), &mut io::sink());
        self.advance(bytes, skipped.map_err(|source| ReadError::Io { source })?)
    }

    /// A metadata value with its type before it.
    pub(crate) fn value(&mut self) -> Result<Value, ReadError> {
        Ok(match self.u32()? {
            6 => Value::Float(f32::from_le_bytes(self.bytes()?).into()),
            7 => match self.bytes()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                _ => return Err(self.corrupt(Flaw::NotBool)),
            },
            8 => Value::Text(self.text()?),
            9 => self.array(0, true)?,
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            kind => match self.integer(kind)? {
                Some(number) => Value::Integer(number),
                None => return Err(self.corrupt(Flaw::UnknownValueType { kind })),
            },
        })
    }

    /// None for a type that is no integer.
    fn integer(&mut self, kind: u32) -> Result<Option<i128>, ReadError> {
        Ok(Some(match kind {
            0 => u8::from_le_bytes(self.bytes()?).into(),
            1 => i8::from_le_bytes(self.bytes()?).into(),
            2 => u16::from_le_bytes(self.bytes()?).into(),
            3 => i16::from_le_bytes(self.bytes()?).into(),
            4 => self.u32()?.into(),
            5 => i32::from_le_bytes(self.bytes()?).into(),
            10 => self.u64()?.into(),
            11 => i64::from_le_bytes(self.bytes()?).into(),
            _ => return Ok(None),
        }))
    }

    fn array(&mut self, depth: u32, wanted: bool) -> Result<Value, ReadError> {
        if depth >= NESTING_MAX {
            return Err(self.corrupt(Flaw::NestedTooDeeply));
        }
        let kind = self.u32()?;
        let count = self.u64()?;
        // Of a text the least is its length, of an array its type and its count.
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            _ => return Err(self.corrupt(Flaw::UnknownElementType { kind })),
        };
        // Bounds every loop below by the file's length, whatever the count says.
        self.claim(count, size)?;
        let kept = wanted && count <= self.array_kept_max;
        match kind {
            8 if kept => {
                return (0..count)
                    .map(|_| self.text())
                    .collect::<Result<_, _>>()
                    .map(Value::Texts);
            }
            8 => {
                for _ in 0..count {
                    let length = self.u64()?;
                    self.skip(length, 1)?;
                }
            }
            9 => {
                for _ in 0..count {
                    self.array(depth + 1, false)?;
                }
            }
            6 | 7 | 12 => self.skip(count, size)?,
            _ if kept => {
                // Not reserved by the count: an element takes up to 16 times the memory that it takes in the file.
                let mut numbers = Vec::new();
                for _ in 0..count {
                    numbers.extend(self.integer(kind)?);
                }
                return Ok(Value::Integers(numbers));
            }
            _ => self.skip(count, size)?,
        }
        Ok(Value::Skipped)
    }
}
