//! From bytes to metadata and tensors.

use crate::cursor::Cursor;
use crate::error::{Field, Flaw, ReadError};
use crate::value::Metadata;
use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;

const DIMENSIONS_MAX: u32 = 4;
const ALIGNMENT_KEY: &str = "general.alignment";
const ALIGNMENT_DEFAULT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 20;

/// How elements of a type lie in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Elements of one block; a row is a whole number of blocks.
    pub block_elements: u64,
    /// Bytes of one block.
    pub block_bytes: u64,
}

/// One tensor, checked to lie within the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Number of its element type in ggml.
    pub kind: u32,
    /// Outermost dimension first (files have it last); one to four of them.
    pub shape: Vec<u64>,
    /// Where it lies, in bytes from the file's start; empty for a type whose layout the caller does not know.
    pub bytes: Range<u64>,
}

/// All that stands before the tensors' data.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Values by key.
    pub metadata: Metadata,
    /// Tensors by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// Reads the metadata, and nothing behind it. `input` stands at the start of a file of `len` bytes; of arrays longer than
/// `array_kept_max` nothing is kept.
///
/// # Errors
/// See [`ReadError`].
pub fn read_metadata(input: impl Read, len: u64, array_kept_max: u64) -> Result<Metadata, ReadError> {
    let mut cursor = Cursor::new(input, len, array_kept_max);
    metadata(&mut cursor).map(|(metadata, _)| metadata)
}

/// Reads metadata and tensors. As [`read_metadata`]; `layout` knows the element types that the caller reads, by their
/// numbers in ggml. A tensor of another type is listed, since it may not be wanted; only its start is checked.
///
/// # Errors
/// See [`ReadError`].
pub fn read_header(
    input: impl Read,
    len: u64,
    array_kept_max: u64,
    layout: impl Fn(u32) -> Option<Layout>,
) -> Result<Header, ReadError> {
    let mut cursor = Cursor::new(input, len, array_kept_max);
    let (metadata, tensor_count) = metadata(&mut cursor)?;
    let alignment = alignment(&metadata)?;
    let tensors = tensors(&mut cursor, tensor_count, alignment, layout)?;
    Ok(Header { metadata, tensors })
}

/// The metadata, and how many tensors follow.
fn metadata(cursor: &mut Cursor<impl Read>) -> Result<(Metadata, u64), ReadError> {
    if cursor.bytes()? != *b"GGUF" {
        return Err(ReadError::NotGguf);
    }
    cursor.field = Field::Version;
    match cursor.u32()? {
        2 | 3 => {}
        version if (1..=3).contains(&version.swap_bytes()) => return Err(ReadError::BigEndian),
        version => return Err(ReadError::UnsupportedVersion { version }),
    }
    cursor.field = Field::Counts;
    let tensor_count = cursor.u64()?;
    let count = cursor.u64()?;
    let mut metadata = Metadata::default();
    // Each turn takes at least 12 bytes or fails, so the file's length bounds the loop whatever the count says.
    for index in 0..count {
        cursor.field = Field::Entry { index, count };
        let key = cursor.text()?;
        cursor.field = Field::Metadata { key: key.clone() };
        let value = cursor.value()?;
        if !metadata.insert(key, value) {
            return Err(cursor.corrupt(Flaw::Twice));
        }
    }
    Ok((metadata, tensor_count))
}

fn alignment(metadata: &Metadata) -> Result<u64, ReadError> {
    let Some(value) = metadata.get(ALIGNMENT_KEY) else {
        return Ok(ALIGNMENT_DEFAULT);
    };
    let sane = |number: &u64| number.is_power_of_two() && *number <= ALIGNMENT_MAX;
    value.as_u64().filter(sane).ok_or_else(|| ReadError::Corrupt {
        field: Field::Metadata {
            key: ALIGNMENT_KEY.into(),
        },
        flaw: Flaw::Alignment {
            found: value.to_string(),
            max: ALIGNMENT_MAX,
        },
    })
}

/// A tensor before it is known where the data start.
struct Listed {
    name: String,
    kind: u32,
    shape: Vec<u64>,
    offset: u64,
    bytes: u64,
}

fn tensors(
    cursor: &mut Cursor<impl Read>,
    count: u64,
    alignment: u64,
    layout: impl Fn(u32) -> Option<Layout>,
) -> Result<BTreeMap<String, TensorInfo>, ReadError> {
    let mut list = Vec::new();
    // Each turn takes at least 32 bytes or fails.
    for index in 0..count {
        cursor.field = Field::TensorEntry { index };
        list.push(listed(cursor, &layout)?);
    }
    let start = cursor.at.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
    let mut tensors = BTreeMap::new();
    for tensor in list {
        cursor.field = Field::Tensor {
            name: tensor.name.clone(),
        };
        let offset = tensor.offset;
        if offset % alignment != 0 {
            return Err(cursor.corrupt(Flaw::Unaligned { offset, alignment }));
        }
        let from = start.saturating_add(offset);
        let to = from.saturating_add(tensor.bytes);
        if to > cursor.len {
            return Err(cursor.truncated(to, cursor.len));
        }
        let info = TensorInfo {
            kind: tensor.kind,
            shape: tensor.shape,
            bytes: from..to,
        };
        if tensors.insert(tensor.name, info).is_some() {
            return Err(cursor.corrupt(Flaw::Twice));
        }
    }
    Ok(tensors)
}

fn listed(cursor: &mut Cursor<impl Read>, layout: impl Fn(u32) -> Option<Layout>) -> Result<Listed, ReadError> {
    let name = cursor.text()?;
    cursor.field = Field::Tensor { name: name.clone() };
    let dimensions = cursor.u32()?;
    if dimensions == 0 || dimensions > DIMENSIONS_MAX {
        let (found, max) = (dimensions, DIMENSIONS_MAX);
        return Err(cursor.corrupt(Flaw::Dimensions { found, max }));
    }
    let mut shape = (0..dimensions).map(|_| cursor.u64()).collect::<Result<Vec<_>, _>>()?;
    let kind = cursor.u32()?;
    let offset = cursor.u64()?;
    let elements = shape.iter().try_fold(1u64, |product, n| product.checked_mul(*n));
    let elements = elements.ok_or_else(|| cursor.corrupt(Flaw::TooManyElements))?;
    let bytes = match layout(kind) {
        Some(layout) => {
            let (row, block) = (shape[0], layout.block_elements);
            if !row.is_multiple_of(block) {
                return Err(cursor.corrupt(Flaw::PartialBlock { row, block }));
            }
            let blocks = elements.checked_div(block).unwrap_or(0);
            let bytes = blocks.checked_mul(layout.block_bytes);
            bytes.ok_or_else(|| cursor.corrupt(Flaw::TooManyBytes))?
        }
        None => 0,
    };
    shape.reverse();
    Ok(Listed {
        name,
        kind,
        shape,
        offset,
        bytes,
    })
}

#[cfg(test)]
mod tests;
