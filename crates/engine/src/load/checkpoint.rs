//! A model as its files hold it: checked hyperparameters and weights by name.

use super::mapped::Mapped;
use crate::error::LoadError;
use crate::model::{ElementType, ModelConfig, Naming, Tensor, TensorName};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

/// Where a weight lies. `bytes` was checked against the file's length and the shape.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// Index into the checkpoint's files.
    pub file: usize,
    /// Element type; `Err` names one that we do not read, which matters only if the tensor is wanted.
    pub element: Result<ElementType, String>,
    /// Outermost dimension first.
    pub shape: Vec<u64>,
    /// Its bytes in the file.
    pub bytes: Range<usize>,
}

/// Mapped files and what they say.
pub(crate) struct Checkpoint {
    /// Hyperparameters, checked.
    pub config: ModelConfig,
    /// What the user named: a file or a folder.
    pub path: PathBuf,
    pub(super) naming: Naming,
    pub(super) files: Vec<Mapped>,
    pub(super) entries: BTreeMap<String, Entry>,
}

impl Checkpoint {
    /// A weight that must be there with the shape that the hyperparameters ask for.
    ///
    /// # Errors
    /// [`LoadError::MissingTensor`], [`LoadError::WrongShape`], [`LoadError::UnsupportedTensorType`].
    pub(crate) fn tensor(&self, name: TensorName) -> Result<Tensor<'_>, LoadError> {
        let text = name.in_file(self.naming);
        let Some(entry) = self.entries.get(&text) else {
            return Err(LoadError::MissingTensor {
                path: self.path.clone(),
                tensor: text,
            });
        };
        let file = &self.files[entry.file];
        let expected = name.shape(&self.config);
        if entry.shape != expected {
            let found = entry.shape.clone();
            return Err(LoadError::WrongShape {
                path: file.path.clone(),
                tensor: text,
                found,
                expected,
            });
        }
        match &entry.element {
            Ok(element) => {
                let data = &file.bytes()[entry.bytes.clone()];
                Ok(Tensor {
                    element: *element,
                    shape: expected,
                    data,
                })
            }
            Err(found) => Err(LoadError::UnsupportedTensorType {
                path: file.path.clone(),
                tensor: text,
                found: found.clone(),
                supported: ElementType::SUPPORTED,
            }),
        }
    }
}

impl Checkpoint {
    /// A weight that was read for the last time: its file's pages need not stay resident.
    pub(crate) fn release(&self, name: TensorName) {
        if let Some(entry) = self.entries.get(&name.in_file(self.naming)) {
            self.files[entry.file].release(entry.bytes.clone());
        }
    }

    /// The error for a weight that there is no memory for.
    pub(crate) fn no_memory(&self, name: TensorName, source: std::io::Error) -> LoadError {
        LoadError::Memory {
            path: self.path.clone(),
            tensor: name.in_file(self.naming),
            source,
        }
    }

    /// The error for a vector (norm or bias) in a type that only matrices have.
    pub(crate) fn unsupported_vector(&self, name: TensorName, found: ElementType) -> LoadError {
        LoadError::UnsupportedTensorType {
            path: self.path.clone(),
            tensor: name.in_file(self.naming),
            found: found.name().to_owned(),
            supported: "F32, F16, BF16",
        }
    }
}
