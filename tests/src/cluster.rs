//! A cluster of real processes on loopback, on ports the system picks.

use crate::netns::{Place, Wire};
use crate::process::{Process, until};
use anyhow::{Context, Result, bail};
use baton_proto::v1;
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::inference_client::InferenceClient;
use std::time::Duration;
use tokio::sync::{Mutex, MutexGuard};
use tonic::transport::{Channel, Endpoint};

/// Which store the cluster's membership lives in.
#[derive(Clone)]
pub enum Store {
    /// Inside the coordinator.
    Embedded,
    /// A real etcd at `etcd://host:port`.
    Etcd(String),
}

/// What to start.
#[derive(Clone)]
pub struct ClusterOptions {
    /// Prefill nodes; 0 makes it colocated.
    pub prefill: usize,
    /// Decode nodes.
    pub decode: usize,
    /// `--model` of every node.
    pub model: String,
    /// Where membership lives.
    pub store: Store,
    /// `--kv-bytes` of every node.
    pub kv_bytes: String,
    /// More flags for every node.
    pub node_flags: Vec<String>,
    /// More flags for prefill nodes.
    pub prefill_flags: Vec<String>,
    /// More flags for decode nodes.
    pub decode_flags: Vec<String>,
    /// Nodes that run in a network namespace, by name; the others listen on loopback.
    pub places: Vec<(String, Place)>,
    /// More flags for the coordinator.
    pub coordinator_flags: Vec<String>,
    /// How long each process may take to be ready, and all of them to find each other.
    pub start_limit: Duration,
}

impl ClusterOptions {
    /// One prefill and one decode node with this model.
    pub fn pair(model: impl Into<String>) -> Self {
        Self {
            prefill: 1,
            decode: 1,
            model: model.into(),
            store: Store::Embedded,
            kv_bytes: "256MiB".into(),
            node_flags: Vec::new(),
            prefill_flags: Vec::new(),
            decode_flags: Vec::new(),
            places: Vec::new(),
            coordinator_flags: Vec::new(),
            start_limit: Duration::from_secs(60),
        }
    }

    /// One node that does both.
    pub fn colocated(model: impl Into<String>) -> Self {
        Self {
            prefill: 0,
            ..Self::pair(model)
        }
    }

    /// Every prompt is computed on a prefill node: prediction may leave a short one to the decode node alone.
    pub fn always_handed_over(mut self) -> Self {
        let policy = ["--routing-policy", "least-loaded"];
        self.coordinator_flags.extend(policy.map(str::to_owned));
        self
    }

    /// Adds flags for every node.
    pub fn node_flags(mut self, flags: &[&str]) -> Self {
        self.node_flags.extend(flags.iter().map(|&flag| flag.to_owned()));
        self
    }
}

/// The running processes. Dropping it ends them all.
pub struct Cluster {
    /// The coordinator; `None` after it was killed.
    pub coordinator: Process,
    /// Prefill nodes in starting order.
    pub prefill: Vec<Process>,
    /// Decode nodes in starting order.
    pub decode: Vec<Process>,
    /// Nodes that the test runs in its own process.
    pub foreign: usize,
    options: ClusterOptions,
    _turn: MutexGuard<'static, ()>,
}

/// Clusters of one test program take turns: each wants all cores.
static TURN: Mutex<()> = Mutex::const_new(());

impl Cluster {
    /// Starts everything and waits until the model is listed.
    pub async fn start(options: ClusterOptions) -> Result<Self> {
        let (prefill, decode) = (options.prefill, options.decode);
        let mut cluster = Self::coordinator_alone(options).await?;
        for _ in 0..prefill {
            cluster.add("prefill").await?;
        }
        for _ in 0..decode {
            cluster.add("decode").await?;
        }
        cluster.wait_listed().await?;
        Ok(cluster)
    }

    /// Starts the coordinator and no node.
    pub async fn coordinator_alone(options: ClusterOptions) -> Result<Self> {
        let turn = TURN.lock().await;
        let coordinator = start_coordinator(&options).await?;
        Ok(Self {
            coordinator,
            prefill: Vec::new(),
            decode: Vec::new(),
            foreign: 0,
            options,
            _turn: turn,
        })
    }

    /// Starts one more node of a role and waits for its announcement.
    pub async fn add(&mut self, role: &str) -> Result<()> {
        let nodes = if role == "prefill" {
            &mut self.prefill
        } else {
            &mut self.decode
        };
        let name = format!("{role}-{}", nodes.len());
        nodes.push(start_node(&self.options, &self.coordinator, role, &name).await?);
        Ok(())
    }

    /// Starts a node again under the name of a dead one.
    pub async fn restart(&mut self, role: &str, index: usize) -> Result<()> {
        let nodes = if role == "prefill" {
            &mut self.prefill
        } else {
            &mut self.decode
        };
        nodes[index].kill().await.ok();
        let name = nodes[index].name.clone();
        nodes[index] = start_node(&self.options, &self.coordinator, role, &name).await?;
        Ok(())
    }

    /// Starts another coordinator where the old one died. Only on a real etcd do the nodes find it.
    pub async fn restart_coordinator(&mut self) -> Result<()> {
        self.coordinator.kill().await.ok();
        self.coordinator = start_coordinator(&self.options).await?;
        Ok(())
    }

    /// Flags for the next coordinator.
    pub fn set_coordinator_flags(&mut self, flags: &[&str]) {
        self.options.coordinator_flags = flags.iter().map(|&flag| flag.to_owned()).collect();
    }

    /// More flags for nodes that are started from now on.
    pub fn set_node_flags(&mut self, flags: &[&str]) {
        self.options.node_flags = flags.iter().map(|&flag| flag.to_owned()).collect();
    }

