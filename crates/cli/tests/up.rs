//! `baton up` over real processes with the stub engine: it serves, it ends, and it leaves nothing behind, however it ends.

#![allow(clippy::unwrap_used)] // a test that panics fails, which is what is wanted

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A running `baton up`; killed when dropped, which its children notice.
struct Up {
    child: Child,
    ready: Value,
}

impl Up {
    fn start(arguments: &[&str], runtime_folder: &Path) -> Self {
        let mut child = baton(runtime_folder)
            .args(["up", "--json", "--model", "stub", "--kv-bytes", "64MiB"])
            .args(["--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = child.stderr.take().unwrap();
        let log = std::thread::spawn(move || {
            let mut text = String::new();
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                text.push_str(&line);
                text.push('\n');
            }
            text
        });
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let Ok(ready) = serde_json::from_str(&line) else {
            panic!("no announcement: {line}{}", log.join().unwrap());
        };
        Self { child, ready }
    }

    fn pids(&self) -> Vec<(String, u32)> {
        let pids = self.ready["pids"].as_object().unwrap();
        pids.iter()
            .map(|(name, pid)| (name.clone(), u32::try_from(pid.as_u64().unwrap()).unwrap()))
            .collect()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        signal_process(self.child.id(), signal);
    }

    fn ended(&mut self) -> Option<i32> {
        let mut status = None;
        until("baton up has ended", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().code()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn baton(runtime_folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.env("XDG_RUNTIME_DIR", runtime_folder);
    command
}

fn signal_process(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(40);
    while !condition() {
        assert!(Instant::now() < end, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process that ended but was not reaped by whoever started it is gone too.
fn is_gone(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

fn all_gone(pids: &[(String, u32)]) {
    for (name, pid) in pids {
        until(&format!("{name} ({pid}) is gone"), || is_gone(*pid));
    }
}

fn http(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn succeeded(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

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
