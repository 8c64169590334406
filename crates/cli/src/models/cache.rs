//! The folder of fetched models. A model is written beside its place and renamed into it once it is checked, so that
//! what has its name is whole. This tool owns the folder.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const PARTIAL: &str = ".partial-";

/// `$BATON_CACHE`, or `$XDG_CACHE_HOME/baton/models`, or `~/.cache/baton/models`; made where missing.
pub fn folder() -> Result<PathBuf> {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let folder = variable("BATON_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("baton/models")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/baton/models")))
        .context("no place for models: set BATON_CACHE to a folder")?;
    std::fs::create_dir_all(&folder).with_context(|| {
        format!(
            "cannot make the model folder {}: set BATON_CACHE to another",
            folder.display()
        )
    })?;
    sweep(&folder);
    Ok(folder)
}

/// A folder inside the cache for a download in progress; it goes when it is dropped.
pub fn scratch(folder: &Path) -> Result<TempDir> {
    tempfile::Builder::new()
        .prefix(&format!("{PARTIAL}{}-", std::process::id()))
        .tempdir_in(folder)
        .with_context(|| {
            format!(
                "cannot write to {}: set BATON_CACHE to another folder",
                folder.display()
            )
        })
}

/// Removes what processes that were killed left behind.
fn sweep(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name
            .to_str()
            .and_then(|name| name.strip_prefix(PARTIAL)?.split('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_leftovers_of_dead_processes_are_swept() {
        let folder = tempfile::tempdir().unwrap();
        let mine = scratch(folder.path()).unwrap();
        // Above the kernel's largest process id.
        let dead = folder.path().join(".partial-4194305-x");
        std::fs::create_dir(&dead).unwrap();
        sweep(folder.path());
        assert!(mine.path().exists());
        assert!(!dead.exists());
    }
}
