//! A running cluster: started in order, watched, and stopped in order.

use super::child::{Child, LogSink};
use super::plan::{ClusterOptions, Machine};
use crate::endpoint;
use anyhow::{Context, Result, anyhow, bail};
use baton_node_runtime::announce::Announcement;
use baton_node_runtime::{Supervisor, process};
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::inference_client::InferenceClient;
use baton_proto::v1::{ClusterStatusRequest, ListModelsRequest, Model};
use futures::future::{join_all, select_all};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;
use tokio::time::timeout;
use tonic::transport::Channel;

/// How long a process may take until it serves; loading a model is in it.
const START_LIMIT: Duration = Duration::from_secs(300);
/// How long the cluster may take to list the model once all its processes serve.
const LIST_LIMIT: Duration = Duration::from_secs(30);
/// How long nodes, and then the coordinator, may take to end in order.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// A coordinator and its nodes as child processes.
pub struct Cluster {
    coordinator: Child,
    nodes: Vec<Child>,
    announcements: BTreeMap<String, Announcement>,
    channel: Channel,
    model: Model,
}

/// A child that ended by itself.
pub struct Ended {
    /// The cluster cannot go on: it was the coordinator, or the last node.
    pub fatal: bool,
    /// Which one and why, for people.
    pub report: String,
}

