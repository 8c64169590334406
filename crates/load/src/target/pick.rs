//! What all targets have in common.

use super::{BatonTarget, OpenAiTarget, ServedModel, Target};
use crate::{LoadError, Observed, Planned};
use tokio::time::Instant;

impl Target {
    /// An endpoint: `http://...` is OpenAI's interface, `HOST:PORT` is Baton's gRPC. `model` may be left out where one is served.
    ///
    /// # Errors
    /// Where nobody answers there, or the model is not served.
    pub async fn connect(endpoint: &str, model: Option<&str>) -> Result<Self, LoadError> {
        if endpoint.starts_with("http://") || endpoint.starts_with("https://") {
            return Ok(Self::OpenAi(OpenAiTarget::connect(endpoint, model).await?));
        }
        Ok(Self::Baton(BatonTarget::connect(endpoint, model).await?))
    }

    /// The model that requests go to.
    pub fn model(&self) -> &ServedModel {
        match self {
            Self::Baton(target) => &target.model,
            Self::OpenAi(target) => &target.model,
        }
    }

    /// Sends a request and reads its answer to the end; times are from `begun`.
    pub async fn send(self, planned: Planned, begun: Instant) -> Observed {
        match self {
            Self::Baton(target) => target.send(planned, begun).await,
            Self::OpenAi(target) => target.send(planned, begun).await,
        }
    }
}

/// The model to use of those that are served.
pub(super) fn pick(address: &str, served: Vec<ServedModel>, wanted: Option<&str>) -> Result<ServedModel, LoadError> {
    let known = match served.as_slice() {
        [] => "no model".to_owned(),
        models => models.iter().map(|m| m.id.as_str()).collect::<Vec<_>>().join(", "),
    };
    match wanted {
        Some(wanted) => served
            .into_iter()
            .find(|model| model.id == wanted)
            .ok_or_else(|| LoadError::UnknownModel {
                address: address.to_owned(),
                wanted: wanted.to_owned(),
                known,
            }),
        None => match <[ServedModel; 1]>::try_from(served) {
            Ok([model]) => Ok(model),
            Err(_) => Err(LoadError::WhichModel {
                address: address.to_owned(),
                known,
            }),
        },
    }
}
