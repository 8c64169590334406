//! `baton up` over real processes with the stub engine: it serves, it ends, and it leaves nothing behind, however it ends.

#![allow(clippy::unwrap_used)] // a test that panics fails, which is what is wanted

mod support;

use serde_json::Value;
use std::io::Write;
use std::process::Stdio;
use support::{Up, all_gone, baton, http, is_gone, signal_process, succeeded, text, until};

#[test]
fn a_cluster_serves_and_ends_with_its_processes() {
    let folder = tempfile::tempdir().unwrap();
    let mut up = Up::start(&[], folder.path());
    assert_eq!(up.ready["stub"], true);
    let pids = up.pids();
    let names: Vec<&str> = pids.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["coordinator", "decode-1", "prefill-1"]);

    let address = up.ready["http"].as_str().unwrap();
    let models = http(
        address,
        "GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    );
    assert!(
        models.starts_with("HTTP/1.1 200") && models.contains(up.ready["model"].as_str().unwrap()),
        "{models}"
    );

    // The other commands find it without being told where.
    let status = succeeded(&baton(folder.path()).args(["status", "--json"]).output().unwrap());
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["nodes"].as_array().unwrap().len(), 2);
    assert!(
        status["nodes"]
            .as_array()
            .unwrap()
            .iter()
            .all(|node| node["stub"] == true && node["state"] == "ready")
    );
    let table = succeeded(&baton(folder.path()).arg("status").output().unwrap());
    assert!(table.contains("prefill-1") && table.contains("(stub)"), "{table}");

    // Two turns from a pipe.
    let mut chat = baton(folder.path())
        .args(["chat", "--max-tokens", "8", "--temperature", "0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    chat.stdin.take().unwrap().write_all(b"Hello\n\nAnd again\n").unwrap();
    let said = succeeded(&chat.wait_with_output().unwrap());
    assert!(said.lines().count() >= 2, "{said}");

    up.signal(rustix::process::Signal::TERM);
    assert_eq!(up.ended(), Some(0));
    all_gone(&pids);
    let address = up.ready["grpc"].as_str().unwrap();
    let nobody = baton(folder.path())
        .args(["status", "--endpoint", address])
        .output()
        .unwrap();
    let said = text(&nobody.stderr);
    assert!(
        !nobody.status.success() && said.contains("baton up") && said.contains(address),
        "{said}"
    );
}

#[test]
fn nothing_outlives_a_killed_up() {
    let folder = tempfile::tempdir().unwrap();
    let mut up = Up::start(&["--prefill", "0"], folder.path());
    let pids = up.pids();
    assert_eq!(pids.len(), 2);
    up.signal(rustix::process::Signal::KILL);
    assert_eq!(up.ended(), None);
    all_gone(&pids);
}

#[test]
fn a_dead_node_is_reported_and_a_dead_coordinator_ends_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut up = Up::start(&["--decode", "2"], folder.path());
    let pids = up.pids();
    let pid = |wanted: &str| pids.iter().find(|(name, _)| name == wanted).unwrap().1;
    signal_process(pid("decode-2"), rustix::process::Signal::KILL);
    until("decode-2 is gone", || is_gone(pid("decode-2")));
    assert!(up.child.try_wait().unwrap().is_none());
    signal_process(pid("coordinator"), rustix::process::Signal::KILL);
    assert_eq!(up.ended(), Some(1));
    all_gone(&pids);
}

#[test]
fn what_does_not_start_says_why_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let arguments = [
        "up",
        "--model",
        "stub",
        "--http-listen",
        &address,
        "--grpc-listen",
        "127.0.0.1:0",
    ];
    let output = baton(folder.path()).args(arguments).output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("--http-listen") && said.contains(&address), "{said}");
    // Memory that nobody has.
    let ports = ["--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0"];
    let arguments = ["up", "--model", "stub", "--kv-bytes", "900TiB"];
    let output = baton(folder.path()).args(arguments).args(ports).output().unwrap();
    let said = text(&output.stderr);
    assert!(!output.status.success() && said.contains("--kv-bytes"), "{said}");
    let output = baton(folder.path()).args(["demo", "--model", "stub"]).output().unwrap();
    assert!(!output.status.success() && text(&output.stderr).contains("stub"));
}
