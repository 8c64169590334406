//! The descriptors that stand in for protoc when `etcd-client` is built: equal to what its own `.proto` files give.
//! `BATON_REGENERATE=1` writes them, as is needed when its version changes.

use anyhow::{Context, Result, ensure};
use prost::Message;
use std::path::{Path, PathBuf};
use std::process::Command;

/// As in the build script of `etcd-client`.
const FILES: [&str; 5] = [
    "etcd/api/authpb/auth.proto",
    "etcd/api/etcdserverpb/rpc.proto",
    "etcd/api/mvccpb/kv.proto",
    "etcd/server/etcdserver/api/v3election/v3electionpb/v3election.proto",
    "etcd/server/etcdserver/api/v3lock/v3lockpb/v3lock.proto",
];

/// Where cargo keeps the sources of `etcd-client`.
fn proto_folder() -> Result<PathBuf> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform"])
        // Of other platforms' crates nothing was downloaded.
        .args([
            &format!("{}-unknown-linux-gnu", std::env::consts::ARCH),
            "--manifest-path",
        ])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .output()?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata lists packages")?;
    let client = packages
        .iter()
        .find(|package| package["name"] == "etcd-client")
        .context("etcd-client is used")?;
    let manifest = Path::new(client["manifest_path"].as_str().context("a package has a manifest")?);
    Ok(manifest.with_file_name("proto"))
}

#[test]
fn checked_in_descriptors_are_those_of_the_client() -> Result<()> {
    let mut compiler = protox::Compiler::new([proto_folder()?])?;
    compiler
        .include_imports(true)
        .include_source_info(false)
        .open_files(FILES)?;
    let fresh = compiler.file_descriptor_set().encode_to_vec();
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../crates/cluster-state/etcd-protos/descriptors.binpb"
    );
    if std::env::var_os("BATON_REGENERATE").is_some() {
        std::fs::write(path, &fresh)?;
    }
    let kept = std::fs::read(path)?;
    ensure!(
        kept == fresh,
        "{path} is stale: run this test with BATON_REGENERATE=1, then build again"
    );
    Ok(())
}
