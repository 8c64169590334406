//! The header of a GGUF file: metadata and the list of tensors.
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little-endian.
//!
//! A reader of our own: the small crates for it trust the header (they panic on an unknown element type or a large count,
//! and reserve memory by the header's word), while a truncated or hostile file must be an error here.

use crate::error::LoadError;
use crate::model::ElementType;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// Numeric arrays up to this length are kept; longer ones (tokens, scores) are skipped.
const ARRAY_KEPT_MAX: u64 = 4_096;
const NESTING_MAX: u32 = 4;
const DIMENSIONS_MAX: u32 = 4;
const ALIGNMENT_DEFAULT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 20;

/// A metadata value, as far as the engine cares.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Numbers(Vec<Value>),
    /// Strings, nested or long arrays.
    Skipped,
}

/// One tensor, checked to lie within the file.
#[derive(Debug, Clone)]
pub(super) struct TensorInfo {
    pub name: String,
    pub element: Result<ElementType, String>,
    /// Outermost dimension first (files have it last).
    pub shape: Vec<u64>,
    pub bytes: Range<usize>,
}

/// A parsed header.
#[derive(Debug)]
pub(super) struct Header {
    pub metadata: HashMap<String, Value>,
    pub tensors: Vec<TensorInfo>,
}

/// Reads forward through the file; every read is checked.
struct Cursor<'a> {
    path: &'a Path,
    data: &'a [u8],
    at: usize,
    /// What is being read, for messages.
    field: String,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: u64) -> Result<&'a [u8], LoadError> {
        let end = (self.at as u64).saturating_add(len);
        match usize::try_from(end).ok().and_then(|end| self.data.get(self.at..end)) {
            Some(bytes) => {
                self.at += bytes.len();
                Ok(bytes)
            }
            None => Err(LoadError::Truncated {
                path: self.path.to_owned(),
                field: self.field.clone(),
                needed: end,
                present: self.data.len() as u64,
            }),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], LoadError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, LoadError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, LoadError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<&'a str, LoadError> {
        let len = self.u64()?;
        let bytes = self.take(len)?;
        std::str::from_utf8(bytes).map_err(|_| self.corrupt("is no UTF-8"))
    }

    fn corrupt(&self, reason: impl Into<String>) -> LoadError {
        LoadError::Corrupt {
            path: self.path.to_owned(),
            field: self.field.clone(),
            reason: reason.into(),
        }
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value, LoadError> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?.to_owned()),
            9 => self.array_value(depth)?,
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(self.corrupt(format!("has the unknown value type {kind}"))),
        })
    }

    fn array_value(&mut self, depth: u32) -> Result<Value, LoadError> {
        if depth >= NESTING_MAX {
            return Err(self.corrupt("nests arrays too deeply"));
        }
        let kind = self.u32()?;
        let len = self.u64()?;
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => {
                for _ in 0..len {
                    let bytes = self.u64()?;
                    self.take(bytes)?;
                }
                return Ok(Value::Skipped);
            }
            9 => {
                for _ in 0..len {
                    self.array_value(depth + 1)?;
                }
                return Ok(Value::Skipped);
            }
            _ => return Err(self.corrupt(format!("is an array of the unknown value type {kind}"))),
        };
        if len > ARRAY_KEPT_MAX {
            self.take(
                len.checked_mul(width)
                    .ok_or_else(|| self.corrupt("is longer than any file"))?,
            )?;
            return Ok(Value::Skipped);
        }
        (0..len)
            .map(|_| self.value(kind, depth + 1))
            .collect::<Result<_, _>>()
            .map(Value::Numbers)
    }

    /// A tensor's name, type, shape, and offset from the start of the data.
    fn tensor(&mut self) -> Result<(TensorInfo, u64, u64), LoadError> {
        let name = self.text()?.to_owned();
        self.field = format!("tensor {name}");
        let dimensions = self.u32()?;
        if dimensions == 0 || dimensions > DIMENSIONS_MAX {
            return Err(self.corrupt(format!("has {dimensions} dimensions, expected 1 to {DIMENSIONS_MAX}")));
        }
        let mut shape = (0..dimensions).map(|_| self.u64()).collect::<Result<Vec<_>, _>>()?;
        let kind = self.u32()?;
        let offset = self.u64()?;
        let element = element_type(kind);
        let elements = shape.iter().try_fold(1u64, |product, n| product.checked_mul(*n));
        let elements = elements.ok_or_else(|| self.corrupt("has more elements than any file"))?;
        let bytes = match &element {
            Ok(element) => {
                let block = element.block_elements();
                if shape[0] % block != 0 {
                    return Err(self.corrupt(format!("has rows of {}, no multiple of {block}", shape[0])));
                }
                let bytes = (elements / block).checked_mul(element.block_bytes());
                bytes.ok_or_else(|| self.corrupt("has more bytes than any file"))?
            }
            // Of a type that we do not read, nothing is read; only its being wanted is an error.
            Err(_) => 0,
        };
        shape.reverse();
        Ok((
            TensorInfo {
                name,
                element,
                shape,
                bytes: 0..0,
            },
            offset,
            bytes,
        ))
    }
}

