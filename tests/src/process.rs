//! One real process of the `baton` binary: started, read, signalled by its id, and gone when the handle is dropped.

use crate::netns::{self, Place};
use anyhow::{Context, Result, bail};
use baton_node_runtime::announce::Announcement;
use std::future::Future;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// The binary under test, built beside this test's own executable.
pub fn baton_binary() -> PathBuf {
    let mut path = std::env::current_exe().expect("a test knows its own path");
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    path.push("baton");
    assert!(
        path.exists(),
        "{} is missing: run ./test.sh, or cargo build -p baton first",
        path.display()
    );
    path
}

/// The real model: `BATON_TEST_MODEL`, which test.sh sets, or the copy beside the checkout.
pub fn model_path() -> PathBuf {
    let beside = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../shared/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    );
    let path = std::env::var_os("BATON_TEST_MODEL").map_or_else(|| PathBuf::from(beside), PathBuf::from);
    assert!(
        path.exists(),
        "no model at {}: run ./test.sh, or cargo run -- model get smollm2",
        path.display()
    );
    path
}

/// A Python that has the client libraries: test.sh makes it.
pub fn test_python() -> PathBuf {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/test-venv/bin/python"));
    assert!(
        path.exists(),
        "{} is missing: run ./test.sh, which makes it",
        path.display()
    );
    path
}

/// `./test.sh --long` was asked for.
pub fn long_campaign() -> bool {
    std::env::var("BATON_TEST_LONG").is_ok_and(|value| value == "1")
}

/// Waits until `condition` gives a value; fails with `what` after `limit`.
pub async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> F,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = condition().await {
            return Ok(value);
        }
        if Instant::now() > end {
            bail!("waited {limit:?} in vain for: {what}");
        }
        sleep(Duration::from_millis(25)).await;
    }
}

/// A running process. Its standard input is a pipe that it watches: it ends when this handle is gone.
pub struct Process {
    /// What it is called in messages.
    pub name: String,
    /// What it said when it was ready.
    pub announcement: Announcement,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
}

impl Process {
    /// Starts `baton ARGUMENTS` and waits for its announcement.
    pub async fn start(name: &str, arguments: &[String], limit: Duration) -> Result<Self> {
        Self::start_in(netns::HERE, name, arguments, limit).await
    }

    /// The same in a network namespace.
    pub async fn start_in(place: Place, name: &str, arguments: &[String], limit: Duration) -> Result<Self> {
        let mut command = place.command(&baton_binary());
        let mut child = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = child.stderr.take().context("stderr is piped")?;
        let kept = Arc::clone(&log);
        let label = name.to_owned();
        let echo = std::env::var_os("BATON_TEST_LOGS").is_some();
        tokio::spawn(async move {
            let mut lines = BufReader::new(stderr).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if echo {
                    eprintln!("[{label}] {line}");
                }
                kept.lock().expect("no panic while held").push(line);
            }
        });
        let mut lines = BufReader::new(child.stdout.take().context("stdout is piped")?).lines();
        let first = timeout(limit, lines.next_line()).await;
        let dump = || log.lock().expect("no panic while held").join("\n");
        match first {
            Ok(Ok(Some(line))) => {
                let announcement = serde_json::from_str(&line).with_context(|| format!("{name} announced {line}"))?;
                // Whatever else it prints is drained, so that it never blocks on a full pipe.
                tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
                Ok(Self {
                    name: name.to_owned(),
                    announcement,
                    child,
                    log,
                })
            }
            Ok(_) => {
                let status = timeout(Duration::from_secs(5), child.wait()).await;
                bail!("{name} ended ({status:?}) before it was ready:\n{}", dump())
            }
            Err(_) => bail!("{name} was not ready after {limit:?}:\n{}", dump()),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.announcement.pid
    }

    /// Everything it logged so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("no panic while held").join("\n")
    }

    /// Sends a signal, by name as kill(1) knows it, to this process alone.
    pub async fn signal(&self, name: &str) -> Result<()> {
        let status = Command::new("kill")
            .args(["-s", name, &self.pid().to_string()])
            .status()
            .await?;
        anyhow::ensure!(status.success(), "kill -s {name} {} failed", self.pid());
        Ok(())
    }

    /// kill -9, and waits until it is gone.
    pub async fn kill(&mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }

    /// SIGTERM, and its exit code.
    pub async fn terminate(&mut self, limit: Duration) -> Result<i32> {
        self.signal("TERM").await?;
        self.ended(limit).await
    }

    /// Its exit code, once it ends by itself.
    pub async fn ended(&mut self, limit: Duration) -> Result<i32> {
        let status = timeout(limit, self.child.wait()).await;
        let status =
            status.with_context(|| format!("{} did not end within {limit:?}:\n{}", self.name, self.log()))??;
        status
            .code()
            .with_context(|| format!("{} ended by a signal", self.name))
    }
}
