//! The gRPC service `etcdserverpb.KV`.

use super::server::Shared;
use etcd_client::proto::{
    PbCompactionRequest, PbCompactionResponse, PbDeleteRequest, PbDeleteResponse, PbKvService, PbPutRequest,
    PbPutResponse, PbRangeRequest, PbRangeResponse, PbRangeStreamResponse, PbTxnRequest, PbTxnResponse,
};
use futures::stream::Empty;
use std::sync::Arc;
use tonic::{Request, Response, Status};

pub(super) struct KvService(pub(super) Arc<Shared>);

#[tonic::async_trait]
impl PbKvService for KvService {
    type RangeStreamStream = Empty<Result<PbRangeStreamResponse, Status>>;

    async fn range(&self, request: Request<PbRangeRequest>) -> Result<Response<PbRangeResponse>, Status> {
        let (answer, header) = self.0.with(|state, _| state.range(request.get_ref()));
        Ok(Response::new(PbRangeResponse {
            header: Some(header),
            ..answer?
        }))
    }

    async fn range_stream(&self, _: Request<PbRangeRequest>) -> Result<Response<Self::RangeStreamStream>, Status> {
        Err(Status::unimplemented("the embedded store serves no streamed range"))
    }

    async fn put(&self, request: Request<PbPutRequest>) -> Result<Response<PbPutResponse>, Status> {
        let (answer, header) = self.0.with(|state, _| state.put(request.into_inner()));
        Ok(Response::new(PbPutResponse {
            header: Some(header),
            ..answer?
        }))
    }

    async fn delete_range(&self, request: Request<PbDeleteRequest>) -> Result<Response<PbDeleteResponse>, Status> {
        let (answer, header) = self.0.with(|state, _| state.delete_range(request.get_ref()));
        Ok(Response::new(PbDeleteResponse {
            header: Some(header),
            ..answer?
        }))
    }

    async fn txn(&self, request: Request<PbTxnRequest>) -> Result<Response<PbTxnResponse>, Status> {
        let (answer, header) = self.0.with(|state, _| state.txn(request.into_inner()));
        Ok(Response::new(PbTxnResponse {
            header: Some(header),
            ..answer?
        }))
    }

    async fn compact(&self, request: Request<PbCompactionRequest>) -> Result<Response<PbCompactionResponse>, Status> {
        let (answer, header) = self.0.with(|state, _| state.compact(request.get_ref().revision));
        answer?;
        Ok(Response::new(PbCompactionResponse { header: Some(header) }))
    }
}