    /// `--store` of its nodes.
    pub fn store(&self) -> Result<String> {
        store_flag(&self.options, Some(&self.coordinator))
    }

    /// The model of nodes that are started from now on.
    pub fn set_model(&mut self, model: &str) {
        self.options.model = model.to_owned();
    }

    /// Base URL of the HTTP door.
    pub fn http(&self) -> String {
        format!(
            "http://{}",
            self.coordinator.announcement.http.as_deref().unwrap_or_default()
        )
    }

    /// host:port of the gRPC door.
    pub fn grpc_address(&self) -> String {
        self.coordinator.announcement.grpc.clone().unwrap_or_default()
    }

    async fn channel(&self) -> Result<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.grpc_address()))?;
        Ok(endpoint.connect_timeout(Duration::from_secs(5)).connect().await?)
    }

    /// A client of the gRPC door, on a connection of its own.
    pub async fn client(&self) -> Result<InferenceClient<Channel>> {
        Ok(InferenceClient::new(self.channel().await?))
    }

    /// The operator's door.
    pub async fn admin(&self) -> Result<AdminClient<Channel>> {
        Ok(AdminClient::new(self.channel().await?))
    }

    /// What the operator's door says of the cluster.
    pub async fn status(&self) -> Result<v1::ClusterStatusResponse> {
        let mut admin = self.admin().await?;
        Ok(admin.cluster_status(v1::ClusterStatusRequest {}).await?.into_inner())
    }

    /// Waits until exactly the nodes that should be are ready and a model is listed.
    pub async fn wait_listed(&self) -> Result<()> {
        let mut client = self.client().await?;
        let nodes = self.prefill.len() + self.decode.len() + self.foreign;
        let listed = until("all nodes ready and the model listed", self.options.start_limit, || {
            let mut client = client.clone();
            async move {
                let models = client
                    .list_models(v1::ListModelsRequest {})
                    .await
                    .ok()?
                    .into_inner()
                    .models;
                let status = self.status().await.ok()?;
                let ready = status.nodes.iter().filter(|node| node.state == "ready").count();
                (!models.is_empty() && ready == nodes).then_some(())
            }
        });
        if let Err(error) = listed.await {
            let models = client.list_models(v1::ListModelsRequest {}).await;
            bail!(
                "{error}: status {:?}, models {models:?}\n{}",
                self.status().await,
                self.logs()
            );
        }
        Ok(())
    }

    /// All logs, for a failure's message.
    pub fn logs(&self) -> String {
        let all = std::iter::once(&self.coordinator)
            .chain(&self.prefill)
            .chain(&self.decode);
        all.map(|process| format!("--- {}\n{}\n", process.name, process.log()))
            .collect()
    }

    /// Waits until no node holds anything for a request: every block is free or cached.
    pub async fn wait_idle(&self, limit: Duration) -> Result<v1::ClusterStatusResponse> {
        let idle = until("every block free or cached", limit, || async {
            let status = self.status().await.ok()?;
            let calm = status.running_requests == 0
                && status.nodes.iter().all(|node| {
                    let Some(load) = &node.load else { return false };
                    let Some(blocks) = &load.blocks else { return false };
                    blocks.total > 0
                        && blocks.free + blocks.cached == blocks.total
                        && load.running_requests == 0
                        && load.queued_requests == 0
                        && load.handovers_in == 0
                        && load.handovers_out == 0
                        && load.integrity_faults == 0
                });
            calm.then_some(status)
        });
        match idle.await {
            Ok(status) => Ok(status),
            Err(error) => bail!("{error}: {:#?}\n{}", self.status().await, self.logs()),
        }
    }
}

fn store_flag(options: &ClusterOptions, coordinator: Option<&Process>) -> Result<String> {
    Ok(match (&options.store, coordinator) {
        (Store::Etcd(address), _) => address.clone(),
        (Store::Embedded, None) => "embedded".into(),
        (Store::Embedded, Some(coordinator)) => {
            let address = coordinator.announcement.store.as_deref();
            format!("etcd://{}", address.context("the coordinator announced its store")?)
        }
    })
}

async fn start_coordinator(options: &ClusterOptions) -> Result<Process> {
    let mut flags: Vec<String> = [
        "coordinator",
        "--http-listen",
        "127.0.0.1:0",
        "--grpc-listen",
        "127.0.0.1:0",
        "--admin-listen",
        "127.0.0.1:0",
        "--exit-with-parent",
        "--store",
    ]
    .map(String::from)
    .to_vec();
    flags.push(store_flag(options, None)?);
    flags.extend(options.coordinator_flags.iter().cloned());
    Process::start("coordinator", &flags, options.start_limit).await
}

async fn start_node(options: &ClusterOptions, coordinator: &Process, role: &str, name: &str) -> Result<Process> {
    let mut flags: Vec<String> = [
        "node",
        "--role",
        role,
        "--node-id",
        name,
        "--exit-with-parent",
        "--model",
        &options.model,
    ]
    .map(String::from)
    .to_vec();
    flags.extend(["--kv-bytes".into(), options.kv_bytes.clone(), "--store".into()]);
    flags.push(store_flag(options, Some(coordinator))?);
    flags.extend(options.node_flags.iter().cloned());
    let of_role = match role {
        "prefill" => &options.prefill_flags,
        _ => &options.decode_flags,
    };
    flags.extend(of_role.iter().cloned());
    let Some((_, place)) = options.places.iter().find(|(named, _)| named == name) else {
        return Process::start(name, &flags, options.start_limit).await;
    };
    for (flag, wire) in [("--listen", Wire::Control), ("--transfer-listen", Wire::Handover)] {
        flags.extend([flag.to_owned(), format!("{}:0", place.address(wire))]);
    }
    Process::start_in(*place, name, &flags, options.start_limit).await
}