fn element_type(kind: u32) -> Result<ElementType, String> {
    let name = match kind {
        0 => return Ok(ElementType::F32),
        1 => return Ok(ElementType::F16),
        2 => return Ok(ElementType::Q4_0),
        3 => return Ok(ElementType::Q4_1),
        8 => return Ok(ElementType::Q8_0),
        30 => return Ok(ElementType::Bf16),
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return Err(format!("ggml type {kind}")),
    };
    Err(name.to_owned())
}

/// Parses a file's header.
///
/// # Errors
/// [`LoadError::NotAModel`], [`LoadError::Truncated`], [`LoadError::Corrupt`], [`LoadError::UnsupportedFeature`].
pub(super) fn parse(path: &Path, data: &[u8]) -> Result<Header, LoadError> {
    let mut cursor = Cursor {
        path,
        data,
        at: 0,
        field: "magic number".into(),
    };
    if cursor.array::<4>()? != *b"GGUF" {
        return Err(LoadError::NotAModel { path: path.to_owned() });
    }
    cursor.field = "version".into();
    let version = cursor.u32()?;
    if version != 2 && version != 3 {
        return Err(LoadError::UnsupportedFeature {
            path: path.to_owned(),
            field: "GGUF version".into(),
            found: if version.swap_bytes() <= 3 {
                "big-endian".into()
            } else {
                version.to_string()
            },
            expected: "2 or 3, little-endian".into(),
        });
    }
    cursor.field = "header".into();
    let tensor_count = cursor.u64()?;
    let metadata_count = cursor.u64()?;
    let mut metadata = HashMap::new();
    // Each turn takes at least 12 bytes or fails, so the file's length bounds the loop whatever the count says.
    for index in 0..metadata_count {
        cursor.field = format!("metadata entry {index}");
        let key = cursor.text()?.to_owned();
        cursor.field = format!("metadata {key}");
        let kind = cursor.u32()?;
        let value = cursor.value(kind, 0)?;
        if metadata.insert(key, value).is_some() {
            return Err(cursor.corrupt("appears twice"));
        }
    }
    let tensors = tensors(&mut cursor, tensor_count, alignment(path, &metadata)?)?;
    Ok(Header { metadata, tensors })
}

fn alignment(path: &Path, metadata: &HashMap<String, Value>) -> Result<u64, LoadError> {
    match metadata.get("general.alignment") {
        None => Ok(ALIGNMENT_DEFAULT),
        Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= ALIGNMENT_MAX => Ok(*n),
        Some(other) => Err(LoadError::Corrupt {
            path: path.to_owned(),
            field: "metadata general.alignment".into(),
            reason: format!("is {other:?}, expected a power of two"),
        }),
    }
}

fn tensors(cursor: &mut Cursor<'_>, count: u64, alignment: u64) -> Result<Vec<TensorInfo>, LoadError> {
    let mut tensors = Vec::new();
    for index in 0..count {
        cursor.field = format!("tensor entry {index}");
        tensors.push(cursor.tensor()?);
    }
    let start = (cursor.at as u64).next_multiple_of(alignment);
    let present = cursor.data.len() as u64;
    let mut out = Vec::with_capacity(tensors.len());
    for (mut info, offset, bytes) in tensors {
        cursor.field = format!("tensor {}", info.name);
        if offset % alignment != 0 {
            return Err(cursor.corrupt(format!("starts at {offset}, no multiple of {alignment}")));
        }
        let needed = start.saturating_add(offset).saturating_add(bytes);
        if needed > present {
            let (path, field) = (cursor.path.to_owned(), cursor.field.clone());
            return Err(LoadError::Truncated {
                path,
                field,
                needed,
                present,
            });
        }
        // Both ends are at most the file's length, which is a usize.
        info.bytes = (start + offset) as usize..needed as usize;
        out.push(info);
    }
    Ok(out)
}