impl Cluster {
    /// Starts all processes and waits until a request would be served.
    ///
    /// # Errors
    /// Where one of them does not come up: which, and what it said last. All are gone then.
    pub async fn start(options: &ClusterOptions, supervisor: &Supervisor) -> Result<Self> {
        let mut announcements = BTreeMap::new();
        let plan = options.coordinator();
        let mut coordinator = Child::start(&plan, sink(options, &plan.name, 0), supervisor)?;
        let announcement = ready(&mut coordinator).await?;
        let store = match (&announcement.store, options.store.as_str()) {
            (Some(address), "embedded") => format!("etcd://{address}"),
            (None, "embedded") => bail!("the coordinator announced no embedded store"),
            (_, etcd) => etcd.to_owned(),
        };
        let grpc = announcement
            .grpc
            .clone()
            .context("the coordinator announced no gRPC address")?;
        announcements.insert(plan.name, announcement);
        let machine = Machine {
            available_memory: process::available_memory(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
        };
        let mut nodes = Vec::new();
        for (number, plan) in options.nodes(&store, machine)?.iter().enumerate() {
            nodes.push(Child::start(plan, sink(options, &plan.name, number + 1), supervisor)?);
        }
        for (child, result) in join_all(
            nodes
                .iter_mut()
                .map(|node| async { (node.name.clone(), ready(node).await) }),
        )
        .await
        {
            announcements.insert(child, result?);
        }
        let channel = endpoint::connect(&grpc).await.context("connect to the coordinator")?;
        let names: Vec<String> = announcements
            .values()
            .filter(|a| a.role != "coordinator")
            .map(|a| a.node_id.clone())
            .collect();
        let listed = timeout(LIST_LIMIT, listed(&channel, &names));
        let model = tokio::select! {
            model = listed => model.map_err(|_| anyhow!("the coordinator listed no model for {LIST_LIMIT:?}"))?,
            (child, _) = first_end(&mut coordinator, &mut nodes) => bail!(report(child)),
        };
        Ok(Self {
            coordinator,
            nodes,
            announcements,
            channel,
            model,
        })
    }

    /// What each process announced, by name.
    pub fn announcements(&self) -> &BTreeMap<String, Announcement> {
        &self.announcements
    }

    /// The process's id by its name.
    pub fn pids(&self) -> BTreeMap<String, u32> {
        self.children().map(|child| (child.name.clone(), child.pid())).collect()
    }

    /// A connection to the coordinator's gRPC door.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// The model that is served.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The coordinator's doors: HTTP and gRPC.
    pub fn doors(&self) -> (&str, &str) {
        let announcement = self.announcements.get(&self.coordinator.name);
        let http = announcement.and_then(|announcement| announcement.http.as_deref());
        let grpc = announcement.and_then(|announcement| announcement.grpc.as_deref());
        (http.unwrap_or_default(), grpc.unwrap_or_default())
    }

    /// Waits until a child that was running ends.
    pub async fn next_end(&mut self) -> Ended {
        let (child, is_coordinator) = first_end(&mut self.coordinator, &mut self.nodes).await;
        let report = report(child);
        Ended {
            fatal: is_coordinator || self.nodes.iter().all(Child::is_ended),
            report,
        }
    }

    /// Ends all processes in order: nodes, which sign off at the coordinator, then the coordinator.
    ///
    /// # Errors
    /// Names those that had to be ended by force.
    pub async fn stop(mut self) -> Result<()> {
        let mut forced = Vec::new();
        self.nodes.iter().for_each(Child::terminate);
        forced.extend(join_all(self.nodes.iter_mut().map(stopped)).await.into_iter().flatten());
        self.coordinator.terminate();
        forced.extend(stopped(&mut self.coordinator).await);
        if !forced.is_empty() {
            bail!("ended by force after {STOP_LIMIT:?}: {}", forced.join(", "));
        }
        Ok(())
    }

    fn children(&self) -> impl Iterator<Item = &Child> {
        std::iter::once(&self.coordinator).chain(&self.nodes)
    }
}

/// Waits for the child's announcement.
async fn ready(child: &mut Child) -> Result<Announcement> {
    match timeout(START_LIMIT, child.announced()).await {
        Ok(Some(announcement)) => Ok(announcement),
        Ok(None) => {
            child.ended().await;
            bail!(report(child))
        }
        Err(_) => bail!(
            "{} does not serve after {START_LIMIT:?}\n{}",
            child.name,
            indented(&child.unseen_tail())
        ),
    }
}

/// Waits until these nodes are ready and a model is listed.
async fn listed(channel: &Channel, nodes: &[String]) -> Model {
    let (mut inference, mut admin) = (InferenceClient::new(channel.clone()), AdminClient::new(channel.clone()));
    loop {
        let models = inference.list_models(ListModelsRequest {}).await;
        let status = admin.cluster_status(ClusterStatusRequest {}).await;
        if let (Ok(models), Ok(status)) = (models, status) {
            let status = status.into_inner();
            let is_ready = |name: &String| {
                status
                    .nodes
                    .iter()
                    .any(|node| node.node_id == *name && node.state == "ready")
            };
            if let (Some(model), true) = (
                models.into_inner().models.into_iter().next(),
                nodes.iter().all(is_ready),
            ) {
                return model;
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The first child to end of those that run, and whether it is the coordinator.
async fn first_end<'a>(coordinator: &'a mut Child, nodes: &'a mut [Child]) -> (&'a Child, bool) {
    let running: Vec<_> = std::iter::once((coordinator, true))
        .chain(nodes.iter_mut().map(|node| (node, false)))
        .filter(|(child, _)| !child.is_ended())
        .map(|(child, is_coordinator)| {
            Box::pin(async move {
                child.ended().await;
                let child: &Child = child;
                (child, is_coordinator)
            })
        })
        .collect();
    if running.is_empty() {
        return std::future::pending().await;
    }
    select_all(running).await.0
}

/// Waits for the child's end, by force where it takes too long: its name then.
async fn stopped(child: &mut Child) -> Option<String> {
    if timeout(STOP_LIMIT, child.ended()).await.is_ok() {
        return None;
    }
    child.kill().await;
    Some(child.name.clone())
}

/// Which child ended, how, and what it said last where that was not seen.
fn report(child: &Child) -> String {
    let name = format!("{} (pid {})", child.name, child.pid());
    let Some(status) = child.status() else {
        return format!("{name} ended");
    };
    if status.success() {
        return format!("{name} left in order");
    }
    match child.unseen_tail() {
        tail if tail.is_empty() => format!("{name} ended with {status}; its log is above"),
        tail => format!("{name} ended with {status}; its last words:\n{}", indented(&tail)),
    }
}

fn indented(lines: &[String]) -> String {
    lines
        .iter()
        .rev()
        .take(12)
        .rev()
        .map(|line| format!("    {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

fn sink(options: &ClusterOptions, name: &str, number: usize) -> LogSink {
    if !options.show_logs {
        return LogSink::Quiet;
    }
    let colours = [36, 32, 35, 33, 34, 31];
    let plain = !std::io::stderr().is_terminal() || std::env::var_os("NO_COLOR").is_some();
    let padded = format!("{name:<11}");
    LogSink::Prefixed(match plain {
        true => format!("{padded} |"),
        false => format!("\x1b[{}m{padded} |\x1b[0m", colours[number % colours.len()]),
    })
}
