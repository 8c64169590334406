//! Processes of nodes as a test sees them: orders go in, what came of them comes out, and they can be stopped and killed.

use crate::peer;
use baton_kv_transfer::PathKind;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Longer than any bound of the endpoints.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a process said, and which; none where it ended.
pub type Said = (usize, Option<String>);

/// One process. Killed when dropped.
pub struct Process {
    pub id: usize,
    child: Child,
    orders: ChildStdin,
    /// How others reach it: words of the order `to`.
    pub peer: String,
    /// What it logged.
    log: Arc<Mutex<Vec<String>>>,
}

impl Process {
    /// Starts one, and waits until it listens. What it says later comes to the channel.
    pub fn start(id: usize, path: PathKind, seed: u64, blocks: usize, said: &Sender<Said>) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "peer::peer_process", "--nocapture", "--test-threads", "1"])
            .env(peer::PATH, path.name())
            .env(peer::SEED, seed.to_string())
            .env(peer::BLOCKS, blocks.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = child.stdin.take().unwrap();
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(err).lines().map_while(Result::ok) {
                lines.lock().unwrap().push(line);
            }
        });
        let (first, begun) = std::sync::mpsc::channel();
        let said = said.clone();
        std::thread::spawn(move || {
            let mut first = Some(first);
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                // The harness's own words share the line with the first of ours.
                let Some((_, word)) = line.split_once('@') else {
                    continue;
                };
                match (first.take(), word.strip_prefix("peer ")) {
                    (Some(first), Some(peer)) => drop(first.send(peer.to_owned())),
                    _ => drop(said.send((id, Some(word.to_owned())))),
                }
            }
            drop(said.send((id, None)));
        });
        let peer = begun.recv_timeout(PATIENCE);
        let mut process = Self {
            id,
            child,
            orders,
            peer: String::new(),
            log,
        };
        process.peer = peer.unwrap_or_else(|_| panic!("no peer came up:\n{}", process.log().join("\n")));
        process
    }

    pub fn tell(&mut self, order: &str) {
        // One that was killed hears nothing, and its end is heard of.
        let _ = writeln!(self.orders, "{order}");
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("the process was not waited for yet");
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Kibibytes of memory that are present.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .count()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let from = log.len().saturating_sub(20);
            eprintln!("last words of process {}:\n{}", self.id, log[from..].join("\n"));
        }
    }
}

/// The next thing that any of them says.
pub fn hear(said: &Receiver<Said>, what: &str) -> (usize, String) {
    match said.recv_timeout(PATIENCE) {
        Ok((id, Some(words))) => (id, words),
        Ok((id, None)) => panic!("process {id} ended while waiting for {what}"),
        Err(_) => panic!("waited in vain for {what}"),
    }
}

pub fn is_long() -> bool {
    std::env::var("BATON_TEST_LONG").is_ok_and(|long| long == "1")
}

/// By the clock, unless the environment names one to be run again.
pub fn seed() -> u64 {
    match std::env::var("BATON_TEST_SEED") {
        Ok(seed) => seed.parse().expect("BATON_TEST_SEED is a number"),
        Err(_) => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_millis() as u64,
    }
}
