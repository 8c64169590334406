//! `baton.v1.Inference`: conversion, and the stream of one answer.

use super::convert::{chunk, finished, generate_input, status, tokenize_input};
use crate::{ApiError, ApiKey, Frontend, GenerateInput, Generation, GenerationEvent};
use baton_proto::convert::parse_id;
use baton_proto::v1;
use baton_proto::v1::inference_server::Inference;
use baton_types::RequestId;
use futures::stream::{self, BoxStream, StreamExt};
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// The service.
pub(super) struct InferenceService(pub(super) Arc<dyn Frontend>);

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = BoxStream<'static, Result<v1::GenerateResponse, Status>>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        // Drawn where the response's header is set, so that both are the same.
        let request_id = request.extensions().get().copied().unwrap_or_else(RequestId::random);
        let authorization = request.metadata().get("authorization");
        let api_key = authorization
            .and_then(|value| value.to_str().ok())
            .and_then(ApiKey::bearer);
        let input = generate_input(request_id, request.into_inner()).map_err(status)?;
        let input = GenerateInput { api_key, ..input };
        let generation = self.0.generate(input).await.map_err(status)?;
        Ok(Response::new(answer(generation)))
    }

    async fn cancel(&self, request: Request<v1::CancelRequest>) -> Result<Response<v1::CancelResponse>, Status> {
        let request_id = parse_id("request_id", &request.into_inner().request_id)
            .map_err(|error| status(ApiError::invalid("request_id", error.to_string())))?;
        Ok(Response::new(v1::CancelResponse {
            cancelled: self.0.cancel(request_id),
        }))
    }

    async fn tokenize(&self, request: Request<v1::TokenizeRequest>) -> Result<Response<v1::TokenizeResponse>, Status> {
        let request = request.into_inner();
        let input = tokenize_input(request.input).map_err(status)?;
        let tokens = self.0.tokenize(&request.model, &input).map_err(status)?;
        Ok(Response::new(v1::TokenizeResponse { tokens }))
    }

    async fn list_models(&self, _: Request<v1::ListModelsRequest>) -> Result<Response<v1::ListModelsResponse>, Status> {
        let models = self.0.models().into_iter().map(|model| v1::Model {
            id: model.id,
            context_tokens: model.context_tokens,
            stub: model.stub,
            created: model.created,
        });
        Ok(Response::new(v1::ListModelsResponse {
            models: models.collect(),
        }))
    }
}

/// Chunks, then the end. Dropping the stream drops the generation, which cancels.
fn answer(generation: Generation) -> BoxStream<'static, Result<v1::GenerateResponse, Status>> {
    let request_id = generation.request_id.to_string();
    stream::unfold(Some(generation), move |generation| {
        let request_id = request_id.clone();
        async move {
            let mut generation = generation?;
            Some(match generation.next().await {
                Some(GenerationEvent::Chunk(more)) => (Ok(chunk(&request_id, more)), Some(generation)),
                Some(GenerationEvent::Finished(end)) => (Ok(finished(&request_id, end)), None),
                Some(GenerationEvent::Failed(error)) => (Err(status(error)), None),
                None => (Err(Status::internal("the request's task ended without a word")), None),
            })
        }
    })
    .boxed()
}
