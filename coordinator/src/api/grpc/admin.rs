//! `baton.v1.Admin`: what the cluster looks like from here, what its controller advises, draining of a node and changing its
//! role.

use super::advise::advise;
use super::convert::status;
use super::explain::explanation;
use crate::control::Control;
use crate::driver::Coordinator;
use crate::membership::MemberStatus;
use crate::{ApiCode, ApiError};
use baton_cluster_state::Store;
use baton_node_runtime::{Supervisor, process};
use baton_proto::convert::parse_id;
use baton_proto::v1;
use baton_proto::v1::admin_server::Admin;
use baton_proto::v1::node_client::NodeClient;
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

/// A node's last errors that are shown.
const ERRORS_MAX: usize = 8;

/// The service.
pub(super) struct AdminService {
    pub(super) coordinator: Coordinator,
    pub(super) control: Control,
    pub(super) store: Store,
    /// As operators know it.
    pub(super) store_name: String,
    pub(super) supervisor: Supervisor,
}

impl AdminService {
    /// Whom to ask to do something to a node: itself.
    fn node(&self, node_id: &str) -> Result<NodeClient<Channel>, Status> {
        self.coordinator.members().client(node_id).map_err(status)
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn cluster_status(
        &self,
        _: Request<v1::ClusterStatusRequest>,
    ) -> Result<Response<v1::ClusterStatusResponse>, Status> {
        let (requests, queued) = (self.coordinator.requests(), self.coordinator.queued());
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Response::new(v1::ClusterStatusResponse {
            nodes: self
                .coordinator
                .members()
                .status()
                .into_iter()
                .map(node_status)
                .collect(),
            running_requests: requests.saturating_sub(queued),
            queued_requests: queued,
            store: self.store_name.clone(),
            store_reachable: self.store.reachable(),
            coordinator_instance: self.coordinator.instance().to_string(),
            process: Some(v1::ProcessStatus {
                pid: process::pid(),
                open_files: count(process::open_files()),
                tasks: count(self.supervisor.tasks()),
                resident_bytes: process::resident_bytes(),
            }),
        }))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let request = request.into_inner();
        self.node(&request.node_id)?.drain(request).await
    }

    async fn set_role(&self, request: Request<v1::SetRoleRequest>) -> Result<Response<v1::SetRoleResponse>, Status> {
        let request = request.into_inner();
        self.node(&request.node_id)?.set_role(request).await
    }

    async fn advise(&self, _: Request<v1::AdviseRequest>) -> Result<Response<v1::AdviseResponse>, Status> {
        let known = self.control.status().await.map_err(|error| {
            let message = format!("the leader's advice cannot be read: {error}");
            status(ApiError::new(ApiCode::Unavailable, message))
        })?;
        Ok(Response::new(advise(known, self.coordinator.instance())))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainResponse>, Status> {
        let request_id = parse_id("request_id", &request.into_inner().request_id)
            .map_err(|error| status(ApiError::invalid("request_id", error.to_string())))?;
        let known = self.coordinator.explain(request_id).ok_or_else(|| {
            let message = format!("request_id: nothing is kept of request {request_id}");
            status(ApiError {
                field: Some("request_id".into()),
                ..ApiError::new(ApiCode::NotFound, message)
            })
        })?;
        Ok(Response::new(explanation(known)))
    }
}

fn node_status(member: MemberStatus) -> v1::NodeStatus {
    let record = member.record;
    let age = |age: Duration| u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
    let mut load = member.load;
    if !member.faults.is_empty() {
        let seen = member.faults.into_iter().map(|(since, message)| v1::NodeError {
            age_ms: age(since),
            message,
        });
        let errors = &mut load.get_or_insert_default().last_errors;
        errors.splice(..0, seen);
        errors.truncate(ERRORS_MAX);
    }
    v1::NodeStatus {
        node_id: record.node_id.to_string(),
        instance: record.instance.to_string(),
        role: v1::NodeRole::from(record.role).into(),
        state: member.state.to_owned(),
        model: record.model,
        stub: record.stub,
        grpc_address: record.grpc_address,
        load,
        heartbeat_age_ms: member.heartbeat_age.map(age).unwrap_or_default(),
    }
}
