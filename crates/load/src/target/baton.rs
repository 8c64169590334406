//! Baton's gRPC door.

use super::ServedModel;
use super::pick::pick;
use crate::error::cause;
use crate::{Failure, Frame, LoadError, Observed, Planned, Prompt};
use baton_proto::v1;
use baton_proto::v1::generate_request::Input;
use baton_proto::v1::inference_client::InferenceClient;
use std::time::Duration;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// A coordinator.
#[derive(Debug, Clone)]
pub struct BatonTarget {
    client: InferenceClient<Channel>,
    pub(super) model: ServedModel,
}

impl BatonTarget {
    /// Connects to `HOST:PORT`.
    ///
    /// # Errors
    /// Where nobody answers there, or the model is not served.
    pub async fn connect(address: &str, model: Option<&str>) -> Result<Self, LoadError> {
        let wrong = |reason: String| LoadError::Connect {
            address: address.to_owned(),
            reason,
        };
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| LoadError::Address {
            given: address.to_owned(),
        })?;
        let endpoint = endpoint.connect_timeout(Duration::from_secs(5)).tcp_nodelay(true);
        let channel = endpoint.connect().await.map_err(|error| wrong(cause(&error)))?;
        Self::over(channel, address, model).await
    }

    /// Over a channel that is there.
    ///
    /// # Errors
    /// Where the model is not served.
    pub async fn over(channel: Channel, address: &str, model: Option<&str>) -> Result<Self, LoadError> {
        let mut client = InferenceClient::new(channel);
        let listed = client.list_models(v1::ListModelsRequest {}).await;
        let listed = listed.map_err(|status| LoadError::Models {
            address: address.to_owned(),
            reason: status.message().to_owned(),
        })?;
        let served = listed.into_inner().models.into_iter().map(|model| ServedModel {
            id: model.id,
            context_tokens: Some(model.context_tokens).filter(|tokens| *tokens > 0),
        });
        let model = pick(address, served.collect(), model)?;
        Ok(Self { client, model })
    }

    fn request(&self, prompt: Prompt, tokens: u32) -> v1::GenerateRequest {
        let input = match prompt {
            Prompt::Tokens(ids) => Input::PromptTokens(v1::TokenIds { ids }),
            Prompt::Text(text) => Input::Prompt(text),
        };
        v1::GenerateRequest {
            model: self.model.id.clone(),
            input: Some(input),
            sampling: Some(v1::SamplingParams {
                temperature: Some(0.0),
                max_tokens: Some(tokens),
                ignore_eos: true,
                ..v1::SamplingParams::default()
            }),
            ..v1::GenerateRequest::default()
        }
    }

    /// Sends a request and reads its answer to the end; times are from `begun`.
    pub async fn send(mut self, planned: Planned, begun: Instant) -> Observed {
        let mut observed = Observed::of(&planned);
        let request = self.request(planned.prompt, planned.output);
        observed.dispatch_delay = begun.elapsed().saturating_sub(planned.at);
        let read = async {
            let mut stream = self.client.generate(request).await?.into_inner();
            let mut finished = false;
            while let Some(message) = stream.message().await? {
                if !message.tokens.is_empty() {
                    observed.frames.push(Frame {
                        at: begun.elapsed(),
                        tokens: message.tokens.len() as u32,
                    });
                }
                finished |= message.finish_reason != 0;
                if let Some(usage) = message.usage {
                    observed.prompt_tokens = usage.prompt_tokens;
                }
                observed.timeline = message.timeline.or(observed.timeline.take());
            }
            Ok::<bool, Status>(finished)
        };
        let failure = match read.await {
            Ok(true) => None,
            Ok(false) => Some(Failure::Error("the stream ended without a finish reason".to_owned())),
            Err(status) => Some(failure(&status)),
        };
        observed.ends(begun.elapsed(), failure);
        observed
    }
}

fn failure(status: &Status) -> Failure {
    let hint = status.metadata().get("retry-after-ms");
    let hint = hint.and_then(|ms| ms.to_str().ok()?.parse().ok());
    let retry_after = hint.map(Duration::from_millis);
    let refused = matches!(status.code(), Code::ResourceExhausted) || retry_after.is_some();
    let reason = format!("{} [{:?}]", status.message(), status.code());
    if refused {
        Failure::Refused { reason, retry_after }
    } else {
        Failure::Error(reason)
    }
}
