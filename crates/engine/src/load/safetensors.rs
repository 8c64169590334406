//! Hugging Face folders: config.json beside one or several safetensors files.

use super::checkpoint::{Checkpoint, Entry};
use super::hf_config;
use super::mapped::Mapped;
use crate::error::LoadError;
use crate::model::{ElementType, Naming};
use ::safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Maps and checks a folder.
///
/// # Errors
/// See [`LoadError`].
pub(super) fn open(folder: &Path) -> Result<Checkpoint, LoadError> {
    let config = hf_config::read(folder)?;
    let mut files = Vec::new();
    let mut entries = BTreeMap::new();
    for path in shards(folder)? {
        let file = Mapped::open(&path)?;
        for (name, entry) in read(&file, files.len())? {
            if entries.insert(name.clone(), entry).is_some() {
                let (field, reason) = (format!("tensor {name}"), "stands in two files".into());
                return Err(LoadError::Corrupt { path, field, reason });
            }
        }
        files.push(file);
    }
    Ok(Checkpoint {
        config,
        path: folder.to_owned(),
        naming: Naming::HuggingFace,
        files,
        entries,
    })
}

/// The files to read: those that the index names, else the single one.
fn shards(folder: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let index = folder.join(INDEX);
    if !index.is_file() {
        return Ok(vec![folder.join(SINGLE)]);
    }
    let corrupt = |field: &str, reason: String| {
        let (path, field) = (index.clone(), field.to_owned());
        LoadError::Corrupt { path, field, reason }
    };
    let bytes = std::fs::read(&index).map_err(|source| LoadError::Io {
        path: index.clone(),
        source,
    })?;
    let json: Value = serde_json::from_slice(&bytes).map_err(|error| corrupt("JSON", error.to_string()))?;
    let map = json["weight_map"]
        .as_object()
        .ok_or_else(|| corrupt("weight_map", "is no object".into()))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        // A plain file name: an index must not lead out of its folder.
        let plain = |name: &&str| {
            matches!(
                Path::new(name).components().collect::<Vec<_>>()[..],
                [Component::Normal(_)]
            )
        };
        let name = file.as_str().filter(plain);
        names.insert(name.ok_or_else(|| corrupt("weight_map", format!("gives no file name for {tensor}")))?);
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

fn read(file: &Mapped, index: usize) -> Result<Vec<(String, Entry)>, LoadError> {
    let bytes = file.bytes();
    let (header_len, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| failed(file, &error))?;
    // The length's own eight bytes, then the header; the crate checked that the data end with the file.
    let start = header_len + 8;
    let entries = metadata.tensors().into_iter().map(|(name, info)| {
        let element = match info.dtype {
            Dtype::F32 => Ok(ElementType::F32),
            Dtype::F16 => Ok(ElementType::F16),
            Dtype::BF16 => Ok(ElementType::Bf16),
            other => Err(format!("{other:?}")),
        };
        let shape = info.shape.iter().map(|n| *n as u64).collect();
        let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
        (
            name,
            Entry {
                file: index,
                element,
                shape,
                bytes,
            },
        )
    });
    Ok(entries.collect())
}

fn failed(file: &Mapped, error: &SafeTensorError) -> LoadError {
    let bytes = file.bytes();
    let present = bytes.len() as u64;
    let path = file.path.clone();
    let truncated = |field: &str, needed: u64| {
        let (path, field) = (path.clone(), field.to_owned());
        LoadError::Truncated {
            path,
            field,
            needed,
            present,
        }
    };
    let Some(prefix) = bytes.first_chunk::<8>() else {
        return truncated("header length", 8);
    };
    let header_end = u64::from_le_bytes(*prefix).saturating_add(8);
    match error {
        SafeTensorError::InvalidHeaderLength => truncated("header", header_end),
        SafeTensorError::MetadataIncompleteBuffer => match data_end(bytes, header_end) {
            Some(end) if end > present => truncated("tensor data", end),
            _ => {
                let (field, reason) = ("tensor data".into(), "the header does not cover all of it".into());
                LoadError::Corrupt { path, field, reason }
            }
        },
        other => LoadError::Corrupt {
            path,
            field: "header".into(),
            reason: other.to_string(),
        },
    }
}

/// Where the last tensor ends by the header's word.
fn data_end(bytes: &[u8], header_end: u64) -> Option<u64> {
    let header = bytes.get(8..usize::try_from(header_end).ok()?)?;
    let json: Value = serde_json::from_slice(header).ok()?;
    let ends = json
        .as_object()?
        .values()
        .filter_map(|tensor| tensor["data_offsets"].get(1)?.as_u64());
    ends.max()?.checked_add(header_end)
}
