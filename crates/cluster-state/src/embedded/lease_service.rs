//! The gRPC service `etcdserverpb.Lease`.

use super::server::Shared;
use etcd_client::proto::{
    PbLeaseGrantRequest, PbLeaseGrantResponse, PbLeaseKeepAliveRequest, PbLeaseKeepAliveResponse, PbLeaseLeasesRequest,
    PbLeaseLeasesResponse, PbLeaseRevokeRequest, PbLeaseRevokeResponse, PbLeaseService, PbLeaseStatus,
    PbLeaseTimeToLiveRequest, PbLeaseTimeToLiveResponse,
};
use futures::StreamExt;
use futures::stream::BoxStream;
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

pub(super) struct LeaseService(pub(super) Arc<Shared>);

#[tonic::async_trait]
impl PbLeaseService for LeaseService {
    type LeaseKeepAliveStream = BoxStream<'static, Result<PbLeaseKeepAliveResponse, Status>>;

    async fn lease_grant(
        &self,
        request: Request<PbLeaseGrantRequest>,
    ) -> Result<Response<PbLeaseGrantResponse>, Status> {
        let PbLeaseGrantRequest { ttl, id } = request.into_inner();
        let (answer, header) = self.0.with(|state, now| state.grant(id, ttl, now));
        let (id, ttl) = answer?;
        self.0.wake_lease_task();
        Ok(Response::new(PbLeaseGrantResponse {
            header: Some(header),
            id,
            ttl,
            error: String::new(),
        }))
    }

    async fn lease_revoke(
        &self,
        request: Request<PbLeaseRevokeRequest>,
    ) -> Result<Response<PbLeaseRevokeResponse>, Status> {
        let (answer, header) = self.0.with(|state, _| state.revoke(request.get_ref().id));
        answer?;
        Ok(Response::new(PbLeaseRevokeResponse { header: Some(header) }))
    }

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<PbLeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let shared = Arc::clone(&self.0);
        let shutdown = shared.shutdown.clone();
        let answers = request.into_inner().map(move |request| {
            let id = request?.id;
            let (ttl, header) = shared.with(|state, now| state.keep_alive(id, now));
            Ok(PbLeaseKeepAliveResponse {
                header: Some(header),
                id,
                ttl,
            })
        });
        Ok(Response::new(answers.take_until(shutdown.cancelled_owned()).boxed()))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<PbLeaseTimeToLiveRequest>,
    ) -> Result<Response<PbLeaseTimeToLiveResponse>, Status> {
        let PbLeaseTimeToLiveRequest { id, keys } = request.into_inner();
        let (lease, header) = self.0.with(|state, now| state.lease(id, now));
        let answer = PbLeaseTimeToLiveResponse {
            header: Some(header),
            id,
            ..PbLeaseTimeToLiveResponse::default()
        };
        Ok(Response::new(match lease {
            Some(lease) => PbLeaseTimeToLiveResponse {
                ttl: lease.left_seconds,
                granted_ttl: lease.granted_seconds,
                keys: if keys { lease.keys } else { Vec::new() },
                ..answer
            },
            None => PbLeaseTimeToLiveResponse { ttl: -1, ..answer },
        }))
    }

    async fn lease_leases(&self, _: Request<PbLeaseLeasesRequest>) -> Result<Response<PbLeaseLeasesResponse>, Status> {
        let (ids, header) = self.0.with(|state, _| state.lease_ids());
        let leases = ids.into_iter().map(|id| PbLeaseStatus { id }).collect();
        Ok(Response::new(PbLeaseLeasesResponse {
            header: Some(header),
            leases,
        }))
    }
}
