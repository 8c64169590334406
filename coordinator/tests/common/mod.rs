//! A coordinator with its doors open, over a real embedded store, and nodes that do as a test tells them.

#![allow(dead_code)]

mod node;

pub use node::{FakeNode, Script};

use baton_coordinator::{Options, Service};
use baton_node_runtime::Metrics;
use baton_proto::v1;
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::inference_client::InferenceClient;
use baton_types::NodeRole;
use clap::Parser;
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// Nothing in a test takes this long; whoever waits longer hangs.
pub const LIMIT: Duration = Duration::from_secs(20);

/// How a prefill node tells a decode node that the blocks of an attempt are there.
pub type Fabric = Arc<Mutex<HashMap<Vec<u8>, mpsc::UnboundedSender<u32>>>>;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    options: Options,
}

pub struct Cluster {
    pub service: Option<Service>,
    pub client: InferenceClient<Channel>,
    pub admin: AdminClient<Channel>,
    pub http: String,
    store: String,
    fabric: Fabric,
}

impl Cluster {
    /// A coordinator without nodes.
    pub async fn start(flags: &[&str]) -> Self {
        let ports = [
            "--http-listen=127.0.0.1:0",
            "--grpc-listen=127.0.0.1:0",
            "--heartbeat=50ms",
        ];
        let arguments = std::iter::once("coordinator").chain(ports).chain(flags.iter().copied());
        let service = Service::start(&Command::parse_from(arguments).options, Metrics::detached())
            .await
            .unwrap();
        let announced = service.announcement.clone();
        let address = format!("http://{}", announced.grpc.unwrap());
        let channel = Channel::from_shared(address).unwrap().connect_lazy();
        Self {
            service: Some(service),
            client: InferenceClient::new(channel.clone()),
            admin: AdminClient::new(channel),
            http: announced.http.unwrap(),
            store: format!("etcd://{}", announced.store.unwrap()),
            fabric: Fabric::default(),
        }
    }

    /// One with a node of each kind, ready to serve.
    pub async fn pair(flags: &[&str]) -> (Self, FakeNode, FakeNode) {
        let cluster = Self::start(flags).await;
        let prefill = cluster.node("p0", NodeRole::Prefill);
        let decode = cluster.node("d0", NodeRole::Decode);
        cluster.ready(2).await;
        (cluster, prefill, decode)
    }

    /// One more node; see [`Self::ready`].
    pub fn node(&self, name: &str, role: NodeRole) -> FakeNode {
        FakeNode::start(name, role, &self.store, Arc::clone(&self.fabric), |_| ())
    }

    /// One more node with another record.
    pub fn odd_node(
        &self,
        name: &str,
        role: NodeRole,
        change: impl FnOnce(&mut baton_cluster_state::NodeRecord) + Send + 'static,
    ) -> FakeNode {
        FakeNode::start(name, role, &self.store, Arc::clone(&self.fabric), change)
    }

    pub async fn status(&self) -> v1::ClusterStatusResponse {
        self.admin
            .clone()
            .cluster_status(v1::ClusterStatusRequest {})
            .await
            .unwrap()
            .into_inner()
    }

    /// Waits until so many nodes are ready and a model is listed.
    pub async fn ready(&self, nodes: usize) {
        until(|| async {
            let status = self.status().await;
            let ready = status.nodes.iter().filter(|node| node.state == "ready").count() == nodes;
            ready && (nodes == 0 || !self.models().await.is_empty())
        })
        .await;
    }

    /// Waits until no request is under way.
    pub async fn idle(&self) {
        until(|| async {
            let status = self.status().await;
            status.running_requests == 0 && status.queued_requests == 0
        })
        .await;
    }

    pub async fn models(&self) -> Vec<v1::Model> {
        self.client
            .clone()
            .list_models(v1::ListModelsRequest {})
            .await
            .unwrap()
            .into_inner()
            .models
    }

    pub async fn stream(&self, request: v1::GenerateRequest) -> Result<Streaming<v1::GenerateResponse>, Status> {
        self.client
            .clone()
            .generate(request)
            .await
            .map(tonic::Response::into_inner)
    }

    /// The whole answer, with the rules of every stream checked.
    pub async fn ask(&self, request: v1::GenerateRequest) -> Result<Answer, Status> {
        let mut answer = Answer::default();
        let mut stream = self.stream(request).await?;
        answer.read(&mut stream, usize::MAX).await?;
        assert_ne!(
            answer.finish,
            v1::FinishReason::Unspecified,
            "neither finished nor failed"
        );
        Ok(answer)
    }
}

#[derive(Debug, Default)]
pub struct Answer {
    pub text: String,
    pub tokens: Vec<u32>,
    pub finish: v1::FinishReason,
    pub usage: v1::Usage,
    pub timeline: v1::Timeline,
}

impl Answer {
    /// Reads until there are so many tokens, or the end.
    pub async fn read(&mut self, stream: &mut Streaming<v1::GenerateResponse>, tokens: usize) -> Result<(), Status> {
        while self.tokens.len() < tokens {
            let message = tokio::time::timeout(LIMIT, stream.message())
                .await
                .expect("the stream hangs")?;
            let Some(message) = message else { return Ok(()) };
            assert_eq!(self.finish, v1::FinishReason::Unspecified, "a message after the end");
            if !message.tokens.is_empty() {
                assert_eq!(message.first_index as usize, self.tokens.len(), "a gap or a repeat");
            }
            self.finish = message.finish_reason();
            self.text.push_str(&message.text);
            self.tokens.extend(message.tokens);
            self.usage = message.usage.unwrap_or_default();
            self.timeline = message.timeline.unwrap_or_default();
        }
        Ok(())
    }
}

/// Waits for a condition.
pub async fn until<F: Future<Output = bool>>(mut condition: impl FnMut() -> F) {
    let wait = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.expect("waited in vain");
}

/// A request for so many tokens after `prompt`.
pub fn request(prompt: &str, tokens: u32) -> v1::GenerateRequest {
    let sampling = v1::SamplingParams {
        max_tokens: Some(tokens),
        temperature: Some(0.0),
        ..Default::default()
    };
    let input = Some(v1::generate_request::Input::Prompt(prompt.to_owned()));
    v1::GenerateRequest {
        input,
        sampling: Some(sampling),
        ..Default::default()
    }
}

/// What every healthy node answers: the alphabet, over and over, from token 0.
pub fn text(tokens: usize) -> String {
    (0..tokens).map(|index| char::from(b'a' + (index % 26) as u8)).collect()
}
