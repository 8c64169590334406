//! One child process: its announcement, its log, its end. Its standard input is a pipe whose other end only this process
//! holds, so that it sees end of file, and ends, even when this process is killed.

use super::plan::ChildPlan;
use anyhow::{Context, Result};
use baton_node_runtime::announce::{self, Announcement};
use baton_node_runtime::{CancellationToken, Supervisor};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::VecDeque;
use std::io::Write;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::sync::oneshot;

/// Lines of log that are kept for when something goes wrong.
const TAIL_LINES: usize = 30;

/// A child process.
pub struct Child {
    /// What it is called in logs.
    pub name: String,
    process: tokio::process::Child,
    pid: u32,
    announced: Option<oneshot::Receiver<Announcement>>,
    tail: Arc<Mutex<VecDeque<String>>>,
    drained: CancellationToken,
    ended: Option<ExitStatus>,
    _stdin: Option<ChildStdin>,
}

/// Where a child's log lines go.
#[derive(Debug, Clone)]
pub enum LogSink {
    /// Only kept.
    Quiet,
    /// To standard error behind this prefix.
    Prefixed(String),
}

impl Child {
    /// Starts this program again with a plan's arguments.
    ///
    /// # Errors
    /// Where the system does not start it.
    pub fn start(plan: &ChildPlan, sink: LogSink, supervisor: &Supervisor) -> Result<Self> {
        let program = std::env::current_exe().context("find this program")?;
        let mut command = Command::new(program);
        command
            .args(&plan.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // A group of its own: Ctrl-C reaches this process alone, which ends its children in the right order.
        command.process_group(0).kill_on_drop(true);
        // Its configuration is its flags; what is meant for this command is not meant for it. How to get into a guarded
        // etcd is meant for all, and no flag, so that process listings do not show it.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("BATON_") && !text.starts_with("BATON_ETCD_") {
                command.env_remove(&name);
            }
        }
        let mut process = command.spawn().with_context(|| format!("start {}", plan.name))?;
        let pid = process.id().context("the child has a process id")?;
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let drained = CancellationToken::new();
        let (announce, announced) = oneshot::channel();
        if let Some(stdout) = process.stdout.take() {
            supervisor.spawn("child-stdout", read_stdout(stdout, announce));
        }
        if let Some(stderr) = process.stderr.take() {
            let pump = read_stderr(stderr, sink, Arc::clone(&tail), drained.clone().drop_guard());
            supervisor.spawn("child-stderr", pump);
        }
        let stdin = process.stdin.take();
        Ok(Self {
            name: plan.name.clone(),
            process,
            pid,
            announced: Some(announced),
            tail,
            drained,
            ended: None,
            _stdin: stdin,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until it says that it serves; none where it ends before.
    pub async fn announced(&mut self) -> Option<Announcement> {
        match self.announced.as_mut() {
            Some(announced) => {
                let result = announced.await.ok();
                self.announced = None;
                result
            }
            None => None,
        }
    }

    /// Waits for its end, as often as one likes.
    pub async fn ended(&mut self) -> ExitStatus {
        if let Some(status) = self.ended {
            return status;
        }
        let status = self.process.wait().await.unwrap_or_default();
        // What it said last is in the pipe still.
        self.drained.cancelled().await;
        self.ended = Some(status);
        status
    }

    /// How it ended, as far as is known here.
    pub fn status(&self) -> Option<ExitStatus> {
        self.ended
    }

    /// Whether it ended, as far as is known here.
    pub fn is_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        // While it is not reaped its id is not given to another process.
        if let Some(pid) = self
            .process
            .id()
            .and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?))
        {
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    /// Ends it by force.
    pub async fn kill(&mut self) {
        let _ = self.process.kill().await;
        self.ended().await;
    }

    /// What it logged last, unless that was shown.
    pub fn unseen_tail(&self) -> Vec<String> {
        self.tail
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .cloned()
            .collect()
    }
}

async fn read_stdout(stdout: ChildStdout, announce: oneshot::Sender<Announcement>) {
    let mut announce = Some(announce);
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let (Some(announcement), true) = (announce::parse(&line), announce.is_some())
            && let Some(announce) = announce.take()
        {
            let _ = announce.send(announcement);
        }
    }
}

async fn read_stderr(
    stderr: ChildStderr,
    sink: LogSink,
    tail: Arc<Mutex<VecDeque<String>>>,
    _drained: impl Send + 'static,
) {
    let mut lines = BufReader::new(stderr).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        let line = String::from_utf8_lossy(&line).into_owned();
        if let LogSink::Prefixed(prefix) = &sink {
            let _ = writeln!(std::io::stderr().lock(), "{prefix} {line}");
            continue;
        }
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(line);
    }
}
