//! The workspace as cargo and git see it.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One package of the workspace.
pub struct Package {
    pub name: String,
    /// Names of packages, with the kind of dependency: empty for a normal one, else `dev` or `build`.
    pub dependencies: BTreeSet<(String, String)>,
}

/// The repository's root folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests folder stands in the repository")
        .to_owned()
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(root())
        .output()
        .unwrap_or_else(|error| panic!("{program} cannot be run: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?} failed: {errors}");
    String::from_utf8(output.stdout).expect("paths and metadata are UTF-8")
}

/// The packages and what each of them names in its manifest.
pub fn packages() -> Vec<Package> {
    let metadata = output(
        env!("CARGO"),
        &["metadata", "--format-version", "1", "--no-deps", "--offline"],
    );
    let metadata: Value = serde_json::from_str(&metadata).expect("cargo prints JSON");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let packages: Vec<Package> = list(&metadata["packages"])
        .iter()
        .map(|package| Package {
            name: text(&package["name"]),
            dependencies: list(&package["dependencies"])
                .iter()
                .map(|dependency| (text(&dependency["name"]), text(&dependency["kind"])))
                .collect(),
        })
        .collect();
    assert!(packages.len() > 10, "cargo metadata names too few packages");
    packages
}

/// Files that are in the repository, or would be with the next commit, relative to its root. Those that are deleted but not
/// yet committed so are left out.
pub fn files() -> Vec<String> {
    let list = output("git", &["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let root = root();
    let files: Vec<String> = list
        .split('\0')
        .filter(|file| !file.is_empty() && root.join(file).is_file())
        .map(str::to_owned)
        .collect();
    assert!(files.len() > 100, "git names too few files");
    files
}

/// Contents of a file where it is text.
pub fn read(file: &str) -> Option<String> {
    let bytes = std::fs::read(root().join(file)).unwrap_or_else(|error| panic!("{file} cannot be read: {error}"));
    String::from_utf8(bytes).ok()
}
