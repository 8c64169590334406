//! A GGUF file's header in the engine's terms: element types that run here, places in the map, errors with the path.

use super::checkpoint::Entry;
use crate::error::LoadError;
use crate::model::ElementType;
use baton_gguf::{Header, Layout, ReadError, TensorInfo};
use std::path::Path;

/// Arrays up to this length are kept, one entry per layer; longer ones (tokens, scores) are skipped.
const ARRAY_KEPT_MAX: u64 = 4_096;

/// Parses a file's header.
///
/// # Errors
/// [`LoadError::NotAModel`], [`LoadError::Truncated`], [`LoadError::Corrupt`], [`LoadError::UnsupportedFeature`].
pub(super) fn parse(path: &Path, data: &[u8]) -> Result<Header, LoadError> {
    let layout = |kind| {
        let element = element_type(kind).ok()?;
        Some(Layout {
            block_elements: element.block_elements(),
            block_bytes: element.block_bytes(),
        })
    };
    baton_gguf::read_header(data, data.len() as u64, ARRAY_KEPT_MAX, layout).map_err(|error| load_error(path, error))
}

/// A tensor of a mapped file.
pub(super) fn entry(tensor: TensorInfo) -> Entry {
    let place = |at| usize::try_from(at).expect("it was checked against the length of a slice");
    Entry {
        file: 0,
        element: element_type(tensor.kind),
        bytes: place(tensor.bytes.start)..place(tensor.bytes.end),
        shape: tensor.shape,
    }
}

/// What runs here; `Err` names another type, which matters only if the tensor is wanted.
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

fn load_error(path: &Path, error: ReadError) -> LoadError {
    let path = path.to_owned();
    let unsupported = |path, found| LoadError::UnsupportedFeature {
        path,
        field: "GGUF version".into(),
        found,
        expected: "2 or 3, little-endian".into(),
    };
    match error {
        ReadError::Io { source } => LoadError::Io { path, source },
        ReadError::NotGguf => LoadError::NotAModel { path },
        ReadError::BigEndian => unsupported(path, "big-endian".into()),
        ReadError::UnsupportedVersion { version } => unsupported(path, version.to_string()),
        ReadError::Truncated { field, needed, present } => LoadError::Truncated {
            path,
            field: field.to_string(),
            needed,
            present,
        },
        ReadError::Corrupt { field, flaw } => LoadError::Corrupt {
            path,
            field: field.to_string(),
            reason: flaw.to_string(),
        },
    }
}
