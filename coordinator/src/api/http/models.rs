//! `/v1/models`.

use super::error::HttpError;
use super::router::Door;
use crate::ModelInfo;
use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use std::sync::Arc;

fn form(model: &ModelInfo) -> Value {
    json!({"id": model.id, "object": "model", "created": model.created, "owned_by": "baton",
           "context_tokens": model.context_tokens, "stub": model.stub})
}

pub(super) async fn list(State(door): State<Arc<Door>>) -> Json<Value> {
    let models: Vec<Value> = door.frontend.models().iter().map(form).collect();
    Json(json!({"object": "list", "data": models}))
}

pub(super) async fn one(State(door): State<Arc<Door>>, Path(id): Path<String>) -> Result<Json<Value>, HttpError> {
    let models = door.frontend.models();
    let found = models.iter().find(|model| model.id == id);
    found
        .map(|model| Json(form(model)))
        .ok_or_else(|| HttpError::no_such_model(&id))
}
