//! A model file in memory, read-only. Mapped, not read: pages come as they are needed and go under pressure.

#![allow(unsafe_code)]

use crate::error::LoadError;
use memmap2::{Mmap, UncheckedAdvice};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One mapped file.
pub(super) struct Mapped {
    /// Where it is.
    pub path: PathBuf,
    map: Mmap,
}

impl Mapped {
    /// Maps a file.
    ///
    /// # Errors
    /// [`LoadError::Io`].
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        let fail = |source| LoadError::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(fail)?;
        // SAFETY: the map is private and read-only, and only bytes are read from it. It lives while the model is loaded,
        // not while it runs: weights are packed into memory of our own. Whoever shortens the file in these seconds gets
        // the process killed by SIGBUS, as with every mapped file; no wrong value can come of it.
        let map = unsafe { Mmap::map(&file) }.map_err(fail)?;
        Ok(Self {
            path: path.to_owned(),
            map,
        })
    }

    /// These bytes are not needed for a while: they need not stay resident. Who reads them again gets them from the file.
    pub(super) fn release(&self, bytes: Range<usize>) {
        // SAFETY: the map is of a file and never written to, so what is dropped comes back as it was.
        let done = unsafe {
            self.map
                .unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len())
        };
        if let Err(error) = done {
            tracing::debug!(path = %self.path.display(), %error, "pages of the model file stay resident");
        }
    }

    /// All of it.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }
}
