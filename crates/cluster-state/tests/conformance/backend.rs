//! The two stores under test, each started, stopped, started again and wiped in the same way.

use baton_cluster_state::embedded::EmbeddedStore;
use baton_cluster_state::{Store, StoreAddress, StoreOptions};
use baton_node_runtime::{Clock, Supervisor};
use etcd_client::Client;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};

/// Defines a module for each store that runs each of the listed tests on it.
#[macro_export]
macro_rules! on_both {
    ($($test:ident),+ $(,)?) => {
        mod embedded {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    super::$test($crate::backend::Backend::embedded().await).await;
                }
            )+
        }
        mod etcd {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    super::$test($crate::backend::Backend::etcd().await).await;
                }
            )+
        }
    };
}

enum Running {
    Stopped,
    Embedded(Supervisor),
    Etcd(Child),
}

/// A store on a port of its own. Dropping it ends it.
pub struct Backend {
    is_etcd: bool,
    port: u16,
    peer_port: u16,
    data: TempDir,
    running: Running,
    tls_flags: Vec<String>,
}

impl Backend {
    pub async fn embedded() -> Self {
        Self::start_fresh(false).await
    }

    pub async fn etcd() -> Self {
        Self::start_fresh(true).await
    }

    /// An etcd behind TLS, by these flags; not waited for.
    pub async fn etcd_with_tls(flags: Vec<String>) -> Self {
        let data = tempfile::tempdir().unwrap();
        let (port, peer_port) = (free_port().await, free_port().await);
        let mut backend = Self {
            is_etcd: true,
            port,
            peer_port,
            data,
            running: Running::Stopped,
            tls_flags: flags,
        };
        backend.start_without_probe().await;
        backend
    }

    async fn start_fresh(is_etcd: bool) -> Self {
        let data = tempfile::tempdir().unwrap();
        let (port, peer_port) = (free_port().await, free_port().await);
        let mut backend = Self {
            is_etcd,
            port,
            peer_port,
            data,
            running: Running::Stopped,
            tls_flags: Vec::new(),
        };
        backend.start().await;
        backend
    }

    /// Whether data outlive a restart.
    pub fn keeps_data(&self) -> bool {
        self.is_etcd
    }

    pub fn is_etcd(&self) -> bool {
        self.is_etcd
    }

    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Options to reach it, with a short lease.
    pub fn options(&self) -> StoreOptions {
        options_for(self.endpoint())
    }

    /// A connection under a supervisor of its own.
    pub async fn store(&self) -> Store {
        Store::connect(self.options(), Clock::new(), Supervisor::new())
            .await
            .unwrap()
    }

    /// The protocol, bare.
    pub async fn client(&self) -> Client {
        Client::connect([self.endpoint()], None).await.unwrap()
    }

    /// Ends it without warning: kill -9.
    pub async fn stop(&mut self) {
        match std::mem::replace(&mut self.running, Running::Stopped) {
            Running::Stopped => {}
            Running::Embedded(supervisor) => {
                supervisor.begin_shutdown();
                supervisor.join(Duration::from_secs(10)).await.unwrap();
            }
            Running::Etcd(mut child) => {
                child.kill().unwrap();
                child.wait().unwrap();
            }
        }
    }

    /// Starts it on the same port, with the same data where it keeps any.
    pub async fn start_without_probe(&mut self) {
        if self.is_etcd {
            self.running = Running::Etcd(self.spawn_etcd());
        } else {
            let supervisor = Supervisor::new();
            let listener = TcpListener::bind(("127.0.0.1", self.port)).await.unwrap();
            EmbeddedStore::serve(listener, Clock::new(), supervisor.clone())
                .await
                .unwrap();
            self.running = Running::Embedded(supervisor);
        }
    }

    /// Starts it and waits until it answers.
    pub async fn start(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        self.start_without_probe().await;
        loop {
            if let Running::Etcd(child) = &mut self.running {
                assert!(
                    child.try_wait().unwrap().is_none(),
                    "etcd ended at once, on port {}",
                    self.port
                );
            }
            let mut client = self.client().await;
            match tokio::time::timeout(Duration::from_secs(2), client.get("probe", None)).await {
                Ok(Ok(_)) => return,
                _ => assert!(Instant::now() < deadline, "the store does not answer"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Stops it, loses all data, starts it.
    pub async fn wipe(&mut self) {
        self.stop().await;
        self.data = tempfile::tempdir().unwrap();
        self.start().await;
    }

    fn spawn_etcd(&self) -> Child {
        let scheme = if self.tls_flags.is_empty() { "http" } else { "https" };
        let client = format!("{scheme}://127.0.0.1:{}", self.port);
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        // A short election timeout lets it grant leases of 1 s.
        Command::new("etcd")
            .arg("--data-dir")
            .arg(self.data.path())
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
            .args(["--heartbeat-interval", "10", "--election-timeout", "100"])
            .args(&self.tls_flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is missing: apt-get install etcd-server")
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Running::Etcd(child) = &mut self.running {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Options to reach a store at an endpoint, with a short lease.
pub fn options_for(endpoint: String) -> StoreOptions {
    StoreOptions {
        lease_ttl: Duration::from_secs(2),
        ..StoreOptions::new(StoreAddress::Etcd(vec![endpoint]))
    }
}

async fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // A connection that was used keeps the port from being given away again for a while.
    let (_, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    drop(accepted);
    address.port()
}
