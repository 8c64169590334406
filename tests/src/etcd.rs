//! A real etcd server of the test's own.

use crate::process::until;
use anyhow::{Context, Result, bail};
use baton_cluster_state::{MembershipEvent, Store, StoreOptions};
use baton_node_runtime::{Clock, Supervisor};
use std::net::TcpListener;
use std::process::Stdio;
use std::time::Duration;
use tempfile::TempDir;
use tokio::process::{Child, Command};

/// A running etcd with its data in a temporary folder.
pub struct Etcd {
    child: Child,
    data: TempDir,
    host: String,
    client_port: u16,
    peer_port: u16,
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl Etcd {
    /// Starts one on free ports of loopback and waits until it listens.
    pub async fn start() -> Result<Self> {
        Self::start_on("127.0.0.1").await
    }

    /// Starts one for clients that come to this address of the machine.
    pub async fn start_on(host: &str) -> Result<Self> {
        let (client_port, peer_port) = (free_port()?, free_port()?);
        let data = tempfile::tempdir()?;
        let child = spawn(&data, host, client_port, peer_port)?;
        let etcd = Self {
            child,
            data,
            host: host.to_owned(),
            client_port,
            peer_port,
        };
        etcd.wait_listening().await?;
        Ok(etcd)
    }

    /// As `--store` wants it.
    pub fn store(&self) -> String {
        format!("etcd://{}:{}", self.host, self.client_port)
    }

    /// Its process.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Where its data are.
    pub fn data(&self) -> &std::path::Path {
        self.data.path()
    }

    /// kill -9.
    pub async fn kill(&mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }

    /// Starts it again on the same port; `wiped` with an empty data folder.
    pub async fn restart(&mut self, wiped: bool) -> Result<()> {
        self.child.kill().await.ok();
        if wiped {
            self.data = tempfile::tempdir()?;
        }
        self.child = spawn(&self.data, &self.host, self.client_port, self.peer_port)?;
        self.wait_listening().await
    }

    /// Waits until exactly so many nodes have a record here, read by a watch of the test's own.
    pub async fn wait_registered(&self, wanted: usize, limit: Duration) -> Result<()> {
        until("every node registered again", limit, || async {
            (self.registered().await.ok()? == wanted).then_some(())
        })
        .await
    }

    async fn registered(&self) -> Result<usize> {
        let supervisor = Supervisor::new();
        let options = StoreOptions::new(self.store().parse()?);
        let store = Store::connect(options, Clock::new(), supervisor.clone()).await?;
        let first = tokio::time::timeout(Duration::from_secs(5), store.watch_nodes().next()).await;
        supervisor.begin_shutdown();
        match first? {
            MembershipEvent::Snapshot(records) => Ok(records.len()),
            other => bail!("a watch began with {other:?}"),
        }
    }

    async fn wait_listening(&self) -> Result<()> {
        until("etcd listens", Duration::from_secs(20), || async {
            tokio::net::TcpStream::connect((self.host.as_str(), self.client_port))
                .await
                .ok()
        })
        .await?;
        Ok(())
    }
}

fn spawn(data: &TempDir, host: &str, client_port: u16, peer_port: u16) -> Result<Child> {
    let (client, peer) = (
        format!("http://{host}:{client_port}"),
        format!("http://127.0.0.1:{peer_port}"),
    );
    Command::new("etcd")
        .arg("--data-dir")
        .arg(data.path())
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context("etcd is missing: run ./test.sh, or apt-get install etcd-server")
}
