//! What tests of the command over real processes share.

#![allow(dead_code)] // each test file uses a part of it

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A running `baton up`; killed when dropped, which its children notice.
pub struct Up {
    pub child: Child,
    pub ready: Value,
}

impl Up {
    pub fn start(arguments: &[&str], runtime_folder: &Path) -> Self {
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

    pub fn pids(&self) -> Vec<(String, u32)> {
        let pids = self.ready["pids"].as_object().unwrap();
        pids.iter()
            .map(|(name, pid)| (name.clone(), u32::try_from(pid.as_u64().unwrap()).unwrap()))
            .collect()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        signal_process(self.child.id(), signal);
    }

    pub fn ended(&mut self) -> Option<i32> {
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

pub fn baton(runtime_folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.env("XDG_RUNTIME_DIR", runtime_folder);
    command
}

pub fn signal_process(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(40);
    while !condition() {
        assert!(Instant::now() < end, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process that ended but was not reaped by whoever started it is gone too.
pub fn is_gone(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

pub fn all_gone(pids: &[(String, u32)]) {
    for (name, pid) in pids {
        until(&format!("{name} ({pid}) is gone"), || is_gone(*pid));
    }
}

pub fn http(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn succeeded(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}
